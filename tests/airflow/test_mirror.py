"""What Airflow executes, as rows here: followed look by look, with the tables of Airflow 2 and of Airflow 3."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import pytest
from pydantic import SecretStr

from pgflow_prefect.airflow.whole_runs import import_history
from pgflow_prefect.database.airflow.reader import QUERIES, AirflowDatabase, open_airflow
from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.errors import RunNotPendingError
from pgflow_prefect.models import Run, StepState
from pgflow_prefect.services.airflow_comparison import compare_with_airflow
from pgflow_prefect.services.mirror import Mirror
from pgflow_prefect.settings import Settings
from tests.airflow.recorded import VERSIONS
from tests.airflow.replay import COLUMNS, DAG_ID, INDEXES, Airflow, read_observed_dag
from tests.conftest import Connection
from tests.databases import Databases

pytestmark = pytest.mark.anyio

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
ENDED = {
    "extract": "completed",
    "flaky": "completed",
    "choose": "completed",
    "left": "completed",
    "right": "completed",
    "join": "completed",
    "numbers": "completed",
    "double": "completed",
    "total": "completed",
    "broken": "failed",
    "after_broken": "failed",
}


@dataclass
class Site:
    """Airflow's database, ours, and a mirror between them."""

    airflow: Airflow
    store: Store
    settings: Settings
    changed: list[UUID] = field(default_factory=list)

    @asynccontextmanager
    async def mirror(self) -> AsyncIterator["Looking"]:
        """Open a mirror that looks when it is told to."""
        async with open_airflow(self.airflow.dsn, timeout=60) as database:
            mirror = Mirror(self.store, self.airflow.dsn, self.settings, lambda runs, _: self.changed.extend(runs))
            yield Looking(mirror, database)

    async def read_run(self) -> Run:
        [run] = await self.store.list_runs(workflow_slug=DAG_ID)
        return run

    async def read_steps(self) -> dict[str, StepState]:
        run = await self.read_run()
        return {each.step_slug: each for each in await self.store.list_step_states(run.id)}


@dataclass
class Looking:
    """A mirror, and its connection to Airflow's database."""

    mirror: Mirror
    database: AirflowDatabase

    async def look(self) -> None:
        await self.mirror.look(self.database)


@pytest.fixture(params=VERSIONS)
def airflow(request: pytest.FixtureRequest, databases: Databases) -> Iterator[Airflow]:
    dsn = databases.make(None)
    found = Airflow(dsn, str(request.param))
    yield found
    found.close()
    databases.discard(dsn)


@pytest.fixture
async def site(airflow: Airflow, dsn: str) -> AsyncIterator[Site]:
    settings = Settings(dsn=SecretStr(dsn), airflow_poll_interval=0.1)
    async with open_store(settings, size=2) as store:
        await store.replace_definition(None, read_observed_dag(airflow.version).definition)
        await store.observe_workflow(DAG_ID)
        await store.enable_workflow(DAG_ID)
        await store.add_mirror(DAG_ID)
        yield Site(airflow, store, settings)


async def test_a_run_has_airflows_states_tries_times_results_skips_and_items(site: Site) -> None:
    async with site.mirror() as mirror:
        await mirror.look()
        for _ in site.airflow.replay("run"):
            await mirror.look()
    run, steps = await site.read_run(), await site.read_steps()
    assert (run.status, run.error_message) == ("failed", "failed in Airflow: broken")
    [began, ended] = site.airflow.db.execute("SELECT queued_at, end_date FROM dag_run").fetchone() or ()
    assert (run.created_at, run.finished_at) == (began, ended)
    assert {slug: each.status for slug, each in steps.items()} == ENDED
    assert {slug for slug, each in steps.items() if each.is_skipped} == {"right"}
    assert {slug for slug, each in steps.items() if each.is_not_run} == {"after_broken"}
    times = {
        str(task): (begin, end)
        for task, begin, end in site.airflow.db.execute("SELECT task_id, start_date, end_date FROM task_instance")
    }
    assert {slug: (each.started_at, each.finished_at) for slug, each in steps.items() if each.started_at} == {
        slug: times[slug] if slug != "double" else (steps[slug].started_at, steps[slug].finished_at)
        for slug in ENDED
        if slug not in {"right", "after_broken"}
    }
    assert (steps["flaky"].attempts, steps["broken"].attempts, steps["right"].attempts) == (2, 1, 0)
    assert steps["broken"].error_message == "try 1 of 1 failed in Airflow: its log has the error"
    results = {slug: str(each.step_result) for slug, each in steps.items() if each.step_result is not None}
    assert results["extract"] in {'{"rows": [1, 2, 3], "price": 1.5}', '{"price": 1.5, "rows": [1, 2, 3]}'}
    assert (results["double"], results["total"], results["join"]) == ("[2, 4, 6]", "12", '["a", "pair"]')
    assert (steps["double"].tasks, steps["double"].tasks_completed) == (3, 3)
    assert {each.handler for each in steps.values()} == {"airflow", None}


