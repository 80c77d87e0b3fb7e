"""`serve`: deployments, bridge and the processes of flow runs in one command, for one machine."""

import signal
from collections.abc import Iterator
from uuid import UUID, uuid4

import httpx
import psutil
import pytest

from tests.acceptance.conftest import CHAIN_HANDLERS, TIMEOUT, CommandLine, PrefectView, Service, Services, wait_until
from tests.conftest import Connection
from tests.engine import CHAIN, column, define, get_run, run_workflow, statuses, value

NOWHERE = "host=127.0.0.1 port=9"
RUNS = "SELECT id FROM pgflow.runs WHERE workflow_slug = %s AND status = 'completed'"


@pytest.fixture
def left_over(services: Services) -> Iterator[list[psutil.Process]]:
    """Processes that must not be there any more at the end of the test; they are ended in any case."""
    found: list[psutil.Process] = []
    yield found
    _, alive = psutil.wait_procs(found, timeout=1)
    for process in alive:
        process.kill()
    assert not alive


def find_flow_runs(service: Service) -> list[psutil.Process]:
    """Return the processes that a service has started."""
    return psutil.Process(service.process.pid).children(recursive=True)


def is_completed(db: Connection, run_id: UUID) -> bool:
    return bool(get_run(db, run_id).status == "completed")


def test_what_sql_and_prefects_button_start_is_executed_each_in_a_process_of_its_own(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, product_dsn: str, chain: str
) -> None:
    other = f"other_{uuid4().hex[:8]}"
    define(db, other, CHAIN)
    cli.write(f"elsewhere/{other}.py", CHAIN_HANDLERS.replace('Workflow("chain")', f'Workflow("{other}")'))
    assert cli("deploy", other, "--handlers", f"elsewhere/{other}.py").code == 0
    # The flow runs' processes are told of --dsn, too, and not on their command line.
    serve = services.start("serve", f"flows/{chain}.py", "--dsn", product_dsn, PGFLOW_DSN=NOWHERE)
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
    assert serve.wait() == 0


def test_a_schedule_starts_runs_and_outlives_the_service(
    services: Services, db: Connection, prefect: PrefectView, chain: str
) -> None:
    serve = services.start("serve", f"flows/{chain}.py", "--interval", "5s", "--limit", "1")
    wait_until(lambda: bool(column(db, RUNS, chain)), "a scheduled run completes")
    serve.process.terminate()

    assert serve.wait() == 0
    [schedule] = prefect.find_deployment(chain)["schedules"]
    assert schedule["active"], "the next start goes on with it"


def test_sigterm_lets_flow_runs_come_to_their_end(
    services: Services, db: Connection, cli: CommandLine, chain: str, left_over: list[psutil.Process]
) -> None:
    gate = cli.write("gate")
    serve = services.start("serve")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    left_over += find_flow_runs(serve)
    assert left_over
    serve.process.send_signal(signal.SIGTERM)
    serve.await_line("draining: 1 flow runs")
    later = run_workflow(db, chain, {}).id
    gate.unlink()

    assert serve.wait() == 0
    assert get_run(db, run_id).status == "completed"
    assert statuses(db, later) == {"a": "pending"}, "for whoever serves next"
    assert cli.executions() == ["a", "b", "c"]


@pytest.mark.parametrize("how", ["a second signal", "the end of the grace"])
def test_flow_runs_that_do_not_end_are_stopped_and_their_runs_handed_back(
    services: Services,
    db: Connection,
    cli: CommandLine,
    prefect: PrefectView,
    chain: str,
    left_over: list[psutil.Process],
    how: str,
) -> None:
    gate = cli.write("gate")
    if how == "the end of the grace":  # and a handler that nothing but SIGKILL ends
        path = f"flows/{chain}.py"
        text = (cli.directory / path).read_text(encoding="utf-8").replace("import asyncio", "import time")
        cli.write(path, text.replace("async def b", "def b").replace("await asyncio.sleep", "time.sleep"))
    serve = services.start("serve", "--grace", "60" if how == "a second signal" else "0.5")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    left_over += find_flow_runs(serve)
    serve.process.send_signal(signal.SIGTERM)
    serve.await_line("draining: 1 flow runs")
    if how == "a second signal":
        serve.process.send_signal(signal.SIGTERM)

    assert serve.wait() == (1 if how == "a second signal" else 0)
    assert statuses(db, run_id) == {"a": "completed", "b": "pending"}
    assert value(db, "SELECT lease_until = '-infinity' FROM pgflow_prefect.owners"), "nobody has to wait for the lease"
    assert prefect.find_flow_run(run_id)["state_name"] == "HandedBack"

    gate.unlink()
    services.start("serve")
    wait_until(lambda: is_completed(db, run_id), "the next one goes on")
    assert cli.executions() == ["a", "b", "b", "c"]


def test_a_deployment_with_a_work_pool_is_left_to_its_workers(
    cli: CommandLine, prefect_api: str, prefect: PrefectView, chain: str
) -> None:
    pool = f"pool-{uuid4().hex[:8]}"
    template = {"name": pool, "type": "process"}
    httpx.post(f"{prefect_api}/work_pools/", json=template, timeout=TIMEOUT).raise_for_status()
    assert cli("deploy", chain, "--work-pool", pool).code == 0

    ended = cli("serve", "--cron", "0 9 * * *")
    assert ended.code == 2
    assert f"deployment {chain}/pgflow has the work pool '{pool}'" in ended.err
    assert prefect.find_deployment(chain)["schedules"] == [], "nothing was changed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.py",), "there is no file nowhere.py"),
        (("flows/unknown.py",), "unknown workflow 'unknown'"),
        (("--limit", "0"), "Must be >= 1"),
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


def test_it_asks_for_a_server_that_stays(outside: CommandLine) -> None:
    ended = outside("serve")
    assert ended.code == 2
    assert "PREFECT_API_URL is not set" in ended.find_error()
