"""A run of a workflow as a run of a Prefect flow: what executes when, and what both sides show of it."""

import datetime as dt
from typing import Any
from uuid import UUID, uuid4

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from psycopg.types.json import Jsonb
from pydantic import BaseModel

from pgflow_prefect import StepContext, Workflow
from tests.conftest import Connection
from tests.integration.conftest import Define, await_task_runs, read_edges, read_flow_run

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

DIAMOND = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]


def make_slug() -> str:
    """One Prefect server serves all tests: a slug of its own keeps a test's flow runs apart."""
    return f"workflow-{uuid4().hex[:8]}"


def read_steps(db: Connection) -> dict[str, tuple[Any, ...]]:
    rows: Any = db.execute("SELECT step_slug, status, attempts, step_result, error_message FROM pgflow.step_states")
    return {row[0]: row[1:] for row in rows}


def read_run(db: Connection) -> tuple[Any, ...]:
    row = db.execute("SELECT status, error_message, id FROM pgflow.runs").fetchone()
    assert row is not None
    return row


async def test_a_diamond_runs_and_prefect_shows_its_edges(
    db: Connection, define: Define, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, "abcd", DIAMOND)

    @workflow.step
    def a(payload: dict[str, int]) -> int:
        return payload["n"]

    @workflow.step
    async def b(a: int) -> int:
        return a + 1

    @workflow.step
    async def c(a: int) -> int:
        return a * 10

    @workflow.step("d")
    def join(b: int, c: int, upstream: dict[str, int], context: StepContext) -> dict[str, Any]:
        return {"sum": b + c, "upstream": upstream, "key": context.idempotency_key}

    result = await workflow.flow(payload={"n": 5})

    run_id = read_run(db)[2]
    assert result == {"d": {"sum": 56, "upstream": {"b": 6, "c": 50}, "key": f"{run_id}/d"}}
    assert read_run(db)[0] == "completed"
    assert {slug: state[:3] for slug, state in read_steps(db).items()} == {
        "a": ("completed", 1, 5),
        "b": ("completed", 1, 6),
        "c": ("completed", 1, 50),
        "d": ("completed", 1, result["d"]),
    }
    flow_run = await read_flow_run(client, workflow.slug)
    assert flow_run.state_name == "Completed"
    task_runs = await await_task_runs(client, flow_run, dict.fromkeys("abcd", "Completed"))
    assert await read_edges(client, flow_run) == set(DIAMOND)
    links = db.execute("SELECT run_id, flow_run_id, epoch FROM pgflow_prefect.flow_runs").fetchall()
    assert links == [(run_id, flow_run.id, 1)]
    noted: Any = db.execute("SELECT step_slug, task_run_id, state_name FROM pgflow_prefect.task_runs").fetchall()
    assert {row[0]: row[1:] for row in noted} == {slug: (run.id, "Completed") for slug, run in task_runs.items()}


async def test_a_step_starts_when_its_own_upstream_is_done_and_not_its_layer(define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["slow", "quick", "after_quick"], [("quick", "after_quick")])
    done = anyio.Event()

    @workflow.step
    async def slow() -> None:
        await done.wait()  # never, if the next layer waited for this one

    @workflow.step
    async def quick() -> None: ...

    @workflow.step
    async def after_quick() -> None:
        done.set()

    with anyio.fail_after(30):
        await workflow.flow()


async def test_sync_handlers_run_at_the_same_time(define: Define) -> None:
    from threading import Barrier  # noqa: PLC0415

    workflow = Workflow(make_slug())
    define(workflow.slug, ["left", "right"])
    together = Barrier(2, timeout=30)

    @workflow.step
    def left() -> None:
        together.wait()

    @workflow.step
    def right() -> None:
        together.wait()

    await workflow.flow()


async def test_after_a_failure_downstream_never_starts_and_both_sides_say_why(
    db: Connection, define: Define, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["before", "broken", "after"], [("before", "broken"), ("broken", "after")])

    @workflow.step
    async def before() -> None: ...

    @workflow.step
    async def broken() -> None:
        raise ValueError("no such customer")

    @workflow.step
    async def after() -> None:
        raise AssertionError("this must not run")

    with pytest.raises(Exception, match="no such customer"):
        await workflow.flow()

    status, message, _ = read_run(db)
    assert (status, message) == ("failed", 'step "broken" failed: ValueError: no such customer')
    steps = read_steps(db)
    assert steps["broken"] == ("failed", 1, None, "ValueError: no such customer")
    assert "after" not in steps
    flow_run = await read_flow_run(client, workflow.slug)
    assert flow_run.state is not None
    assert flow_run.state.is_failed()
    assert message in str(flow_run.state.message)
    await await_task_runs(client, flow_run, {"before": "Completed", "broken": "Failed"})


