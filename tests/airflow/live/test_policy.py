"""Tasks of a real Airflow that move here by a row, and back: what Airflow, PostgreSQL and Prefect have in the end."""

from collections import Counter
from uuid import UUID

from tests.acceptance.conftest import CommandLine, PrefectView, Services, wait_until
from tests.airflow.live.following import await_found
from tests.airflow.live.policies import Policies
from tests.airflow.live.roles import make_login
from tests.airflow.live.server import Airflow
from tests.conftest import Connection
from tests.engine import get_run, get_state, statuses

# Beside the task that moves: Airflow's scheduler ends empty tasks without executing them.
STORY = """
from pathlib import Path

from pgflow_prefect import Workflow

workflow = Workflow("story", when_failed="continue", failed_by="leaves")


@workflow.step
def transform(extract):
    with Path("executed").open("a") as file:
        file.write("transform\\n")
    return 100 * sum(extract["rows"])


@workflow.step("load.big", after=["choose"])
def load_big():
    return None


@workflow.step(after=["stamp", "load.big", "load.small"], rule="none_failed_min_one_success")
def done():
    return None
"""

WAITING = """
from pathlib import Path

from pgflow_prefect import Workflow

workflow = Workflow("waiting", when_failed="continue", failed_by="leaves")


@workflow.step
def second(first):
    if Path("table").read_text() == "locked":
        raise ValueError("the table is locked")
    return [*first, "prefect"]
"""


def list_executed(airflow: Airflow, dag_id: str) -> Counter[tuple[str, str]]:
    """Return how often Airflow has executed each task of each run of a DAG."""
    lines = [line.split(" ") for line in airflow.read_executions() if line.startswith(f"{dag_id} ")]
    return Counter((run_id, task_id) for _, run_id, task_id, _ in lines)


def bind(cli: CommandLine, *arguments: str) -> None:
    assert (done := cli("bind", *arguments)).code == 0, done.err


def read_skipped(db: Connection, run_id: UUID) -> set[str]:
    """Return the steps that were skipped."""
    found = db.execute(
        "SELECT step_slug FROM pgflow.step_states WHERE run_id = %s AND skip_reason IS NOT NULL", [run_id]
    )
    return {str(slug) for [slug] in found}


def test_a_task_moves_by_a_row_and_back_while_airflow_goes_on_with_the_others(
    airflow: Airflow, policies: Policies, cli: CommandLine, services: Services, db: Connection, prefect: PrefectView
) -> None:
    policies.add("story")
    cli.write("flows/story.py", STORY)
    for empty in ("load.big", "done"):  # the policy does not see these
        bind(cli, "story", empty, "--python")
    services.start("worker")

    airflow.trigger("story", "before")
    airflow.await_run("story", "before", "success")
    before = await_found(db, "before")
    wait_until(lambda: get_run(db, before).status == "completed", "the run before is completed")
    assert get_state(db, before, "transform").step_result == airflow.read_result("story", "before", "transform") == 6
    assert read_skipped(db, before) == {"load.big"}

    bind(cli, "story", "transform", "--python")
    airflow.trigger("story", "moved", {"table": "orders"})
    airflow.await_run("story", "moved", "success")
    moved = await_found(db, "moved")
    wait_until(lambda: get_run(db, moved).status == "completed", "the moved run is completed")
    tasks = {task: state for task, (state, _) in airflow.read_tasks("story", "moved").items()}
    assert tasks == {**dict.fromkeys(tasks, "success"), "load.small": "skipped"}, "by our total, another branch"
    assert airflow.read_result("story", "moved", "transform") == 600
    assert get_state(db, moved, "transform").step_result == 600
    assert statuses(db, moved) == dict.fromkeys(tasks, "completed")
    assert read_skipped(db, moved) == {"load.small"}
    prefect.await_state(moved, "Completed")
    prefect.await_task_states(moved, {**dict.fromkeys(tasks, "Completed"), "load.small": "Skipped"})
    assert (cli.directory / "executed").read_text() == "transform\n"

    airflow.clear("story", "moved", "transform")
    airflow.wait_until(lambda: airflow.read_tasks("story", "moved")["transform"] == ("success", 2), "it ended again")
    airflow.await_run("story", "moved", "success")
    assert airflow.read_result("story", "moved", "transform") == 600
    assert "has ended before this try began, and is not executed again" in airflow.read_log(
        "story", "moved", "transform"
    )

    bind(cli, "story", "transform", "--undo")
    airflow.trigger("story", "back")
    airflow.await_run("story", "back", "success")
    back = await_found(db, "back")
    wait_until(lambda: get_run(db, back).status == "completed", "the run after is completed")
    assert get_state(db, back, "transform").step_result == 6
    assert (cli.directory / "executed").read_text() == "transform\n"
    assert list_executed(airflow, "story") == {
        **{(run, "extract"): 1 for run in ("before", "moved", "back")},
        **{(run, "transform"): 1 for run in ("before", "back")},
    }
    assert cli("reconcile", "--all").lines == ["PostgreSQL and Prefect agree"]