async def test_a_clear_reopens_the_run_until_airflow_has_executed_the_step_again(site: Site) -> None:
    async with site.mirror() as mirror:
        await mirror.look()
        site.airflow.play("run")
        await mirror.look()
        before = await site.read_run()
        seen = []
        for _ in site.airflow.replay("clear"):
            await mirror.look()
            step = (await site.read_steps())["broken"]
            seen.append(((await site.read_run()).status, step.status, step.attempts))
    run, steps = await site.read_run(), await site.read_steps()
    assert list(dict.fromkeys(seen)) == [
        ("pending", "pending", 1),
        ("pending", "pending", 2),
        ("pending", "completed", 2),
        ("completed", "completed", 2),
    ]
    assert (run.id, run.created_at, run.error_message) == (before.id, before.created_at, None)
    assert (str(steps["broken"].step_result), steps["after_broken"].attempts) == ('"repaired"', 1)
    assert steps["after_broken"].skip_reason is None
    assert run.remaining == 0


async def test_a_clear_that_no_look_saw_is_found_among_the_ended_runs(site: Site) -> None:
    async with site.mirror() as mirror:
        await mirror.look()
        site.airflow.play("run")
        await mirror.look()
        site.airflow.play("clear")
        await mirror.look()
        await mirror.look()
    assert (await site.read_run()).status == "completed"


async def test_what_happens_while_no_mirror_looks_is_written_once_and_fires_no_trigger_twice(
    site: Site, db: Connection
) -> None:
    db.execute("CREATE TABLE fired (what text)")
    db.execute(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN INSERT INTO public.fired VALUES (NEW.step_slug || ' ' || NEW.status); RETURN NEW; END $$"
    )
    db.execute("CREATE TRIGGER note AFTER UPDATE ON pgflow.step_states FOR EACH ROW EXECUTE FUNCTION note()")

    async def look_anew() -> None:
        """Look with a service of its own, as after a restart."""
        async with site.mirror() as mirror:
            await mirror.look()
            await mirror.look()
            await site.store.release_mirrors(mirror.mirror.holder)

    await look_anew()
    looks = site.airflow.replay("run")
    for _ in range(8):
        next(looks)
    await look_anew()
    await look_anew()
    for _ in looks:
        pass
    await look_anew()
    await look_anew()
    assert {slug: each.status for slug, each in (await site.read_steps()).items()} == ENDED
    fired = [str(what) for [what] in db.execute("SELECT what FROM fired WHERE what NOT LIKE '% pending'")]
    assert sorted(fired) == sorted(f"{slug} {status}" for slug, status in ENDED.items())


async def test_one_service_follows_a_dag_at_a_time_and_a_former_one_is_refused(site: Site, db: Connection) -> None:
    site.airflow.play("run")
    async with site.mirror() as first, site.mirror() as second:
        await first.look()
        await second.look()
        assert await site.store.list_runs(workflow_slug=DAG_ID) == []
        site.airflow.play("run", run=2)
        db.execute("UPDATE pgflow_prefect.mirrors SET lease_until = now()")
        await second.look()
        written = await site.read_run()
        with pytest.raises(RunNotPendingError, match="another service follows the runs"):
            await site.store.mirror_run(1, {"workflow_slug": DAG_ID, "steps": [], "run_id": str(written.id)}, [])
        await first.look()
    assert [each.id for each in await site.store.list_runs(workflow_slug=DAG_ID)] == [written.id]


