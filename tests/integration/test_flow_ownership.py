"""Runs that others start, take, finish or edit while a flow run executes them."""

import signal
from typing import Any
from uuid import UUID, uuid4

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from psycopg.types.json import Jsonb

from pgflow_prefect import AsyncStepContext, StepContext, Workflow
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import DatabaseUnavailableError, RunFailedError
from pgflow_prefect.prefect_api.ids import find_run_id
from tests.conftest import Connection
from tests.engine import claim, value
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_run, read_steps

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]


async def test_a_run_that_sql_started_is_executed_by_its_id(
    db: Connection, define: Define, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["first", "second"], [("first", "second")])

    @workflow.step
    def first() -> None:
        raise AssertionError("PostgreSQL has it as completed")

    @workflow.step
    def second(first: str, payload: dict[str, str]) -> str:
        return first + payload["suffix"]

    run_id = uuid4()
    payload = Jsonb({"suffix": "!", "__prefect_kind": "none of Prefect's business"})
    db.execute("SELECT pgflow.run_workflow(%s, %s, %s)", (workflow.slug, payload, run_id))
    db.execute("SELECT pgflow.complete_step(%s, 'first', %s)", (run_id, Jsonb("done")))

    assert await workflow.flow(run_id=run_id) == {"second": "done!"}
    flow_run = await read_flow_run(client, workflow.slug)
    await await_task_runs(client, flow_run, {"first": "Cached", "second": "Completed"})
    assert "none of Prefect's business" not in flow_run.model_dump_json()

    assert await workflow.flow(run_id=run_id) == {"second": "done!"}, "a completed run is only shown"
    assert read_steps(db)["second"][1] == 1


async def test_a_refused_report_says_that_another_attempt_was_claimed(
    db: Connection, define: Define, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])

    @workflow.step
    async def only(context: AsyncStepContext) -> None:
        claim(db, context.run_id, "only")  # as a worker of the user's own does

    state = await workflow.flow(return_state=True)

    assert not state.is_completed()
    shown = await await_task_runs(client, await read_flow_run(client, workflow.slug), {"only": "Superseded"})
    assert shown["only"].state is not None
    assert shown["only"].state.message == "its report was refused: another attempt of the step has been claimed since"


async def test_steps_that_were_completed_before_are_shown_in_topological_order(
    db: Connection, define: Define, client: PrefectClient, caplog: pytest.LogCaptureFixture
) -> None:
    workflow = Workflow(make_slug())
    # By alphabet, which is no topological order.
    define(workflow.slug, ["c", "b", "a", "last"], [("c", "b"), ("b", "a"), ("a", "last")])
    for step in ("a", "b", "c", "last"):
        workflow.step(step)(lambda: "done")
    run_id = uuid4()
    db.execute("SELECT pgflow.run_workflow(%s, '{}', %s)", (workflow.slug, run_id))
    for step in ("c", "b", "a"):
        db.execute("SELECT pgflow.complete_step(%s, %s, '1')", (run_id, step))

    await workflow.flow(run_id=run_id)

    flow_run = await read_flow_run(client, workflow.slug)
    shown = await await_task_runs(client, flow_run, {**dict.fromkeys("abc", "Cached"), "last": "Completed"})
    assert flow_run.start_time is not None
    moments = [flow_run.start_time]
    for step in ("c", "b", "a", "last"):
        began, ended = shown[step].start_time, shown[step].end_time
        assert began is not None
        assert ended is not None
        moments += [began, ended]
    assert moments == sorted(moments)
    assert "3 of 4 steps were completed before and are not executed again" in caplog.text