def test_a_task_that_waits_goes_back_and_one_that_fails_here_fails_there(
    airflow: Airflow, policies: Policies, cli: CommandLine, services: Services, db: Connection
) -> None:
    policies.add("waiting")
    cli.write("flows/waiting.py", WAITING)
    bind(cli, "waiting", "second", "--python")
    airflow.trigger("waiting", "undone")
    airflow.await_task("waiting", "undone", "second", "deferred")
    bind(cli, "waiting", "second", "--undo")
    airflow.await_run("waiting", "undone", "success")
    assert airflow.read_result("waiting", "undone", "third") == ["airflow"] * 3
    undone = await_found(db, "undone")
    assert get_run(db, undone).status == "completed"

    cli.write("table", "locked")
    bind(cli, "waiting", "second", "--python")
    services.start("worker")
    airflow.trigger("waiting", "failing")
    airflow.await_run("waiting", "failing", "failed")
    failing = await_found(db, "failing")
    assert airflow.read_tasks("waiting", "failing") == {
        "first": ("success", 1),
        "second": ("failed", 1),
        "third": ("upstream_failed", 0),
    }
    assert "the table is locked" in airflow.read_log("waiting", "failing", "second")
    wait_until(lambda: get_run(db, failing).status == "failed", "the run has failed here")

    cli.write("table", "free")
    assert cli("retry", str(failing)).code == 0
    airflow.clear("waiting", "failing", "second")
    airflow.await_run("waiting", "failing", "success")
    wait_until(lambda: get_run(db, failing).status == "completed", "the run is completed here")
    assert airflow.read_result("waiting", "failing", "third") == ["airflow", "prefect", "airflow"]
    assert get_state(db, failing, "third").step_result == ["airflow", "prefect", "airflow"]
    executed = list_executed(airflow, "waiting")
    assert executed == {
        **{("undone", task): 1 for task in ("first", "second", "third")},
        **{("failing", task): 1 for task in ("first", "third")},
    }


def test_a_policy_without_its_database_its_role_or_its_workflow_stops_no_dag(
    airflow: Airflow, policies: Policies, db: Connection, dsn: str
) -> None:
    broken = "host=127.0.0.1 port=1 dbname=nowhere user=reader password=secret"
    policies.add("unlucky", broken)
    policies.add("unlucky_moved", broken)
    others = ("unlucky", "unlucky_role", "unlucky_name", "untouched")
    with make_login(dsn, "") as stranger:
        policies.add("unlucky_role", stranger)
        policies.add("unlucky_name")
        db.execute("DELETE FROM pgflow.steps WHERE workflow_slug = 'unlucky_name'")
        db.execute("DELETE FROM pgflow.workflows WHERE slug = 'unlucky_name'")
        for dag_id in others:
            airflow.trigger(dag_id, "anyway")
        for dag_id in others:
            airflow.await_run(dag_id, "anyway", "success")
            assert list_executed(airflow, dag_id).keys() == {("anyway", "stay")}
    for dag_id in ("unlucky", "unlucky_role"):
        log = airflow.read_log(dag_id, "anyway", "stay")
        assert "pgflow can't be asked, and the task had not moved: Airflow executes it" in log
        assert "secret" not in log
    assert db.execute("SELECT FROM pgflow.runs").fetchall() == []

    airflow.set_variable("pgflow_moved_unlucky_moved", '["stay"]')  # as the policy does while it can ask
    airflow.trigger("unlucky_moved", "anyway")
    airflow.await_task("unlucky_moved", "anyway", "stay", "deferred")
    assert list_executed(airflow, "unlucky_moved") == {}
    airflow.add_connection("pgflow_unlucky_moved", policies.address)
    airflow.await_run("unlucky_moved", "anyway", "success")
    assert get_run(db, await_found(db, "anyway")).status == "completed"
