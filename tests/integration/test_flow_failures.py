"""Handlers that raise, take too long or are missing: what both sides say of it."""

from threading import Event
from typing import Any

import anyio
import pytest
from prefect import Task
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State, TaskRun

from pgflow_prefect import AsyncStepContext, NotRetriableError, StepContext, Workflow
from pgflow_prefect.errors import RunFailedError
from tests.conftest import Connection
from tests.engine import run_workflow, value
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_run, read_steps

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]


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


async def test_an_input_that_jsonb_holds_and_python_cannot_read_fails_the_step_and_says_so(
    db: Connection, define: Define, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["outside", "reads"], [("outside", "reads")])
    run_id = run_workflow(db, workflow.slug).id
    db.execute("SELECT pgflow.complete_step(%s, 'outside', '1')", [run_id])
    db.execute("SET session_replication_role = replica")  # as a row from before results were checked
    db.execute("UPDATE pgflow.step_states SET step_result = repeat('9', 5001)::jsonb WHERE run_id = %s", [run_id])
    db.execute("RESET session_replication_role")

    @workflow.step(retries=3, retry_delay_seconds=60)
    async def reads(outside: int) -> None:
        raise AssertionError("this must not run")

    with pytest.raises(
        RunFailedError, match=r"the input of step .reads. can.t be read: .* has a number of more than 1000 digits"
    ):
        await workflow.flow(run_id=run_id)
    assert value(db, "SELECT status FROM pgflow.step_states WHERE step_slug = 'reads'") == "failed"
    flow_run = await read_flow_run(client, workflow.slug)
    await await_task_runs(client, flow_run, {"outside": "Completed", "reads": "Failed"})


async def test_a_failed_attempt_is_tried_again_and_counted(
    db: Connection, define: Define, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["shaky", "hopeless"], [("shaky", "hopeless")])
    seen = []

    @workflow.step(retries=2, retry_delay_seconds=0.1)
    async def shaky(context: AsyncStepContext) -> int:
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


@pytest.mark.parametrize("kind", ["sync", "async", "broken"])
async def test_a_step_is_tried_again_only_after_the_errors_that_its_condition_names(
    db: Connection, define: Define, client: PrefectClient, kind: str
) -> None:
    asked: list[tuple[str, int, str]] = []

    def decide(task: Task[..., Any], task_run: TaskRun, error: Exception) -> bool:
        asked.append((task.name, task_run.run_count, repr(error)))
        if kind == "broken" and len(asked) == 2:
            raise error
        return isinstance(error, ConnectionError)

    def is_worth_it(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
        try:
            state.result()
        except Exception as error:  # noqa: BLE001  as Prefect's documentation has it
            return decide(task, task_run, error)
        raise AssertionError("the state has failed")

    async def is_worth_it_async(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
        try:
            await state.aresult()
        except Exception as error:  # noqa: BLE001  likewise
            return decide(task, task_run, error)
        raise AssertionError("the state has failed")

    workflow = Workflow(make_slug())
    define(workflow.slug, ["shaky"])

    @workflow.step(retries=5, retry_condition_fn=is_worth_it_async if kind == "async" else is_worth_it)
    def shaky(context: StepContext) -> None:
        if context.attempt == 1:
            raise ConnectionError("away")
        raise ValueError("wrong")

    with pytest.raises(RunFailedError, match="wrong"):
        await workflow.flow()
    assert read_steps(db)["shaky"] == ("failed", 2, None, "ValueError: wrong")
    assert asked == [("shaky", 1, "ConnectionError('away')"), ("shaky", 2, "ValueError('wrong')")]
    shown = await await_task_runs(client, await read_flow_run(client, workflow.slug), {"shaky": "Failed"})
    assert shown["shaky"].run_count == 2


async def test_a_handler_that_says_that_it_is_not_retriable_ends_its_step(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["pay"])

    @workflow.step(retries=5)
    def pay() -> None:
        raise NotRetriableError("the card is stolen")

    with pytest.raises(RunFailedError, match="the card is stolen"):
        await workflow.flow()
    assert read_steps(db)["pay"][:2] == ("failed", 1)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_handler_that_takes_too_long_fails_its_step(
    db: Connection, define: Define, client: PrefectClient, kind: str
) -> None:
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


async def test_handlers_that_do_not_fit_fail_the_run_and_say_so(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["there", "misssing"])

    @workflow.step
    def there() -> None:
        raise AssertionError("this must not run")

    @workflow.step
    def missing() -> None: ...

    with pytest.raises(Exception, match="handler 'missing' fits no step"):
        await workflow.flow()
    status, message, _ = read_run(db)
    assert status == "failed"
    assert "handler 'missing' fits no step (did you mean 'misssing'?)" in message
