"""Runs that a real Airflow executes, as rows here and as flow runs in Prefect."""

from typing import LiteralString
from uuid import UUID

from tests.acceptance.conftest import CommandLine, PrefectView, Services, kill, wait_until
from tests.airflow.live.following import await_found
from tests.airflow.live.server import Airflow
from tests.conftest import Connection
from tests.engine import get_run, statuses, value

STATES = {
    **dict.fromkeys(("extract", "flaky", "choose", "left", "join", "numbers", "double", "total"), "Completed"),
    **dict.fromkeys(("double[0]", "double[1]", "double[2]"), "Completed"),
    "right": "Skipped",
}
ENDS = {"success": "completed", "failed": "failed", "skipped": "completed", "upstream_failed": "failed"}

PAST = """
from pgflow_prefect import Workflow

workflow = Workflow("past", when_failed="continue", failed_by="leaves")


@workflow.step
async def extract(payload):
    raise AssertionError("Airflow has done this")


@workflow.step
async def load(extract):
    return len(extract["rows"])
"""


def assert_agrees(db: Connection, airflow: Airflow, run_id: UUID, dag_id: str, airflow_run_id: str) -> None:
    """Compare the rows of a run that has ended with those of Airflow: states, tries, times and results."""
    compared: LiteralString = (
        "SELECT task_id, state, greatest(try_number, 0), start_date, end_date"
        " FROM task_instance WHERE dag_id = %s AND run_id = %s AND map_index < 0"
    )
    steps = {
        str(slug): rest
        for slug, *rest in db.execute(
            "SELECT step_slug, status, attempts, started_at, finished_at, step_result"
            " FROM pgflow.step_states WHERE run_id = %s",
            [run_id],
        )
    }
    for task, state, tries, began, ended in airflow.ask(compared, dag_id, airflow_run_id):
        status, attempts, started_at, finished_at, result = steps[task]
        assert status == ENDS[state], task
        if state in {"success", "failed"}:
            assert (attempts, started_at, finished_at) == (tries, began, ended), task
            assert result == airflow.read_result(dag_id, airflow_run_id, task), task
    [[queued_at, ended_at]] = airflow.ask(
        "SELECT queued_at, end_date FROM dag_run WHERE dag_id = %s AND run_id = %s", dag_id, airflow_run_id
    )
    run = get_run(db, run_id)
    assert run.finished_at == ended_at
    assert run.created_at <= queued_at, "a clear puts it into the queue again"


def test_a_run_is_followed_over_a_restart_and_a_clear_reopens_it(
    airflow: Airflow, cli: CommandLine, services: Services, db: Connection, prefect: PrefectView
) -> None:
    assert cli("import", "--from", "airflow", "observed").code == 0
    assert cli("observe", "observed").code == 0
    mirror = services.start("airflow", "mirror")
    airflow.trigger("observed", "followed", {"table": "orders"})
    run_id = await_found(db, "followed")
    wait_until(lambda: statuses(db, run_id).get("extract") == "completed", "the first step is here")
    kill(mirror)
    airflow.await_task("observed", "followed", "flaky", "success")
    services.start("airflow", "mirror")

    airflow.await_run("observed", "followed", "failed")
    wait_until(lambda: get_run(db, run_id).status == "failed", "the run has failed here")
    assert_agrees(db, airflow, run_id, "observed", "followed")
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 1
    prefect.await_state(run_id, "Failed")
    prefect.await_task_states(run_id, {**STATES, "broken": "Failed", "after_broken": "NotReady"})

    with airflow.paused("observed"):  # what is cleared waits
        airflow.clear("observed", "followed", "broken")
        wait_until(lambda: get_run(db, run_id).status == "pending", "the run is open again")
        assert {"broken", "after_broken"}.isdisjoint(
            slug for slug, status in statuses(db, run_id).items() if status != "pending"
        )
        prefect.await_state(run_id, "Running")
    airflow.await_run("observed", "followed", "success")
    wait_until(lambda: get_run(db, run_id).status == "completed", "the run is completed here")
    assert_agrees(db, airflow, run_id, "observed", "followed")
    prefect.await_state(run_id, "Completed")
    prefect.await_task_states(run_id, {**STATES, "broken": "Completed", "after_broken": "Completed"})
    assert cli("reconcile", "--all").lines == ["PostgreSQL and Prefect agree"]


def test_past_runs_are_rows_that_prefect_shows_on_request_and_that_are_executed_by_force_only(
    airflow: Airflow, cli: CommandLine, services: Services, db: Connection, prefect: PrefectView
) -> None:
    airflow.trigger("past", "long_ago")
    airflow.await_run("past", "long_ago", "failed")
    imported = cli("import", "--from", "airflow", "past", "--history", "90d")
    assert "past runs of 'past': 1 found, 1 written" in imported.lines
    run_id = await_found(db, "long_ago")
    assert_agrees(db, airflow, run_id, "past", "long_ago")
    again = cli("import", "--from", "airflow", "past", "--history", "90d")
    assert "past runs of 'past': 1 found, 0 written" in again.lines

    assert cli("record", "--since", "90d", "--workflow", "past").lines == ["shown in Prefect: 1 run"]
    prefect.await_state(run_id, "Failed")
    prefect.await_task_states(run_id, {"extract": "Completed", "load": "Failed"})
    cli.write("flows/past.py", PAST)
    services.start("worker")
    refused = cli("retry", str(run_id))
    assert (refused.code, get_run(db, run_id).status) == (1, "failed")
    assert "retry --force" in refused.find_error()

    assert cli("retry", "--force", str(run_id)).code == 0
    wait_until(lambda: get_run(db, run_id).status == "completed", "a worker has executed what had failed")
    assert value(db, "SELECT step_result FROM pgflow.step_states WHERE step_slug = 'load'") == 3
    prefect.await_state(run_id, "Completed")
