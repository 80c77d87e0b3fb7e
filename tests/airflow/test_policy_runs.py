"""Runs of a DAG whose tasks ask: those that a mirror had begun before, and the tasks that a policy does not see."""

import logging
from typing import Any
from uuid import UUID

import pytest

from pgflow_prefect.airflow.mirrored import find_mirrored_run_id
from pgflow_prefect.database.airflow import runs as airflow_runs
from pgflow_prefect.errors import RunNotPendingError
from tests.airflow.replay import DAG_ID
from tests.airflow.test_mirror import ENDED, Site, airflow, site
from tests.conftest import Connection
from tests.engine import claim, complete

pytestmark = [pytest.mark.anyio, pytest.mark.thorough]

__all__ = ["airflow", "site"]  # fixtures


def ask(db: Connection, run_id: UUID, task: str, try_number: int = 1) -> str:
    """Ask as a try of a task does."""
    [[answer]] = db.execute(
        "SELECT answer FROM pgflow_prefect.claim_airflow_task(%s, %s, %s, %s, %s, NULL, NULL, NULL)",
        [DAG_ID, task, try_number, run_id, '{"airflow_run_id": "run 1"}'],
    ).fetchall()
    return str(answer)


def end(db: Connection, run_id: UUID, task: str, try_number: int = 1, result: str = "null") -> bool:
    """Report as a try of a task does."""
    [[ended]] = db.execute(
        "SELECT pgflow_prefect.end_airflow_task(%s, %s, %s, 'completed', %s::jsonb, NULL, NULL, false)",
        [run_id, task, try_number, result],
    ).fetchall()
    return bool(ended)


async def find_run_id(site: Site) -> UUID:
    """Return the id that Airflow's run has here."""
    return find_mirrored_run_id(await site.store.read_installation(), DAG_ID, "run 1")


