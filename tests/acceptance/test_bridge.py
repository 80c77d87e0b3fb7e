"""`bridge`: each run that SQL starts gets one flow run, which Prefect's own workers execute."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from uuid import UUID, uuid4

import httpx
import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, Services, kill, wait_until
from tests.conftest import Connection
from tests.engine import column, get_run, run_workflow, value

FAST = {"PGFLOW_LEASE": "600", "PGFLOW_RECONCILE_INTERVAL": "2"}
"""No lease runs out while a slow machine works: a dead owner is recognised."""

QUEUED = "SELECT count(*) FROM pgflow_prefect.owners WHERE lease_until = 'infinity'"
SLEEPING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"


@pytest.fixture
def work_pool(cli: CommandLine, prefect_api: str) -> Iterator[str]:
    """A pool with one of Prefect's own workers, which executes flow runs in processes."""
    pool = f"pool-{uuid4().hex[:8]}"
    template = {"name": pool, "type": "process"}
    httpx.post(f"{prefect_api}/work_pools/", json=template, timeout=TIMEOUT).raise_for_status()
    log = (cli.directory / "prefect_worker.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"],
        cwd=cli.directory,
        env={**cli.environment, **FAST, "PREFECT_WORKER_QUERY_SECONDS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    yield pool
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(TIMEOUT)
    log.close()


def is_completed(db: Connection, run_id: UUID) -> bool:
    return bool(get_run(db, run_id).status == "completed")


def test_several_bridges_create_one_flow_run_for_each_run(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str
) -> None:
    assert cli("deploy", chain).code == 0
    for _ in range(3):
        services.start("bridge", **FAST)
    ids = {str(run_workflow(db, chain, {"n": n}).id) for n in range(30)}
    wait_until(lambda: value(db, QUEUED) == 30, "every run waits in Prefect")

    assert prefect.count_flow_runs(chain) == 30
    linked = {str(each) for each in column(db, "SELECT flow_run_id FROM pgflow_prefect.owners")}
    assert {prefect.read_flow_run(each)["parameters"]["run_id"] for each in linked} == ids


def test_a_bridge_that_died_between_creating_and_linking_makes_no_second_flow_run(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str
) -> None:
    assert cli("deploy", chain).code == 0
    db.execute("CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(600); END $$")
    db.execute(
        "CREATE TRIGGER wait BEFORE UPDATE ON pgflow_prefect.owners FOR EACH ROW "
        "WHEN (new.lease_until = 'infinity') EXECUTE FUNCTION wait()"
    )
    killed = services.start("bridge", **FAST)
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: prefect.count_flow_runs(chain) == 1, "the flow run is created")
    wait_until(lambda: value(db, SLEEPING) == 1, "the bridge links it")
    kill(killed)
    db.execute(SLEEPING.replace("count(*)", "pg_terminate_backend(pid, 10000)").encode())
    db.execute("DROP TRIGGER wait ON pgflow_prefect.owners")
    services.start("bridge", **FAST)

    wait_until(lambda: value(db, QUEUED) == 1, "the run waits in Prefect")
    assert prefect.count_flow_runs(chain) == 1
    assert prefect.find_flow_run(run_id)["parameters"] == {"run_id": str(run_id)}


def test_prefects_workers_execute_what_the_bridge_submits(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str, work_pool: str
) -> None:
    cli.write("gate")
    assert cli("deploy", chain, "--work-pool", work_pool).code == 0
    services.start("bridge", **FAST)
    run_id = run_workflow(db, chain, {"start": 5}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")

    # Its process is killed: the bridge submits the run again, in the next epoch.
    pid = str(value(db, "SELECT split_part(held_by, ':', 2) FROM pgflow_prefect.owners"))
    os.kill(int(pid), signal.SIGKILL)
    cli.remove("gate")
    wait_until(lambda: is_completed(db, run_id), "the run completes")

    assert cli.executions() == ["a", "b", "b", "c"]
    assert value(db, "SELECT count(DISTINCT flow_run_id) FROM pgflow_prefect.flow_runs") == 2
    prefect.await_state(run_id, "Completed")
    prefect.await_task_states(run_id, {"a": "Cached", "b": "Completed", "c": "Completed"})


@pytest.mark.once
def test_a_flow_run_that_was_cancelled_before_it_started_cancels_its_run(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str
) -> None:
    assert cli("deploy", chain).code == 0
    services.start("bridge", **FAST)
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: value(db, QUEUED) == 1, "the run waits in Prefect")
    prefect.press("Cancel", prefect.find_flow_run(run_id)["id"])

    wait_until(lambda: get_run(db, run_id).status == "failed", "the run is cancelled")
    assert get_run(db, run_id).error_message == "cancelled in Prefect"


@pytest.mark.once
def test_a_flow_run_that_was_deleted_is_submitted_again(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str
) -> None:
    assert cli("deploy", chain).code == 0
    services.start("bridge", **FAST)
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: value(db, QUEUED) == 1, "the run waits in Prefect")
    deleted = prefect.find_flow_run(run_id)["id"]
    httpx.delete(f"{prefect.url}/flow_runs/{deleted}", timeout=TIMEOUT).raise_for_status()

    latest = "SELECT flow_run_id::text FROM pgflow_prefect.owners WHERE lease_until = 'infinity'"
    wait_until(lambda: column(db, latest) not in ([], [deleted]), "another flow run is created")
    assert prefect.find_flow_run(run_id)["parameters"] == {"run_id": str(run_id)}


@pytest.mark.once
def test_a_key_that_belongs_to_something_else_is_an_error_that_is_seen(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str
) -> None:
    assert cli("deploy", chain).code == 0
    run_id = uuid4()
    url = f"{prefect.url}/deployments/{prefect.find_deployment(chain)['id']}/create_flow_run"
    other = {"parameters": {"run_id": str(uuid4())}, "idempotency_key": f"pgflow/{run_id}/1"}
    httpx.post(url, json=other, timeout=TIMEOUT).raise_for_status()
    bridge = services.start("bridge", **FAST)
    run_workflow(db, chain, {}, run_id)

    wait_until(lambda: get_run(db, run_id).status == "failed", "the run fails")
    assert "has the idempotency key" in str(get_run(db, run_id).error_message)
    bridge.await_line(f"ERROR run {run_id}")


@pytest.mark.once
def test_runs_of_a_workflow_without_a_deployment_are_named_and_left_alone(
    services: Services, db: Connection, cli: CommandLine, chain: str
) -> None:
    assert cli("enable", chain).code == 0
    run_id = run_workflow(db, chain, {}).id
    bridge = services.start("bridge", **FAST)
    bridge.await_line(f"workflow '{chain}' has no deployment (`pgflow-prefect deploy {chain}` makes one)")
    bridge.await_line(f"1 pending runs are left alone ({run_id}")
    assert value(db, "SELECT count(*) FROM pgflow_prefect.owners") == 0

    assert cli("deploy", chain).code == 0
    wait_until(lambda: value(db, QUEUED) == 1, "once it is deployed, the run is submitted")
    bridge.process.terminate()
    assert bridge.wait() == 0
