"""`worker`: runs that SQL starts are executed, shared between workers, handed back and taken over."""

import json
import re
import signal
from uuid import UUID, uuid4

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView, Services, expire_leases, kill, wait_until
from tests.conftest import Connection
from tests.engine import define, get_run, get_state, run_workflow, statuses, value

SET_ASIDE = "SELECT count(*) FROM pgflow_prefect.set_aside_runs"
HOLDERS = "SELECT count(DISTINCT held_by) FROM pgflow_prefect.owners"


def is_completed(db: Connection, run_id: UUID) -> bool:
    return bool(get_run(db, run_id).status == "completed")


def test_a_run_that_sql_starts_is_executed_and_shown(
    services: Services, db: Connection, prefect: PrefectView, chain: str
) -> None:
    services.start("worker")
    run_id = run_workflow(db, chain, {"start": 1}).id
    wait_until(lambda: is_completed(db, run_id), "the run completes")

    prefect.await_state(run_id, "Completed")
    prefect.await_task_states(run_id, dict.fromkeys("abc", "Completed"))
    flow_run = prefect.find_flow_run(run_id)
    assert flow_run["deployment_id"], "Prefect retries nothing that has no deployment"
    assert flow_run["parameters"] == {"run_id": str(run_id)}, "the payload stays in PostgreSQL"
    assert value(db, "SELECT count(DISTINCT flow_run_id) FROM pgflow_prefect.flow_runs") == 1


def test_a_run_that_a_trigger_refuses_stops_no_worker(
    services: Services, cli: CommandLine, db: Connection, chain: str
) -> None:
    db.execute(
        """CREATE FUNCTION guard() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
               IF NEW.payload ? 'bad' THEN RAISE EXCEPTION 'the stock is empty'; END IF; RETURN NEW; END $$;
           CREATE TRIGGER guard BEFORE UPDATE ON pgflow.runs FOR EACH ROW EXECUTE FUNCTION guard()"""
    )
    worker = services.start("worker")
    bad = run_workflow(db, chain, {"bad": 1}).id
    good = run_workflow(db, chain, {}).id
    wait_until(lambda: is_completed(db, good), "the other run completes")
    wait_until(lambda: value(db, SET_ASIDE) == 1, "the worker has set the refused run aside")

    shown = cli("status", str(bad))
    assert re.match(r"set aside: a worker or a bridge tries again to take it at 20\d\d-", shown.lines[1])
    assert re.search(r"the reason: the stock is empty \(P0001, .* (public\.)?guard\(\)", shown.lines[2])
    checks = json.loads(cli("doctor", "--no-flow-run", "--json").out)
    [found] = [each for each in checks if each["check"] == "runs set aside"]
    assert f"1 run is set aside; {bad} of '{chain}': the stock is empty" in found["message"]
    refused = cli("cancel", str(bad))
    assert refused.code == 1
    assert "the stock is empty" in refused.find_error()
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() == 0


def test_several_workers_share_the_runs(services: Services, db: Connection, cli: CommandLine, chain: str) -> None:
    gate = cli.write("gate")
    for _ in range(2):
        services.start("worker", "--concurrency", "2")
    ids = [run_workflow(db, chain, {"start": n}).id for n in range(12)]
    wait_until(lambda: value(db, HOLDERS) == 2, "each worker has taken a run")
    gate.unlink()
    wait_until(lambda: all(is_completed(db, run_id) for run_id in ids), "all runs complete")

    assert len(cli.executions()) == 12 * 3, "each step was executed once"
    assert value(db, "SELECT max(attempts) FROM pgflow.step_states") == 1


def test_sigterm_lets_running_steps_finish_and_hands_the_rest_back(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str
) -> None:
    gate = cli.write("gate")
    first = services.start("worker")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    first.process.send_signal(signal.SIGTERM)
    first.await_line("draining")
    gate.unlink()

    assert first.wait() == 0
    assert statuses(db, run_id) == {"a": "completed", "b": "completed", "c": "pending"}
    assert get_run(db, run_id).status == "pending"
    assert prefect.find_flow_run(run_id)["state_name"] == "HandedBack"

    services.start("worker")
    wait_until(lambda: is_completed(db, run_id), "another worker goes on")
    assert cli.executions() == ["a", "b", "c"]