async def test_a_failed_attempt_is_tried_again_and_counted(
    db: Connection, define: Define, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["shaky", "hopeless"], [("shaky", "hopeless")])
    seen = []

    @workflow.step(retries=2, retry_delay_seconds=0.1)
    async def shaky(context: StepContext) -> int:
        noted = db.execute("SELECT state_name, message FROM pgflow_prefect.task_runs WHERE step_slug = 'shaky'")
        seen.append(noted.fetchone())
        if context.attempt < 3:
            raise ConnectionError(f"attempt {context.attempt}")
        return context.attempt

    @workflow.step(retries=1)
    def hopeless() -> None:
        raise ValueError("always")

    with pytest.raises(Exception, match="always"):
        await workflow.flow()

    steps = read_steps(db)
    assert steps["shaky"] == ("completed", 3, 3, None)
    assert steps["hopeless"] == ("failed", 2, None, "ValueError: always")
    assert seen[-1] == ("Running", "ConnectionError: attempt 2")
    flow_run = await read_flow_run(client, workflow.slug)
    shown = await await_task_runs(client, flow_run, {"shaky": "Completed", "hopeless": "Failed"})
    assert shown["shaky"].run_count == 3


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_handler_that_takes_too_long_fails_its_step(
    db: Connection, define: Define, client: PrefectClient, kind: str
) -> None:
    from threading import Event  # noqa: PLC0415

    workflow = Workflow(make_slug())
    define(workflow.slug, ["endless"])
    end = Event()
    if kind == "sync":

        @workflow.step("endless", timeout_seconds=0.2)
        def wait() -> None:
            end.wait(60)
    else:

        @workflow.step("endless", timeout_seconds=0.2)
        async def sleep() -> None:
            await anyio.sleep_forever()

    with pytest.raises(Exception, match=r"longer than 0\.2 s"):
        await workflow.flow()
    end.set()

    assert read_steps(db)["endless"][0] == "failed"
    flow_run = await read_flow_run(client, workflow.slug)
    await await_task_runs(client, flow_run, {"endless": "TimedOut"})


class Order(BaseModel):
    number: int
    day: dt.date


async def test_a_step_sees_what_its_upstream_returned_through_its_annotations(define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["make", "take"], [("make", "take")])
    taken: list[Order] = []

    @workflow.step
    def make() -> Order:
        return Order(number=7, day=dt.date(2026, 2, 28))

    @workflow.step
    def take(make: Order) -> None:
        taken.append(make)

    await workflow.flow()
    assert taken == [Order(number=7, day=dt.date(2026, 2, 28))]


async def test_a_value_that_does_not_fit_fails_the_step_at_once_and_names_it(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["count"])
    calls = []

    @workflow.step(retries=5)
    def count(payload: dict[str, int]) -> int:
        calls.append(payload)
        return len(payload)

    with pytest.raises(Exception, match="argument 'payload'"):
        await workflow.flow(payload={"n": "many"})
    assert calls == []
    status, attempts, _, message = read_steps(db)["count"]
    assert (status, attempts) == ("failed", 1)
    assert message.startswith("step 'count': argument 'payload' does not fit its annotation: n: ")


@pytest.mark.parametrize("value", [float("nan"), "a\0b", "\ud800", object()], ids=["nan", "nul", "surrogate", "object"])
async def test_a_result_that_jsonb_can_not_hold_fails_the_step(db: Connection, define: Define, value: object) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["produce"])

    @workflow.step(retries=3)
    def produce() -> Any:
        return value

    with pytest.raises(Exception, match="step 'produce'"):
        await workflow.flow()
    assert read_run(db)[0] == "failed"
    assert read_steps(db)["produce"][:2] == ("failed", 1)


async def test_a_result_over_the_limit_fails_the_step(
    db: Connection, define: Define, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_RESULT_LIMIT", "1000")
    workflow = Workflow(make_slug())
    define(workflow.slug, ["produce"])

    @workflow.step
    def produce() -> str:
        return "x" * 1000

    with pytest.raises(Exception, match="limit of 1,000"):
        await workflow.flow()
    assert read_run(db)[0] == "failed"


async def test_null_from_sql_and_null_in_json_are_both_none(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["sql_null", "json_null", "join"], [("sql_null", "join"), ("json_null", "join")])
    seen: list[object] = []
    for slug in ("sql_null", "json_null"):

        @workflow.step(slug)
        def never() -> None:
            raise AssertionError("somebody else has completed it")

    @workflow.step
    def join(sql_null: object, json_null: object, payload: object) -> None:
        seen.extend([sql_null, json_null, payload])

    run_id = uuid4()
    db.execute("SELECT pgflow.run_workflow(%s, 'null', %s)", (workflow.slug, run_id))
    db.execute("SELECT pgflow.complete_step(%s, 'sql_null', NULL)", (run_id,))
    db.execute("SELECT pgflow.complete_step(%s, 'json_null', 'null')", (run_id,))
    await workflow.flow(run_id=run_id)
    assert seen == [None, None, None]


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


async def test_a_step_that_somebody_else_completed_meanwhile_keeps_that_result(
    db: Connection, define: Define
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["race"])

    @workflow.step
    def race(context: StepContext) -> str:
        db.execute("SELECT pgflow.complete_step(%s, 'race', %s)", (context.run_id, Jsonb("theirs")))
        return "ours"

    assert await workflow.flow() == {"race": "theirs"}


async def test_a_run_that_was_cancelled_meanwhile_ends_as_failed(
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

    with pytest.raises(Exception, match="changed our mind"):
        await workflow.flow()
    assert read_steps(db) == {"work": ("failed", 1, None, "changed our mind")}
    flow_run = await read_flow_run(client, workflow.slug)
    await await_task_runs(client, flow_run, {"work": "Cancelled"})


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


async def test_handlers_that_do_not_fit_fail_the_run_and_say_so(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["there", "missing"])

    @workflow.step
    def there() -> None:
        raise AssertionError("this must not run")

    with pytest.raises(Exception, match="step 'missing' has no handler"):
        await workflow.flow()
    status, message, _ = read_run(db)
    assert status == "failed"
    assert "step 'missing' has no handler" in message


async def test_the_run_of_a_flow_run_has_an_id_that_a_second_try_finds_again(db: Connection, define: Define) -> None:
    from pgflow_prefect.execution.flow import find_run_id  # noqa: PLC0415

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