async def test_no_worker_takes_a_mirrored_run_and_no_command_moves_it(site: Site, db: Connection) -> None:
    async with site.mirror() as mirror:
        await mirror.look()
        for _, _ in zip(range(10), site.airflow.replay("run"), strict=False):
            await mirror.look()
    run = await site.read_run()
    assert run.status == "pending"
    taken = "SELECT count(*) FROM pgflow_prefect.take_runs('{observed}', 10, true, 'me', 15, 3, '{}', true)"
    claimed = "SELECT count(*) FROM pgflow_prefect.take_external_steps('observed', NULL, 10)"
    assert db.execute("SELECT count(*) FROM pgflow.step_states WHERE status = 'pending'").fetchone() != (0,)
    assert (db.execute(taken).fetchone(), db.execute(claimed).fetchone()) == ((0,), (0,))
    for command in (
        site.store.cancel_run(run.id, "no"),
        site.store.reopen_run(run.id),
        site.store.repair_run(run.id),
        site.store.skip_step(run.id, "left", None),
    ):
        with pytest.raises(RunNotPendingError, match="Airflow executes it, or has executed it"):
            await command
    db.execute("UPDATE pgflow.runs SET epoch = epoch + 1")  # as pgflow.reopen_run does
    assert db.execute(taken).fetchone() == (0,)


async def test_a_run_that_airflow_deletes_while_it_goes_on_ends_as_cancelled(site: Site) -> None:
    async with site.mirror() as mirror:
        await mirror.look()
        for _, _ in zip(range(5), site.airflow.replay("run"), strict=False):
            await mirror.look()
        site.airflow.db.execute("DELETE FROM dag_run")
        await mirror.look()
    run = await site.read_run()
    assert (run.status, run.is_cancelled, run.error_message) == (
        "failed",
        True,
        "cancelled: the run was deleted in Airflow",
    )


async def test_a_look_reads_a_bounded_number_of_rows_by_the_indexes_that_airflow_has(site: Site) -> None:
    async with site.mirror() as mirror:
        await mirror.look()
        for run in (1, 2):
            site.airflow.play("run", run=run)
        make_crowd(site.airflow, 2_000)
        await mirror.look()
        async with mirror.database.snapshot():
            [second, *_] = await mirror.database.read_runs([2])
        asked: dict[str, dict[str, Any]] = {
            "list_new_runs": {"after": 1_990, "limit": 5},
            "list_active_runs": {"dag_ids": [DAG_ID], "limit": 5},
            "read_runs": {"ids": [1, 2]},
            "read_confs": {"ids": [1, 2], "most_bytes": 1000, "most_together": 1000},
            "find_runs": {"dag_ids": [DAG_ID], "run_ids": [second.run_id]},
            "read_instances": {"ids": [2], "dag_ids": [DAG_ID], "run_ids": [second.run_id], "limit": 50},
            "read_results": {
                "ids": [2],
                "task_ids": ["extract"],
                "map_indexes": [-1],
                "most_bytes": 1000,
                "most_together": 1000,
            },
            "list_ended_runs": {"dag_id": DAG_ID, "since": "2000-01-01", "before": 2**40, "limit": 5},
        }
        read = {name: count_rows(site.airflow, name, given) for name, given in asked.items()}
    assert read["list_new_runs"] <= 6
    assert read["list_active_runs"] <= 6
    assert (read["read_runs"], read["read_confs"]) == (2, 2)
    assert read["find_runs"] <= 2
    assert read["read_instances"] <= 20
    assert read["read_results"] == 1
    assert read["list_ended_runs"] <= 10

    assert site.airflow.db.execute(INDEXES).fetchone() == (site.airflow.indexes,), "none was added"


def make_crowd(airflow: Airflow, number: int) -> None:
    """Add runs of other DAGs, and their tasks, to Airflow's database."""
    for table in ("dag_run", "task_instance", "xcom"):
        names = [str(name) for [name] in airflow.db.execute(COLUMNS, [table])]
        made = {
            "id": "n" if table == "dag_run" else "gen_random_uuid()",
            "dag_run_id": "n",
            "dag_id": "'other ' || n",
            "run_id": "'run ' || n",
            "execution_date": "now() + n * interval '1 minute'",
        }
        columns = ", ".join(names)
        values = ", ".join(made.get(name, f"t.{name}") for name in names)
        airflow.db.execute(
            f"INSERT INTO {table} ({columns}) SELECT {values} FROM generate_series(3, {number}) n, "  # noqa: S608
            f"(SELECT * FROM {table} WHERE run_id = 'run 1') t".encode()
        )
    airflow.db.execute("ANALYZE")