RETRIED = """
from pathlib import Path

from pgflow_prefect import Workflow

workflow = Workflow("SLUG")


@workflow.step
async def work():
    if not Path("mended").exists():
        raise ValueError("not yet")
    return 7


flow = workflow.flow.with_options(retries=1, retry_delay_seconds=3600)
"""


def test_a_worker_that_drains_leaves_a_flow_run_that_waits_for_its_next_try_to_another_worker(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView
) -> None:
    slug = f"retried_{uuid4().hex[:8]}"
    define(db, slug, {"work": []})
    cli.write(f"flows/{slug}.py", RETRIED.replace("SLUG", slug))
    first = services.start("worker")
    run_id = run_workflow(db, slug).id
    wait_until(lambda: get_run(db, run_id).status == "failed", "the run fails")
    prefect.await_state(run_id, "AwaitingRetry")
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 0

    prefect.await_state(run_id, "AwaitingRetry")
    cli.write("mended")
    services.start("worker")
    prefect.press("Retry", prefect.find_flow_run(run_id)["id"])  # as if the time had come
    wait_until(lambda: is_completed(db, run_id), "another worker tries again")
    prefect.await_state(run_id, "Completed")
    assert value(db, "SELECT count(DISTINCT flow_run_id) FROM pgflow_prefect.flow_runs") == 1


@pytest.mark.once
def test_a_second_signal_stops_at_once(services: Services, db: Connection, cli: CommandLine, chain: str) -> None:
    cli.write("gate")
    worker = services.start("worker")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    worker.process.send_signal(signal.SIGTERM)
    worker.await_line("draining")
    worker.process.send_signal(signal.SIGTERM)

    assert worker.wait() != 0
    assert statuses(db, run_id) == {"a": "completed", "b": "pending"}
    assert value(db, "SELECT lease_until = '-infinity' FROM pgflow_prefect.owners"), "the lease is over"


def test_the_run_of_a_killed_worker_is_taken_over(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str
) -> None:
    gate = cli.write("gate")
    killed = services.start("worker", PGFLOW_LEASE="600")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    former = prefect.find_flow_run(run_id)["id"]
    kill(killed)
    expire_leases(db)
    gate.unlink()
    services.start("worker", PGFLOW_LEASE="2", PGFLOW_RECONCILE_INTERVAL="2")

    wait_until(lambda: is_completed(db, run_id), "the run completes")
    assert cli.executions() == ["a", "b", "b", "c"], "what was completed is not executed again"
    assert [get_state(db, run_id, step).attempts for step in "abc"] == [1, 2, 1]
    prefect.await_task_states(run_id, {"a": "Cached", "b": "Completed", "c": "Completed"})
    wait_until(lambda: prefect.read_flow_run(former)["state_name"] == "Crashed", "the former flow run is shown as dead")


def test_the_runs_of_a_killed_worker_of_the_same_machine_wait_for_no_lease(
    services: Services, db: Connection, cli: CommandLine, chain: str
) -> None:
    gate = cli.write("gate")
    killed = services.start("worker", PGFLOW_LEASE="600")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    kill(killed)
    assert "which is dead: a worker of this machine takes it over" in cli("status", str(run_id)).out
    gate.unlink()
    second = services.start("worker", PGFLOW_LEASE="600")

    wait_until(lambda: is_completed(db, run_id), "the run completes")
    assert cli.executions() == ["a", "b", "b", "c"]
    assert value(db, "SELECT recoveries FROM pgflow_prefect.owners") == 0, "`b` has completed since"
    assert str(value(db, "SELECT held_by FROM pgflow_prefect.owners")).endswith(f":{second.process.pid}")


