"""Handlers that run beside an external worker: compared, reported, and without any effect."""

from typing import Any, LiteralString

import anyio
import pytest
from prefect.client.orchestration import PrefectClient

from pgflow_prefect import AsyncStepContext, StepContext, Workflow
from pgflow_prefect.bindings import External
from pgflow_prefect.database.store import Store
from tests.conftest import Connection
from tests.engine import cancel, complete, fail, finish, get_state, value
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_steps
from tests.integration.waiting import WAITING, await_value, going

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

REPORTS: LiteralString = "SELECT count(*) FROM pgflow_prefect.shadow_reports"


@pytest.fixture
def workflow(define: Define) -> Workflow:
    """A workflow of one step that an external worker does, and that a shadow may be compared with."""
    made = Workflow(make_slug())
    define(made.slug, ["only"])
    made.bind("only", External(shadow=True))
    return made


def read_report(db: Connection) -> tuple[Any, ...]:
    [row] = db.execute("SELECT outcome, details, seconds FROM pgflow_prefect.shadow_reports").fetchall()
    return row


async def run(workflow: Workflow, db: Connection, result: object, payload: object = None) -> None:
    """Run the workflow; an external worker completes its step."""
    async with going(workflow, db, payload) as under_way:
        await await_value(db, 1, WAITING)
        complete(db, under_way.run_id, "only", result)
    assert under_way.ended.is_completed()


async def test_a_shadow_with_the_same_result_is_reported_as_the_same(
    workflow: Workflow, db: Connection, client: PrefectClient
) -> None:
    seen: list[tuple[bool, int]] = []

    @workflow.step("only", shadow=True)
    def only(payload: dict[str, int], context: StepContext) -> dict[str, float]:
        seen.append((context.shadow, context.attempt))
        return {"n": payload["n"] * 2.0}

    await run(workflow, db, {"n": 42}, {"n": 21})
    assert seen == [(True, 0)]
    outcome, details, seconds = read_report(db)
    assert (outcome, details) == ("same", [])
    assert 0 < seconds < 30
    assert read_steps(db)["only"] == ("completed", 0, {"n": 42}, None), "it counts as no attempt"
    shown = await await_task_runs(client, await read_flow_run(client, workflow.slug), {"only": "Completed"})
    assert shown["only"].state is not None
    assert shown["only"].state.message == 'completed outside Prefect: {"n": 42} (shadow: same)'


async def test_differing_results_are_reported_by_their_places_without_values(
    workflow: Workflow, db: Connection
) -> None:
    @workflow.step("only", shadow=True)
    async def only() -> dict[str, Any]:
        return {"to": ["ours"], "n": "ours", "more": True}

    await run(workflow, db, {"to": ["theirs"], "n": 1})
    outcome, details, _ = read_report(db)
    assert outcome == "different"
    assert details == [
        "$.more: in the shadow's result only",
        "$.n: string instead of number",
        "$.to[0]: another string",
    ]
    assert get_state(db, value(db, "SELECT id FROM pgflow.runs"), "only").step_result == {"to": ["theirs"], "n": 1}  # type: ignore[arg-type]
    everything = value(
        db, "SELECT string_agg(t::text, '') FROM (SELECT s::text AS t FROM pgflow.step_states s "
            "UNION ALL SELECT r::text FROM pgflow_prefect.shadow_reports r) rows"
    )  # fmt: skip
    assert "ours" not in str(everything)


async def test_a_shadow_gets_the_input_of_the_step(define: Define, db: Connection) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["a", "b", "c"], [("a", "c"), ("b", "c")])
    workflow.bind("c", External(shadow=True))

    @workflow.step
    def a() -> int:
        return 1

    @workflow.step
    def b() -> int:
        return 2

    @workflow.step(shadow=True)
    def c(b: int, payload: int) -> int:
        return b + payload

    async with going(workflow, db, 40) as under_way:
        await await_value(db, 1, WAITING)
        complete(db, under_way.run_id, "c", 42)
    assert read_report(db)[:2] == ("same", [])


async def test_a_shadow_that_raises_is_reported_and_harms_nothing(workflow: Workflow, db: Connection) -> None:
    @workflow.step("only", shadow=True, retries=3)
    def only() -> None:
        raise ValueError("not here \0")

    await run(workflow, db, 1)
    assert read_report(db)[:2] == ("failed", ["ValueError: not here \\0"])
    assert read_steps(db)["only"] == ("completed", 0, 1, None)