def count_rows(airflow: Airflow, name: str, given: dict[str, Any]) -> int:
    """Return how many rows of Airflow's tables a statement reads."""
    [[found]] = airflow.db.execute(b"EXPLAIN (ANALYZE, FORMAT JSON) " + QUERIES[name].encode(), given).fetchall()
    return sum(_list_read(cast("Any", found)[0]["Plan"]))


def _list_read(plan: dict[str, Any]) -> Iterator[int]:
    if "Relation Name" in plan:
        removed = plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Index Recheck", 0)
        yield round((plan["Actual Rows"] + removed) * plan["Actual Loops"])
    for each in plan.get("Plans", []):
        yield from _list_read(each)


async def test_pickles_and_long_values_are_named_and_not_copied(site: Site, db: Connection) -> None:
    async with site.mirror() as mirror:
        await mirror.look()
        site.airflow.play("run")
        is_2 = site.airflow.version.startswith("2")
        long = f'"{"x" * 2_000_000}"'
        if is_2:
            site.airflow.db.execute("UPDATE xcom SET value = '\\x80049501' WHERE task_id = 'left'")
            site.airflow.db.execute("UPDATE xcom SET value = %s WHERE task_id = 'extract'", [long.encode()])
        else:
            site.airflow.db.execute("UPDATE xcom SET value = %s::jsonb WHERE task_id = 'extract'", [long])
        await mirror.look()
    steps = await site.read_steps()
    assert (steps["extract"].status, steps["extract"].step_result) == ("completed", None)
    [[notes]] = db.execute("SELECT notes FROM pgflow_prefect.mirrored_runs").fetchall()
    said = cast("dict[str, str]", notes)
    assert said["extract"] == "its result has more than 1,048,576 bytes: it was not copied"
    if is_2:
        assert (steps["left"].status, steps["left"].step_result) == ("completed", None)
        assert said["left"] == "its result is pickled: it was not copied"
        assert said[""] == "its conf is pickled: it was not copied"
    [[payload]] = db.execute("SELECT payload FROM pgflow.runs").fetchall()
    assert cast("dict[str, Any]", payload).get("conf") == (None if is_2 else {"table": "orders"})


@pytest.mark.parametrize("conf", ["[" * 300 + "]" * 300, "9" * 1_500], ids=["too_deep", "too_many_digits"])
async def test_a_conf_that_can_not_be_stored_is_named_and_the_run_is_written(
    conf: str, site: Site, db: Connection
) -> None:
    if site.airflow.version.startswith("2"):
        pytest.skip("its conf is pickled")
    async with site.mirror() as mirror:
        await mirror.look()
        looks = site.airflow.replay("run")
        next(looks)
        site.airflow.db.execute("UPDATE dag_run SET conf = %s::jsonb", [f'{{"it": {conf}}}'])
        await mirror.look()
        assert (await site.read_run()).status == "pending"
    [[notes, payload]] = db.execute("SELECT notes, payload FROM pgflow_prefect.mirrored_runs, pgflow.runs").fetchall()
    assert "conf" not in cast("dict[str, Any]", payload)
    assert "its conf" in cast("dict[str, str]", notes)[""]