def test_a_run_that_kills_every_worker_fails_in_the_end(
    services: Services, db: Connection, cli: CommandLine, chain: str
) -> None:
    path = f"flows/{chain}.py"
    text = (cli.directory / path).read_text(encoding="utf-8")
    cli.write(
        path,
        text.replace(
            '    note("b")\n', '    note("b")\n    import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)\n'
        ),
    )
    limits = {"PGFLOW_LEASE": "600", "PGFLOW_MAX_RECOVERIES": "1"}
    run_id = run_workflow(db, chain, {}).id
    for _ in range(3):  # of the first one's time, `a` is the progress
        assert services.start("worker", "--adopt", **limits).wait() == -signal.SIGKILL
    services.start("worker", **limits)

    wait_until(lambda: get_run(db, run_id).status == "failed", "the run is given up")
    assert str(get_run(db, run_id).error_message).startswith("given up: 2 owners in a row have vanished")
    assert cli.executions() == ["a", "b", "b", "b"]
    reopened = cli("retry", str(run_id))
    assert reopened.code == 0
    wait_until(lambda: cli.executions().count("b") == 4, "after a retry, it has all its chances again")


def test_only_runs_begun_after_enabling_are_taken(
    services: Services, db: Connection, cli: CommandLine, chain: str
) -> None:
    older = run_workflow(db, chain, {}).id
    worker = services.start("worker")
    worker.await_line(f"workflow '{chain}' has 1 pending runs from before it was enabled ({older}")
    newer = run_workflow(db, chain, {}).id
    wait_until(lambda: is_completed(db, newer), "the newer run completes")
    assert get_run(db, older).status == "pending"

    assert cli("disable", chain).code == 0
    left = run_workflow(db, chain, {}).id
    worker.process.terminate()
    assert worker.wait() == 0
    assert cli("enable", chain).code == 0
    services.start("worker", "--adopt")
    wait_until(lambda: is_completed(db, older) and is_completed(db, left), "--adopt takes them all")


def test_a_worker_survives_the_loss_of_its_connections(
    services: Services, db: Connection, dsn: str, chain: str
) -> None:
    services.start("worker")
    first = run_workflow(db, chain, {}).id
    wait_until(lambda: is_completed(db, first), "the first run completes")
    assert value(
        db,
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    second = run_workflow(db, chain, {}).id
    wait_until(lambda: is_completed(db, second), "the second run completes")


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.py",), "there is no file nowhere.py"),
        (("flows/empty.py",), "flows/empty.py has no handlers: it has no Workflow"),
        (("flows/unknown.py",), "unknown workflow 'unknown'"),
        (("--concurrency", "0"), "Must be >= 1"),
    ],
)
def test_what_can_t_work_is_refused_at_the_start(cli: CommandLine, arguments: tuple[str, ...], message: str) -> None:
    cli.write("flows/empty.py", "")
    cli.write("flows/unknown.py", "from pgflow_prefect import Workflow\nworkflow = Workflow('unknown')\n")
    ended = cli("worker", *arguments)
    assert ended.code == 2
    assert message in ended.err


@pytest.mark.once
def test_without_handlers_a_worker_says_what_to_name(cli: CommandLine) -> None:
    ended = cli("worker")
    assert ended.code == 2
    assert ended.find_error().startswith(
        "no handlers: name a file or module, or write one into flows/; or name a workflow"
    )


@pytest.mark.once
@pytest.mark.parametrize("service", ["worker", "bridge"])
def test_a_service_asks_for_a_server_that_stays(outside: CommandLine, service: str) -> None:
    outside.write("flows/empty.py", "from pgflow_prefect import Workflow\nworkflow = Workflow('some')\n")
    ended = outside(service)
    assert ended.code == 2
    assert "PREFECT_API_URL is not set" in ended.find_error()


@pytest.mark.once
def test_without_prefect_a_worker_does_not_start(cli: CommandLine, chain: str) -> None:
    ended = cli("worker", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert ended.code == 1
    assert "http://127.0.0.1:9/api can't be used" in ended.err
