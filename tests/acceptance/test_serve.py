"""`serve`: deployments, bridge and the processes of flow runs in one command, for one machine."""

import signal
from collections.abc import Iterator
from uuid import UUID, uuid4

import httpx
import psutil
import pytest

from pgflow_prefect.prefect_api.ids import find_run_id
from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, Service, Services, find_only_run, wait_until
from tests.conftest import Connection
from tests.engine import CHAIN, column, define, get_run, run_workflow, statuses, value

NOWHERE = "host=127.0.0.1 port=9"
RUNS = "SELECT id FROM pgflow.runs WHERE workflow_slug = %s AND status = 'completed'"


LeftOver = list[psutil.Process]


@pytest.fixture
def left_over(services: Services) -> Iterator[LeftOver]:
    """Processes that must not be there any more at the end of the test; they are ended in any case."""
    found: LeftOver = []
    yield found
    _, alive = psutil.wait_procs(found, timeout=TIMEOUT)
    for process in alive:
        process.kill()
    assert not alive


def find_flow_runs(service: Service) -> list[psutil.Process]:
    """Return the processes that a service has started."""
    return psutil.Process(service.process.pid).children(recursive=True)


def hold_imports(cli: CommandLine, workflow: str) -> None:
    """Let a process that loads this file of handlers wait there for as long as there is a file `hold`."""
    path = f"flows/{workflow}.py"
    text = (cli.directory / path).read_text(encoding="utf-8")
    waiting = "\nimport time\n\nwhile Path('hold').exists():\n    time.sleep(0.02)\n\nworkflow ="
    cli.write(path, text.replace("\nworkflow =", waiting))


def add_deployment(prefect_api: str, workflow: str) -> None:
    """Give a workflow a deployment that no process here serves."""
    flow = httpx.post(f"{prefect_api}/flows/", json={"name": workflow}, timeout=TIMEOUT).raise_for_status().json()
    wish = {"name": "pgflow", "flow_id": flow["id"]}
    httpx.post(f"{prefect_api}/deployments/", json=wish, timeout=TIMEOUT).raise_for_status()


def test_what_sql_and_prefects_button_start_is_executed_each_in_a_process_of_its_own(
    services: Services, db: Connection, prefect: PrefectView, product_dsn: str, chain: str
) -> None:
    other = f"other_{uuid4().hex[:8]}"
    define(db, other, CHAIN)
    add_deployment(prefect.url, other)
    db.execute("SELECT pgflow_prefect.enable_workflow(%s)", (other,))
    # The flow runs' processes are told of --dsn, too, and not on their command line.
    serve = services.start("serve", f"flows/{chain}.py", "--dsn", product_dsn, "--grace", "600", PGFLOW_DSN=NOWHERE)
    ignored = run_workflow(db, other, {}).id
    by_sql = run_workflow(db, chain, {"start": 1}).id
    flow_run = prefect.press_run(chain, {"start": 2})

    wait_until(lambda: len(column(db, RUNS, chain)) == 2, "both runs complete")
    assert get_run(db, by_sql).status == "completed"
    [by_button] = [each for each in column(db, RUNS, chain) if each != by_sql]
    assert isinstance(by_button, UUID)
    assert get_run(db, by_button).payload == {"start": 2}
    prefect.await_state(by_sql, "Completed")
    prefect.await_state(by_button, "Completed")
    assert str(prefect.find_flow_run(by_button)["id"]) == flow_run
    assert prefect.find_flow_run(by_sql)["parameters"] == {"run_id": str(by_sql)}, "the payload stays in PostgreSQL"
    assert value(db, "SELECT count(*) FROM pgflow_prefect.owners WHERE run_id = %s", ignored) == 0
    serve.process.terminate()
    assert serve.wait() == 0, "nothing is under way, so it waits for none of its grace"


def test_sigterm_lets_what_a_schedule_began_come_to_its_end_and_the_schedule_outlives_it(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str, left_over: LeftOver
) -> None:
    gate = cli.write("gate")
    deployed = cli("deploy", chain, "--interval", "1h", "--payload", '{"start": 4}')
    assert deployed.code == 0, deployed.err
    serve = services.start("serve", "--interval", "5s", "--limit", "1")
    wait_until(lambda: "b" in cli.executions(), "b of a scheduled run executes")
    left_over += find_flow_runs(serve)
    assert left_over
    run_id = find_only_run(db)
    serve.process.send_signal(signal.SIGTERM)
    serve.await_line("draining: 1 flow runs")
    later = run_workflow(db, chain, {}).id
    gate.unlink()

    assert serve.wait() == 0
    run = get_run(db, run_id)
    assert (run.status, run.payload) == ("completed", {"start": 4}), "serve keeps the payload of the schedule"
    assert statuses(db, later) == {"a": "pending"}, "for the next process that serves"
    assert cli.executions() == ["a", "b", "c"]
    [schedule] = prefect.find_deployment(chain)["schedules"]
    assert schedule["active"], "the next start goes on with it"
    assert [*schedule["parameters"]] == ["schedule_id"], "the payload stays in PostgreSQL"


