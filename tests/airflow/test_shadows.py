"""Handlers beside tasks that Airflow executes: compared with what the mirror has copied, and without any effect."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from pgflow_prefect import StepContext, Workflow
from pgflow_prefect.database.store import Store
from pgflow_prefect.execution.process.host import open_host
from pgflow_prefect.services.airflow_shadows import AirflowShadows
from tests.airflow.replay import DAG_ID
from tests.airflow.test_mirror import Site, airflow, site
from tests.conftest import Connection

pytestmark = [pytest.mark.anyio, pytest.mark.thorough]

__all__ = ["airflow", "site"]  # fixtures

REPORTS = "SELECT step_slug, outcome, details FROM pgflow_prefect.shadow_reports ORDER BY step_slug"
ROWS = """
    SELECT string_agg(t, ' ' ORDER BY t) FROM (
        SELECT s::text AS t FROM pgflow.step_states s UNION ALL SELECT r::text FROM pgflow.runs r
        UNION ALL SELECT t::text FROM pgflow_prefect.task_runs t UNION ALL SELECT o::text FROM pgflow_prefect.owners o
    ) AS rows
"""


def read_reports(db: Connection) -> dict[str, tuple[str, list[str]]]:
    return {str(slug): (str(outcome), details) for slug, outcome, details in db.execute(REPORTS)}  # type: ignore[misc]


async def give_shadows(store: Store, db: Connection, *steps: str) -> None:
    """Say by rows that these steps have a shadow, since a time before Airflow's runs."""
    for step in steps:
        await store.bind_step(DAG_ID, step, "external", options={"shadow": True})
    db.execute("UPDATE pgflow_prefect.binding_changes SET changed_at = now() - interval '1 day'")


def age(db: Connection) -> None:
    """Let what the mirror has written be so old that no shadow waits for Prefect to show the run."""
    db.execute("UPDATE pgflow_prefect.task_runs SET updated_at = updated_at - interval '2 minutes'")


@asynccontextmanager
async def open_shadows(site: Site, workflow: Workflow) -> AsyncIterator[AirflowShadows]:
    async with open_host(site.settings) as host, get_client() as client:
        yield AirflowShadows(host, client, {DAG_ID: workflow})


async def mirror_all(site: Site) -> None:
    async with site.mirror() as mirror:
        await mirror.look()
        site.airflow.play("run")
        await mirror.look()
        await site.store.release_mirrors(mirror.mirror.holder)


@pytest.fixture(autouse=True)
def no_server() -> Iterator[None]:
    """Nothing here asks Prefect: it does not show the runs."""
    with temporary_settings({PREFECT_API_URL: "http://localhost:1/api", PREFECT_LOGGING_TO_API_ENABLED: False}):
        yield


async def test_a_handler_gets_airflows_input_and_is_compared_with_airflows_result(site: Site, db: Connection) -> None:
    workflow = Workflow(DAG_ID)
    seen: list[tuple[Any, ...]] = []

    @workflow.step(shadow=True)
    def extract(payload: dict[str, Any], context: StepContext) -> dict[str, Any]:
        get_run_logger().info("as in any handler")
        seen.append((context.shadow, context.attempt, payload["airflow_run_id"]))
        return {"rows": [1, 2, 3], "price": 1.5}

    @workflow.step(shadow=True)
    async def numbers() -> list[str]:
        return ["another"]

    @workflow.step(shadow=True)
    def total(double: list[int]) -> float:
        return sum(double) + 0.0

    @workflow.step
    def left() -> str:
        raise AssertionError("it does not allow a shadow")

    @workflow.step(shadow=True)
    def right() -> None:
        raise AssertionError("Airflow has skipped it")

    await give_shadows(site.store, db, "extract", "numbers", "total", "left", "right", "double")
    await mirror_all(site)
    age(db)
    before = db.execute(ROWS).fetchone()
    async with open_shadows(site, workflow) as shadows:
        assert await shadows.look() == 3
        assert await shadows.look() == 0, "each is compared once"
    assert seen == [(True, 1, "run 1")]
    reports = read_reports(db)
    assert (reports["extract"], reports["total"]) == (("same", []), ("same", []))
    assert reports["numbers"][0] == "different"
    assert [each.partition(":")[0] for each in reports["numbers"][1]] == ["$[0]", "$"]
    assert db.execute(ROWS).fetchone() == before, "a shadow writes nothing of the run"
    found = {each.step_slug: (each.same, each.different, each.failed) for each in await site.store.list_shadows(DAG_ID)}
    assert found == {"extract": (1, 0, 0), "total": (1, 0, 0), "numbers": (0, 1, 0)}


async def test_a_handler_that_fails_is_reported_and_what_it_writes_is_rolled_back(site: Site, db: Connection) -> None:
    workflow = Workflow(DAG_ID)
    db.execute("CREATE TABLE written (n int)")

    @workflow.step(shadow=True)
    def extract(context: StepContext) -> None:
        context.connection.execute("INSERT INTO written VALUES (1)")
        raise ValueError("not here")

    @workflow.step(shadow=True)
    def left(context: StepContext) -> str:
        context.connection.execute("INSERT INTO written VALUES (2)")
        return "left"

    await give_shadows(site.store, db, "extract", "left")
    await mirror_all(site)
    age(db)
    async with open_shadows(site, workflow) as shadows:
        await shadows.look()
    assert read_reports(db) == {"extract": ("failed", ["ValueError: not here"]), "left": ("same", [])}
    assert db.execute("SELECT count(*) FROM written").fetchone() == (0,)