async def test_a_mirror_finishes_the_runs_that_it_has_begun_and_begins_no_others(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    async with site.mirror() as mirror:
        await mirror.look()
        looks = site.airflow.replay("run")
        next(looks)
        await mirror.look()
        await site.store.name_airflow_dags([DAG_ID])
        for _ in looks:
            pass
        site.airflow.play("run", run=2)
        with caplog.at_level(logging.WARNING):
            await mirror.look()
            await mirror.look()
        assert "the DAG 'observed' is followed no more" in caplog.text
        assert {slug: each.status for slug, each in (await site.read_steps()).items()} == ENDED
        site.airflow.play("clear")
        await mirror.look()
        await mirror.look()
        assert (await site.read_run()).status == "completed", "a clear of such a run is followed, too"
        assert len(await site.store.list_runs(workflow_slug=DAG_ID)) == 1
        await site.store.remove_airflow_dags([DAG_ID])
        next(site.airflow.replay("run", run=3))
        await mirror.look()
    begun = [each.id for each in await site.store.list_runs(workflow_slug=DAG_ID)]
    assert find_mirrored_run_id(await site.store.read_installation(), DAG_ID, "run 3") in begun


async def test_no_mirror_begins_a_run_though_it_had_seen_it_before_the_policy(site: Site) -> None:
    async with site.mirror() as mirror:
        await mirror.look()
        document: dict[str, Any] = {
            "run_id": str(await find_run_id(site)), "workflow_slug": DAG_ID, "status": "pending", "steps": [],
            "source_id": 1, "source_run_id": "run 1", "source_mark": "x", "notes": {},
        }  # fmt: skip
        await site.store.name_airflow_dags([DAG_ID])
        [taken] = await site.store.take_mirrors(mirror.mirror.holder, 60)
        with pytest.raises(RunNotPendingError, match="report their runs themselves"):
            await site.store.mirror_run(taken.epoch, document, [])


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound here"])
@pytest.mark.parametrize("task", ["broken", "left", "after_broken"])
async def test_airflow_executes_what_is_cleared_in_a_run_that_a_mirror_began(
    task: str, bound: bool, site: Site, db: Connection
) -> None:
    async with site.mirror() as mirror:
        await mirror.look()
        site.airflow.play("run")
        await mirror.look()
    run = await site.read_run()
    if bound:
        db.execute("SELECT pgflow_prefect.bind_step(%s, %s, 'python')", [DAG_ID, task])
    await site.store.name_airflow_dags([DAG_ID])
    assert ask(db, run.id, task, 2) == "airflow"
    assert ask(db, run.id, task, 2) == "airflow", "at every clear"
    assert not end(db, run.id, task, 2, '"again"'), "the mirror reports it"
    assert (await site.read_run()).status == "failed"


async def test_a_task_between_two_tries_is_airflows_in_a_run_that_a_mirror_began(site: Site, db: Connection) -> None:
    async with site.mirror() as mirror:
        await mirror.look()
        for _ in site.airflow.replay("run"):
            await mirror.look()
            flaky = (await site.read_steps()).get("flaky") if await site.store.list_runs(workflow_slug=DAG_ID) else None
            if flaky is not None and flaky.attempts == 1:
                break
    run = await site.read_run()
    await site.store.name_airflow_dags([DAG_ID])
    assert ask(db, run.id, "flaky", 2) == "airflow"


@pytest.mark.parametrize("most_together", [None, 1])
async def test_tasks_that_a_policy_does_not_see_end_here_as_in_airflow(
    site: Site, db: Connection, monkeypatch: pytest.MonkeyPatch, most_together: int | None
) -> None:
    if most_together is not None:  # then the items of a map come in several statements
        monkeypatch.setattr(airflow_runs, "_MOST_TOGETHER", most_together)
    run_id = await find_run_id(site)
    await site.store.name_airflow_dags([DAG_ID])
    async with site.mirror() as mirror:
        await mirror.look()
        assert ask(db, run_id, "extract") == "airflow"
        assert end(db, run_id, "extract", result='"as the task has said"')
        await site.store.remove_airflow_dags([DAG_ID])  # its runs go on as they began
        site.airflow.play("run")
        for _ in range(3):  # the engine starts some steps with the ends of others
            await mirror.look()
    run, steps = await site.read_run(), await site.read_steps()
    assert (run.id, run.status) == (run_id, "failed")
    assert {slug: each.status for slug, each in steps.items()} == ENDED
    assert {slug for slug, each in steps.items() if each.is_skipped} == {"right"}
    results = {slug: str(each.step_result) for slug, each in steps.items()}
    assert (results["extract"], results["double"], results["total"]) == ('"as the task has said"', "[2, 4, 6]", "12")


async def test_a_map_whose_results_are_too_much_together_ends_without_them(
    site: Site, db: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = await find_run_id(site)
    await site.store.name_airflow_dags([DAG_ID])
    async with site.mirror() as mirror:
        await mirror.look()
        assert ask(db, run_id, "extract") == "airflow"
        assert end(db, run_id, "extract", result='"as the task has said"')
        site.airflow.play("run")
        [[kind]] = site.airflow.db.execute("SELECT DISTINCT pg_typeof(value)::text FROM xcom").fetchall()
        statement = {
            "bytea": "UPDATE xcom SET value = convert_to(%s, 'UTF8') WHERE task_id = 'double'",
            "json": "UPDATE xcom SET value = %s::json WHERE task_id = 'double'",
            "jsonb": "UPDATE xcom SET value = %s::jsonb WHERE task_id = 'double'",
        }[str(kind)]
        site.airflow.db.execute(statement, [f'"{400 * "x"}"'])
        db.execute("UPDATE pgflow.limits SET result_bytes = 1000")
        for _ in range(3):
            await mirror.look()
    double = (await site.read_steps())["double"]
    assert (double.status, str(double.step_result)) == ("completed", "null")
    assert "task 'double': its result was not copied" in caplog.text


async def test_a_task_that_may_still_report_itself_and_one_that_has_moved_are_left_alone(
    site: Site, db: Connection
) -> None:
    run_id = await find_run_id(site)
    await site.store.name_airflow_dags([DAG_ID])
    db.execute("SELECT pgflow_prefect.bind_step(%s, 'total', 'python')", [DAG_ID])
    async with site.mirror() as mirror:
        await mirror.look()
        for task in ("extract", "left"):
            assert ask(db, run_id, task) == "airflow"
        site.airflow.play("run")
        site.airflow.db.execute(
            "UPDATE task_instance SET end_date = now() "
            "WHERE task_id IN ('left', 'choose', 'numbers', 'double', 'flaky')"
        )
        site.airflow.db.execute("UPDATE task_instance SET operator = 'EmptyOperator' WHERE task_id = 'flaky'")
        for _ in range(2):
            await mirror.look()
        found = {slug: each.status for slug, each in (await site.read_steps()).items() if each.status != "pending"}
        assert found.keys() == {"extract", "flaky", "right", "join", "double", "broken", "after_broken"}
        site.airflow.db.execute("UPDATE task_instance SET end_date = now() - interval '3 minutes'")
        for _ in range(2):
            await mirror.look()
    steps = await site.read_steps()
    assert {slug: each.status for slug, each in steps.items()} == {**ENDED, "total": "pending"}
    claim(db, run_id, "total")
    complete(db, run_id, "total", 13)
    assert (await site.read_run()).status == "failed", "with the failed leaf"


async def test_a_run_that_only_says_that_it_is_airflows_is_left_alone(site: Site, db: Connection) -> None:
    await site.store.name_airflow_dags([DAG_ID])
    db.execute("SELECT pgflow.run_workflow(%s, %s::jsonb)", [DAG_ID, '{"airflow_run_id": "run 1"}'])
    async with site.mirror() as mirror:
        await mirror.look()
        site.airflow.play("run")
        await mirror.look()
    assert {each.status for each in (await site.read_steps()).values()} == {"pending"}