def test_a_second_signal_stops_flow_runs_and_the_next_one_to_serve_goes_on_with_them(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str, left_over: LeftOver
) -> None:
    gate = cli.write("gate")
    hold_imports(cli, chain)
    serve = services.start("serve", "--grace", "600")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    hold = cli.write("hold")
    flow_run_id = prefect.press_run(chain, {})
    serve.await_line(f"run {find_run_id(UUID(flow_run_id))}")
    left_over += find_flow_runs(serve)
    serve.process.send_signal(signal.SIGTERM)
    serve.await_line("draining: 2 flow runs")
    serve.process.send_signal(signal.SIGTERM)

    assert serve.wait() == 1
    assert statuses(db, run_id) == {"a": "completed", "b": "pending"}
    assert value(db, "SELECT lease_until = '-infinity' FROM pgflow_prefect.owners"), "the lease is over"
    assert prefect.find_flow_run(run_id)["state_name"] == "HandedBack"
    assert prefect.read_flow_run(flow_run_id)["state_name"] == "Scheduled", "it had not begun its run"

    hold.unlink()
    gate.unlink()
    services.start("serve")
    wait_until(lambda: len(column(db, RUNS, chain)) == 2, "the next one goes on with both")
    assert sorted(cli.executions()) == ["a", "a", "b", "b", "b", "c", "c"]


@pytest.mark.once
def test_the_end_of_the_grace_kills_flow_runs_that_do_not_end_and_hands_their_runs_back(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str, left_over: LeftOver
) -> None:
    cli.write("gate")
    path = f"flows/{chain}.py"  # a handler that nothing but SIGKILL ends
    text = (cli.directory / path).read_text(encoding="utf-8").replace("import asyncio", "import time")
    cli.write(path, text.replace("async def b", "def b").replace("await asyncio.sleep", "time.sleep"))
    serve = services.start("serve", "--grace", "0.5")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    left_over += find_flow_runs(serve)
    serve.process.send_signal(signal.SIGTERM)

    assert serve.wait() == 0
    assert statuses(db, run_id) == {"a": "completed", "b": "pending"}
    assert value(db, "SELECT lease_until = '-infinity' FROM pgflow_prefect.owners"), "the lease is over"
    assert prefect.find_flow_run(run_id)["state_name"] == "HandedBack"


@pytest.mark.once
def test_the_outcome_of_a_run_its_error_and_its_handlers_log_lines_are_shown(
    services: Services, db: Connection, cli: CommandLine, chain: str
) -> None:
    path = f"flows/{chain}.py"
    text = (cli.directory / path).read_text(encoding="utf-8")
    said = "    print('a is printed')\n    logging.getLogger('shop').warning('a warns')\n"
    cli.write(
        path,
        text.replace("import asyncio", "import asyncio\nimport logging").replace('note("a")', f'note("a")\n{said}'),
    )
    broken = cli.write("broken")
    serve = services.start("serve")

    failed = run_workflow(db, chain, {}).id
    reason = "RuntimeError: the disk is full"
    serve.await_line(f"ERROR run {failed} of flow '{chain}': Failed, step \"b\" failed: {reason}")
    broken.unlink()
    done = run_workflow(db, chain, {}).id
    serve.await_line(f"run {done} of flow '{chain}': Completed")

    lines = serve.log.read_text(encoding="utf-8").splitlines()
    step = f"{chain}-{str(failed)[:8]}, step a"
    assert any(line.endswith(f"INFO {step}: a is printed") for line in lines)
    assert any(line.endswith("WARNING shop: a warns") for line in lines)
    assert any("ERROR" in line and ", step b: Task run failed with exception" in line for line in lines)
    assert not any("Beginning flow run" in line for line in lines), "what Prefect says beside that"
    assert not any("RuntimeWarning" in line for line in lines), "what Python says of how the process begins"
    serve.process.terminate()
    assert serve.wait() == 0


@pytest.mark.once
def test_a_flow_run_whose_process_dies_is_told_with_its_exit_code(
    services: Services, db: Connection, cli: CommandLine, chain: str
) -> None:
    path = f"flows/{chain}.py"
    text = (cli.directory / path).read_text(encoding="utf-8")
    cli.write(path, text.replace("import asyncio", "import asyncio\nimport os").replace('note("a")', "os._exit(7)"))
    serve = services.start("serve")
    run_id = run_workflow(db, chain, {}).id
    serve.await_line(f"run {run_id} of flow '{chain}': Crashed, ")
    serve.await_line("(its process has ended with code 7)")


@pytest.mark.once
def test_a_deployment_with_a_work_pool_is_refused_with_the_command_that_takes_it_away(
    services: Services, cli: CommandLine, prefect_api: str, chain: str
) -> None:
    pool = f"pool-{uuid4().hex[:8]}"
    httpx.post(f"{prefect_api}/work_pools/", json={"name": pool, "type": "process"}, timeout=TIMEOUT).raise_for_status()
    assert cli("deploy", chain, "--work-pool", pool).code == 0
    refused = cli("serve")
    assert refused.code == 2
    assert f"has the work pool '{pool}'" in refused.find_error()
    assert f"`pgflow-prefect deploy {chain} --no-work-pool`" in refused.err

    taken = cli("deploy", chain, "--no-work-pool")
    assert (taken.code, taken.lines[1:]) == (0, [f"  work pool: {pool} -> none"])
    services.start("serve").process.terminate()
    assert services.started[-1].wait() == 0


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("flows/unknown.py",), "unknown workflow 'unknown'"),
        (("--cron", "soon"), "--cron 'soon' is no cron expression"),
        ((), "no handlers: name a file or module"),
    ],
)
def test_what_can_t_work_is_refused_at_the_start(cli: CommandLine, arguments: tuple[str, ...], message: str) -> None:
    if arguments:
        cli.write("flows/unknown.py", "from pgflow_prefect import Workflow\nworkflow = Workflow('unknown')\n")
    ended = cli("serve", *arguments)
    assert ended.code == 2
    assert message in ended.err


@pytest.mark.once
def test_it_asks_for_a_server_that_stays(outside: CommandLine) -> None:
    ended = outside("serve")
    assert ended.code == 2
    assert "PREFECT_API_URL is not set" in ended.find_error()
