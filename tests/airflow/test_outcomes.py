"""Random DAGs that Airflow has executed: this engine executes them, and each task has the same outcome."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any
from uuid import UUID

import pytest

from pgflow_prefect.definitions.airflow.dag import read_dag
from pgflow_prefect.definitions.airflow.document import read_document
from pgflow_prefect.definitions.model import Rule
from tests.airflow.recorded import RECORDED
from tests.conftest import Connection
from tests.engine import run_workflow, value

OUTCOMES = {"success": "success", "failed": "failed", "skipped": "skip-cascade", "upstream_failed": "not_run"}
"""Airflow's states as outcomes of the engine."""

MIXED = "all_success"

EARLY = {Rule.ALWAYS, Rule.ONE_DONE, Rule.ONE_FAILED, Rule.ONE_SUCCESS}
"""Rules of steps that begin before all that they wait for has ended."""

_PARTS = 3


@cache
def list_runs() -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads((RECORDED / "3.3" / "runs.json").read_text("utf-8"))["runs"]
    return runs


def define(db: Connection, run: Mapping[str, Any]) -> str:
    """Write the DAG into the database, as an import does."""
    definition = read_dag(read_document(run["document"], "runs.json", {})).definition
    slug = definition.slug
    db.execute("SELECT pgflow_prefect.insert_workflow(%s)", [slug])
    db.execute("SELECT pgflow_prefect.insert_steps(%s, %s)", [slug, [*definition.steps]])
    upstream, downstream = [dep.upstream for dep in definition.deps], [dep.downstream for dep in definition.deps]
    db.execute("SELECT pgflow_prefect.insert_deps(%s, %s, %s)", [slug, upstream, downstream])
    rules = {step: definition.find_rules(step).said for step in definition.steps}
    db.execute(
        "SELECT pgflow_prefect.set_rules(%s, %s, %s, %s)",
        [slug, json.dumps(rules), definition.when_failed, definition.failed_by],
    )
    return slug


def execute(db: Connection, run: Mapping[str, Any]) -> dict[str, str]:
    """Execute a run, each step as its task was drawn, and return the outcomes."""
    run_id = run_workflow(db, define(db, run)).id
    tasks = {task["id"]: task for task in run["tasks"]}
    while pending := [*list_pending(db, run_id)]:
        for slug in pending:
            act(db, run_id, slug, tasks[slug])
    found = db.execute(
        "SELECT step_slug, pgflow.outcome_of(status, skip_reason, skip_cascades) FROM pgflow.step_states "
        "WHERE run_id = %s",
        [run_id],
    )
    return {str(slug): str(outcome) for slug, outcome in found}


def list_pending(db: Connection, run_id: UUID) -> Iterator[str]:
    query = "SELECT step_slug FROM pgflow.step_states WHERE run_id = %s AND status = 'pending' ORDER BY step_slug"
    yield from (str(slug) for [slug] in db.execute(query, [run_id]))


def act(db: Connection, run_id: UUID, slug: str, task: Mapping[str, Any]) -> None:
    match task["does"]:
        case "ok":
            db.execute("SELECT pgflow.complete_step(%s, %s, '1')", [run_id, slug])
        case "fail":
            db.execute("SELECT pgflow.fail_step(%s, %s, 'on purpose')", [run_id, slug])
        case "skip":
            db.execute("SELECT pgflow.skip_step(%s, %s, 'on purpose')", [run_id, slug])
        case _:
            db.execute("SELECT pgflow.take_branches(%s, %s, %s)", [run_id, slug, task["takes"]])


def is_of_airflows_race(run: Mapping[str, Any], slug: str) -> bool:
    """Return whether Airflow decides by which end it sees first.

    That is a skip and a failure above all_success, or a failure above a task that a branch did not take.
    """
    tasks = {task["id"]: task for task in run["tasks"]}
    task = tasks[slug]
    above = {run["ends"][each] for each in task["upstream"]}
    is_left = any(tasks[each]["does"] == "branch" and slug not in tasks[each]["takes"] for each in task["upstream"])
    is_mixed = is_left or (task["rule"] == MIXED and "skipped" in above)
    return is_mixed and bool(above & {"failed", "upstream_failed"})


def list_compared() -> list[dict[str, Any]]:
    return [run for run in list_runs() if not any(is_of_airflows_race(run, task["id"]) for task in run["tasks"])]


@pytest.mark.parametrize("part", range(_PARTS))
def test_each_task_ends_as_in_airflow(part: int, db: Connection) -> None:
    for run in list_compared()[part::_PARTS]:
        slug = run["document"]["dag"]["dag_id"]
        assert execute(db, run) == {each: OUTCOMES[state] for each, state in run["ends"].items()}, slug
        ended = value(db, "SELECT status FROM pgflow.runs WHERE workflow_slug = %s", slug)
        assert ended == {"success": "completed", "failed": "failed"}[run["run"]], slug


def test_airflow_began_the_tasks_in_an_order_of_the_imported_graph() -> None:
    compared = 0
    for run in list_runs():
        definition = read_dag(read_document(run["document"], "runs.json", {})).definition
        executed = [slug for slug in run.get("order", ()) if run["ends"][slug] in {"success", "failed"}]
        place = {slug: number for number, slug in enumerate(executed)}
        for upstream, downstream in definition.deps:
            if {upstream, downstream} <= {*place} and definition.find_rules(downstream).rule not in EARLY:
                assert place[upstream] < place[downstream], run
                compared += 1
    assert compared >= 40


def test_enough_of_the_runs_are_compared() -> None:
    ends = {state for run in list_compared() for state in run["ends"].values()}
    assert len(list_compared()) >= 100
    assert ends == set(OUTCOMES)