async def test_results_of_airflow_that_can_not_be_read_are_named_and_nothing_is_executed(
    site: Site, db: Connection
) -> None:
    workflow = Workflow(DAG_ID)

    def refuse() -> None:
        raise AssertionError("there is nothing to compare with")

    workflow.step("extract", shadow=True)(refuse)

    @workflow.step(shadow=True)
    def total(double: list[int]) -> int:
        return sum(double)

    @workflow.step("join", shadow=True)
    def join(upstream: dict[str, Any]) -> None:
        raise AssertionError("its input is not Airflow's")

    long = f'"{"x" * 2_000_000}"'
    await give_shadows(site.store, db, "extract", "total", "join")
    async with site.mirror() as mirror:
        await mirror.look()
        site.airflow.play("run")
        value: Any = long if site.airflow.version.startswith("3") else long.encode()
        cast_to = "::jsonb" if site.airflow.version.startswith("3") else ""
        site.airflow.db.execute(
            f"UPDATE xcom SET value = %s{cast_to} WHERE task_id IN ('extract', 'left')".encode(),  # noqa: S608
            [value],
        )
        await mirror.look()
    age(db)
    async with open_shadows(site, workflow) as shadows:
        await shadows.look()
    reports = read_reports(db)
    too_long = "its result has more than 1,048,576 bytes: it was not copied"
    said = "not compared, because Airflow's results are not here: step"
    assert reports["extract"] == ("failed", [f"{said} 'extract': {too_long}"])
    assert reports["join"] == ("failed", [f"{said} 'left': {too_long}"])
    assert reports["total"] == ("same", [])


async def test_without_copied_results_a_shadow_says_which_setting_it_needs(site: Site, db: Connection) -> None:
    workflow = Workflow(DAG_ID)

    @workflow.step(shadow=True)
    def extract() -> None:
        raise AssertionError("there is nothing to compare with")

    site.settings = site.settings.model_copy(update={"airflow_results": False})
    await give_shadows(site.store, db, "extract")
    await mirror_all(site)
    age(db)
    async with open_shadows(site, workflow) as shadows:
        await shadows.look()
    [(outcome, details)] = read_reports(db).values()
    assert (outcome, "PGFLOW_AIRFLOW_RESULTS is false" in details[0]) == ("failed", True)


async def test_a_task_that_airflow_executes_again_is_compared_again(site: Site, db: Connection) -> None:
    workflow = Workflow(DAG_ID)
    tries: list[int] = []

    @workflow.step(shadow=True)
    def broken(context: StepContext) -> str:
        tries.append(context.attempt)
        return "repaired"

    await give_shadows(site.store, db, "broken")
    await mirror_all(site)
    age(db)
    async with open_shadows(site, workflow) as shadows:
        assert await shadows.look() == 0, "it has failed in Airflow: there is nothing to compare with"
        site.airflow.play("clear")
        async with site.mirror() as mirror:
            await mirror.look()
            await mirror.look()
        age(db)
        assert await shadows.look() == 1
        assert tries == [2]
        db.execute("UPDATE pgflow_prefect.shadow_reports SET reported_at = reported_at - interval '1 hour'")
        assert await shadows.look() == 1, "the rows of the step are newer than its report"
    assert read_reports(db) == {"broken": ("same", [])}


async def test_two_workers_do_not_execute_the_same_shadow_and_a_stopped_one_gives_it_back(
    site: Site, db: Connection
) -> None:
    await give_shadows(site.store, db, "extract")
    await mirror_all(site)
    age(db)
    run = await site.read_run()
    begun = await site.store.begin_airflow_shadow(run.id, "extract", [])
    assert begun is not None
    assert await site.store.begin_airflow_shadow(run.id, "extract", []) is None
    [(outcome, [note])] = read_reports(db).values()
    assert (outcome, note) == ("failed", "it goes on, or its process has ended")
    assert await site.store.list_airflow_shadows([(DAG_ID, "extract")], limit=10) == []
    await site.store.release_airflow_shadow(run.id, "extract")
    assert len(await site.store.list_airflow_shadows([(DAG_ID, "extract")], limit=10)) == 1


@pytest.mark.parametrize(
    "left_out",
    [
        lambda db: db.execute("UPDATE pgflow_prefect.mirrored_runs SET imported = true"),
        lambda db: db.execute("UPDATE pgflow_prefect.mirrored_runs SET executed_here = true"),
        lambda db: db.execute("UPDATE pgflow_prefect.binding_changes SET changed_at = now()"),
        lambda db: db.execute("UPDATE pgflow_prefect.bindings SET options = '{}'"),
        lambda db: db.execute("UPDATE pgflow_prefect.task_runs SET handler = 'python'"),
    ],
    ids=["imported", "executed here", "before the row", "no shadow", "moved"],
)
async def test_no_shadow_runs_for_what_airflow_does_not_execute_now(
    left_out: Callable[[Connection], object], site: Site, db: Connection
) -> None:
    if site.airflow.version.startswith("2"):
        pytest.skip("once is enough")
    await give_shadows(site.store, db, "extract")
    await mirror_all(site)
    age(db)
    assert len(await site.store.list_airflow_shadows([(DAG_ID, "extract")], limit=10)) == 1
    left_out(db)
    assert await site.store.list_airflow_shadows([(DAG_ID, "extract")], limit=10) == []


async def test_no_error_of_a_comparison_ends_its_worker(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workflow = Workflow(DAG_ID)

    @workflow.step(shadow=True)
    def extract() -> None:
        pass

    looks: list[int] = []
    async with open_shadows(site, workflow) as shadows:

        async def look() -> int:
            looks.append(1)
            if len(looks) > 1:
                shadows.host.draining.set()
            raise ValueError("no error of ours")

        monkeypatch.setattr(shadows, "look", look)
        with anyio.fail_after(180):
            await shadows.run()
    assert len(looks) == 2, "it has tried again"
    assert "a comparison with Airflow is made later: no error of ours" in caplog.text