async def test_a_shadow_whose_input_does_not_fit_is_reported(workflow: Workflow, db: Connection) -> None:
    @workflow.step("only", shadow=True)
    def only(payload: int) -> int:
        return payload

    await run(workflow, db, 1, "text")
    assert read_report(db)[0] == "failed"


async def test_a_shadow_that_takes_too_long_is_reported(workflow: Workflow, db: Connection) -> None:
    @workflow.step("only", shadow=True, timeout_seconds=0.2)
    async def only() -> None:
        await anyio.sleep_forever()

    await run(workflow, db, 1)
    assert read_report(db)[:2] == ("failed", ["step 'only' took longer than 0.2 s"])


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_what_a_shadow_writes_through_its_connection_is_rolled_back(
    workflow: Workflow, db: Connection, kind: str
) -> None:
    db.execute("CREATE TABLE written (note text)")
    if kind == "sync":

        @workflow.step("only", shadow=True)
        def only(context: StepContext) -> int:
            context.connection.execute("INSERT INTO written VALUES ('never')")
            return 1

    else:

        @workflow.step("only", shadow=True)
        async def only_async(context: AsyncStepContext) -> int:
            await context.connection.execute("INSERT INTO written VALUES ('never')")
            return 1

    await run(workflow, db, 1)
    assert read_report(db)[:2] == ("same", [])
    assert value(db, "SELECT count(*) FROM written") == 0


@pytest.mark.parametrize("how", ["the handler does not say that it may", "the row does not say so"])
async def test_nothing_runs_beside_unless_both_say_so(define: Define, db: Connection, how: str) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    workflow.bind("only", External(shadow=how.startswith("the handler")))

    @workflow.step("only", shadow=not how.startswith("the handler"))
    def only() -> None:
        raise AssertionError("it was not asked for")

    await run(workflow, db, 1)
    assert value(db, REPORTS) == 0


async def test_a_row_turns_the_shadow_on(define: Define, db: Connection) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])

    @workflow.step(shadow=True)
    def only() -> int:
        return 1

    db.execute("SELECT pgflow_prefect.bind_step(%s, 'only', 'external', NULL, '{\"shadow\": true}')", [workflow.slug])
    await run(workflow, db, 1)
    assert read_report(db)[0] == "same"


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_with_nothing_to_compare_with_there_is_no_report(workflow: Workflow, db: Connection, end: str) -> None:
    @workflow.step("only", shadow=True)
    def only() -> int:
        return 1

    async with going(workflow, db) as under_way:
        await await_value(db, 1, WAITING)
        if end == "failed":
            fail(db, under_way.run_id, "only")
        else:
            cancel(db, under_way.run_id)
    assert value(db, REPORTS) == 0


async def test_reports_are_counted_by_step_with_the_latest_difference(
    workflow: Workflow, db: Connection, store: Store
) -> None:
    @workflow.step("only", shadow=True)
    def only(payload: int) -> int:
        return payload

    for number, theirs in enumerate([0, 1, 7, "x"]):
        async with going(workflow, db, number) as under_way:
            await await_value(db, 1, WAITING)
            db.execute("SELECT pgflow.complete_step(%s, 'only', to_jsonb(%s::text::json))",
                       [under_way.run_id, f'"{theirs}"' if theirs == "x" else str(theirs)])  # fmt: skip
    [found] = await store.list_shadows(workflow.slug)
    assert (found.step_slug, found.same, found.different, found.failed) == ("only", 2, 2, 0)
    assert found.details == ["$: number instead of string"]
    assert await store.list_shadows("another") == []


async def test_a_report_of_a_run_is_replaced_by_its_next_one(workflow: Workflow, db: Connection) -> None:
    @workflow.step("only", shadow=True)
    def only() -> int:
        return 1

    async with going(workflow, db) as under_way:
        await await_value(db, 1, WAITING)
        finish(db, under_way.run_id)
    db.execute("SELECT pgflow_prefect.report_shadow(%s, 'only', 'same', '{}', 0.5)", [under_way.run_id])
    assert read_report(db) == ("same", [], 0.5)