async def test_past_runs_are_rows_with_airflows_times_and_are_never_executed(site: Site, db: Connection) -> None:
    for run in (1, 2):
        site.airflow.play("run", run=run)
    site.airflow.db.execute(
        "UPDATE task_instance SET task_id = 'was_here' WHERE task_id = 'right' AND run_id = 'run 2'"
    )
    async with open_airflow(site.airflow.dsn, timeout=60) as database:
        history = await import_history(site.store, database, DAG_ID, LONG_AGO)
        again = await import_history(site.store, database, DAG_ID, LONG_AGO)
        nothing = await import_history(site.store, database, DAG_ID, datetime(2100, 1, 1, tzinfo=UTC))
    assert (history.runs, history.written, again.runs, again.written, nothing.runs) == (2, 2, 2, 0, 0)
    assert [line.text for line in history.make_lines()] == [
        "**past task**: `was_here` is in past runs, and not in the present DAG. Those runs are here without it."
    ]
    runs = await site.store.list_runs(workflow_slug=DAG_ID)
    ends = site.airflow.db.execute("SELECT end_date FROM dag_run").fetchall()
    assert sorted(str(each.finished_at) for each in runs) == sorted(str(end) for [end] in ends)
    assert (
        await site.store.list_unshown([DAG_ID], adopt=True, with_ended=True, since=None, besides=[], limit=10) == []
    ), "Prefect is told on request only"
    assert len(await site.store.read_unrecorded([run.id for run in runs])) == 2
    taken = "SELECT count(*) FROM pgflow_prefect.take_runs('{observed}', 10, true, 'me', 15, 3, '{}', true)"
    with pytest.raises(RunNotPendingError, match="retry --force"):
        await site.store.reopen_run(runs[0].id)
    db.execute("SELECT pgflow.reopen_run(%s)", [runs[1].id])
    assert db.execute(taken).fetchone() == (0,)
    assert not await site.store.execute_mirrored_run(runs[1].id), "it goes on, perhaps in Airflow"
    items = "SELECT array_agg(item ORDER BY item_index) FROM pgflow.step_items WHERE run_id = %s"
    assert db.execute(items, [runs[0].id]).fetchone() == ([1, 2, 3],), "what the map was over"
    assert await site.store.execute_mirrored_run(runs[0].id)
    await site.store.reopen_run(runs[0].id)
    assert db.execute(taken).fetchone() == (1,)
    async with site.mirror() as mirror:
        await mirror.look()
        await mirror.look()
    assert (await site.store.read_run(runs[0].id)).status == "pending", "the mirror leaves it alone"


async def test_prune_keeps_a_past_run_until_it_is_as_old_in_this_database(site: Site, db: Connection) -> None:
    site.airflow.play("run")
    async with open_airflow(site.airflow.dsn, timeout=60) as database:
        await import_history(site.store, database, DAG_ID, LONG_AGO)
    db.execute("UPDATE pgflow.runs SET finished_at = now() - interval '90 days'")
    assert db.execute("SELECT pgflow_prefect.prune_runs('30 days')").fetchone() == (0,)
    counted = "SELECT sum(runs) FROM pgflow_prefect.count_prunable('30 days', '1 day', NULL, NULL)"
    assert db.execute(counted).fetchone() == (None,)
    db.execute("UPDATE pgflow_prefect.mirrored_runs SET mirrored_at = now() - interval '31 days'")
    assert db.execute("SELECT pgflow_prefect.prune_runs('30 days')").fetchone() == (1,)


async def test_reconcile_names_what_is_not_as_in_airflow_and_repairs_it(site: Site, db: Connection) -> None:
    settings = site.settings.model_copy(update={"airflow_dsn": SecretStr(site.airflow.dsn)})
    async with site.mirror() as mirror:
        await mirror.look()
        site.airflow.play("run")
        await mirror.look()
    assert await compare_with_airflow(site.store, settings, apply=False, everything=True) == []
    db.execute("UPDATE pgflow.step_states SET status = 'failed', step_result = NULL WHERE step_slug = 'left'")
    db.execute("UPDATE pgflow.runs SET status = 'completed'")
    site.airflow.play("clear")
    found = await compare_with_airflow(site.store, settings, apply=False, everything=False)
    assert [each.kind for each in found] == ["unlike_airflow"]
    assert "step 'broken' is failed after 1 tries, and completed in Airflow" in found[0].found
    repaired = await compare_with_airflow(site.store, settings, apply=True, everything=True)
    assert [each.repaired for each in repaired] == [True]
    assert await compare_with_airflow(site.store, settings, apply=False, everything=True) == []
    steps = await site.read_steps()
    assert (steps["left"].status, str(steps["left"].step_result)) == ("completed", '"left"')


async def test_a_run_that_no_mirror_has_written_is_named(site: Site) -> None:
    settings = site.settings.model_copy(update={"airflow_dsn": SecretStr(site.airflow.dsn)})
    next(site.airflow.replay("run"))
    [found] = await compare_with_airflow(site.store, settings, apply=False, everything=False)
    assert found.found == "Airflow's run 'run 1' goes on, and has no rows here"
    [repaired] = await compare_with_airflow(site.store, settings, apply=True, everything=False)
    assert (repaired.repaired, (await site.read_run()).status) == (True, "pending")