@pytest.mark.parametrize("answers", [True, False], ids=["the database answers", "the database is away"])
async def test_a_run_is_handed_back_where_prefects_signal_meets_a_step(
    answers: bool, db: Connection, define: Define, client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flow that runs in a main thread has SIGTERM raised wherever it is."""

    async def be_away(*_: object) -> None:
        raise DatabaseUnavailableError("away")

    if not answers:
        monkeypatch.setattr(Store, "release_run", be_away)
    workflow = Workflow(make_slug())
    define(workflow.slug, ["first", "other"])
    other_began = anyio.Event()

    @workflow.step
    async def first() -> None:
        await other_began.wait()
        signal.raise_signal(signal.SIGTERM)  # Prefect's handler of it raises

    @workflow.step
    async def other() -> None:
        other_began.set()
        await anyio.sleep_forever()

    heard: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(TerminationSignal):
            await workflow.flow()
    finally:
        signal.signal(signal.SIGTERM, former)
    assert heard == [signal.SIGTERM], "Prefect's engine knew it, and passed it on"
    assert read_run(db)[0] == "pending"
    released = "SELECT lease_until = '-infinity' FROM pgflow_prefect.owners"
    assert value(db, released) is answers, "the lease is over"
    assert (await read_flow_run(client, workflow.slug)).state_name == "Crashed"


async def test_a_flow_run_that_prefect_retries_reopens_its_run(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["once", "twice"], [("once", "twice")])
    calls: list[str] = []

    @workflow.step
    def once() -> None:
        calls.append("once")

    @workflow.step
    def twice(context: StepContext) -> None:
        calls.append("twice")
        if context.attempt == 1:
            raise ValueError("not yet")

    await workflow.flow.with_options(retries=1)()
    assert calls == ["once", "twice", "twice"]
    assert read_run(db)[0] == "completed"
    assert db.execute("SELECT count(*) FROM pgflow_prefect.flow_runs").fetchone() == (2,)


async def test_a_flow_run_that_lost_its_run_stops_and_leaves_it_alone(
    db: Connection, define: Define, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["work", "rest"], [("work", "rest")])

    @workflow.step
    def work() -> str:
        db.execute("SELECT pgflow.take_run(id) FROM pgflow.runs")
        return "too late"

    @workflow.step
    def rest() -> None:
        raise AssertionError("this must not run")

    await workflow.flow(return_state=True)
    assert read_run(db)[0] == "pending"
    assert read_steps(db) == {"work": ("pending", 1, None, None)}
    flow_run = await read_flow_run(client, workflow.slug)
    assert flow_run.state_name == "Superseded"
    await await_task_runs(client, flow_run, {"work": "Superseded"})


async def test_a_step_that_another_completed_meanwhile_keeps_that_result(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["race"])

    @workflow.step
    def race(context: StepContext) -> str:
        db.execute("SELECT pgflow.complete_step(%s, 'race', %s)", (context.run_id, Jsonb("theirs")))
        return "ours"

    assert await workflow.flow() == {"race": "theirs"}


async def test_a_run_that_was_cancelled_meanwhile_ends_as_cancelled_whatever_the_reason_says(
    db: Connection, define: Define, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["work", "rest"], [("work", "rest")])

    @workflow.step
    def work(context: StepContext) -> None:
        db.execute("SELECT pgflow.cancel_run(%s, 'changed our mind')", (context.run_id,))

    @workflow.step
    def rest() -> None:
        raise AssertionError("this must not run")

    state: State[Any] = await workflow.flow(return_state=True)
    assert (state.name, state.message) == ("Cancelled", "changed our mind")
    assert read_steps(db) == {"work": ("failed", 1, None, "changed our mind")}
    flow_run = await read_flow_run(client, workflow.slug)
    assert flow_run.state_name == "Cancelled"
    await await_task_runs(client, flow_run, {"work": "Cancelled"})


async def test_a_run_that_was_failed_meanwhile_ends_as_failed_whatever_the_reason_says(
    db: Connection, define: Define, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["work"])

    @workflow.step
    def work(context: StepContext) -> None:
        db.execute("SELECT pgflow.fail_run(%s, 'cancelled, says the carrier')", (context.run_id,))

    with pytest.raises(RunFailedError, match="cancelled, says the carrier"):
        await workflow.flow()
    flow_run = await read_flow_run(client, workflow.slug)
    assert flow_run.state_name == "Failed"
    await await_task_runs(client, flow_run, {"work": "Failed"})


async def test_an_edit_under_way_does_not_reach_a_run(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["first"])

    @workflow.step
    def first() -> None:
        db.execute("INSERT INTO pgflow.steps VALUES (%s, 'second')", (workflow.slug,))
        db.execute("INSERT INTO pgflow.deps VALUES (%s, 'first', 'second')", (workflow.slug,))

    await workflow.flow()
    assert read_run(db)[0] == "completed"
    assert set(read_steps(db)) == {"first"}


async def test_the_run_of_a_flow_run_has_an_id_that_a_second_try_finds_again(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])

    @workflow.step
    def only() -> None: ...

    await workflow.flow()
    row = db.execute("SELECT run_id, flow_run_id FROM pgflow_prefect.flow_runs").fetchone()
    assert row is not None
    run_id, flow_run_id = row
    assert isinstance(flow_run_id, UUID)
    assert run_id == find_run_id(flow_run_id)
