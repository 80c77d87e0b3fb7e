"""A flow run that our engine executes beside one that Prefect's own engine does: users find the same in both."""

import asyncio
import re
from collections.abc import Callable
from typing import Any
from uuid import UUID

import anyio
import httpx
import pytest
from prefect import flow, get_run_logger, pause_flow_run, task
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events import Event
from prefect.exceptions import Abort, Pause, PrefectSignal
from prefect.results import ResultStore
from prefect.runtime import deployment as runtime_deployment
from prefect.runtime import flow_run as runtime
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Running

from pgflow_prefect import AsyncStepContext, Workflow
from pgflow_prefect.execution.reporting import flow_runs, heartbeat
from pgflow_prefect.execution.reporting.flow_runs import FlowRunEngine
from pgflow_prefect.prefect_api.event_sender import EventSender, Make
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from tests.integration.conftest import Define, make_slug
from tests.integration.live import Engine, continue_by, execute_by

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]


@pytest.fixture
def workflow(define: Define) -> Workflow:
    made = Workflow(make_slug())
    define(made.slug, ["work"])
    return made


async def await_logs(client: PrefectClient, flow_run_id: UUID, last: str) -> list[tuple[int, str]]:
    """Return level and first line of the logs of a flow run, once one of them has this text."""
    with anyio.fail_after(180):
        while True:
            found = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])))
            lines = [(each.level, each.message.splitlines()[0]) for each in found]
            if any(last in message for _, message in lines):
                return lines
            await anyio.sleep(0.1)


def hide_ids(message: str) -> str:
    return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", message)


async def read_states(client: PrefectClient, flow_run_id: UUID) -> list[str]:
    response = await client.request("GET", "/flow_run_states/", params={"flow_run_id": str(flow_run_id)})
    return [each["name"] for each in sorted(response.json(), key=lambda state: str(state["timestamp"]))]


async def test_handlers_find_their_flow_run(engine: Engine, workflow: Workflow, client: PrefectClient) -> None:
    told: list[Any] = []

    @workflow.step
    async def work() -> None:
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        told.extend([context.flow_run.id, runtime.id, runtime.name, runtime.run_count, runtime.parameters])
        get_run_logger().warning("asked for a logger")
        print("printed")

    _, shown = await execute_by(engine, workflow.make_flow(), {"payload": 7})
    assert told[:2] == [shown.id, str(shown.id)]
    assert told[3] == 1
    assert told[4]["payload"] == 7
    messages = {message for _, message in await await_logs(client, shown.id, "printed")}
    assert {"asked for a logger", "printed"} <= messages


async def test_sync_handlers_find_their_flow_run(engine: Engine, workflow: Workflow, client: PrefectClient) -> None:
    found: list[Any] = []

    @workflow.step
    def work() -> None:
        found.append(runtime.id)
        get_run_logger().warning("asked for a logger")
        print("printed")

    _, shown = await execute_by(engine, workflow.make_flow(), {"payload": 7})
    assert found == [str(shown.id)]
    messages = {message for _, message in await await_logs(client, shown.id, "printed")}
    assert {"asked for a logger", "printed"} <= messages


async def test_nested_tasks_and_flows_have_their_parent(
    engine: Engine, workflow: Workflow, client: PrefectClient
) -> None:
    parents: list[UUID | None] = []

    @task
    async def inner_task() -> int:
        context = TaskRunContext.get()
        assert context is not None
        parents.append(context.task_run.flow_run_id)
        return 1

    @flow(name=make_slug())
    async def inner_flow() -> int:
        return await inner_task() + 1

    @workflow.step
    async def work() -> int:
        return await inner_flow() + await inner_task()

    state, shown = await execute_by(engine, workflow.make_flow(), {"payload": 7})
    assert state.is_completed()
    nested = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[shown.id]))
    [child] = await client.read_flow_runs(flow_run_filter=nested)
    assert (child.state_name, child.parent_task_run_id is not None) == ("Completed", True)
    assert parents == [child.id, shown.id]


async def test_a_step_is_tried_again(engine: Engine, workflow: Workflow) -> None:
    @workflow.step(retries=1)
    async def work(context: AsyncStepContext) -> int:
        if context.attempt == 1:
            raise ValueError("not yet")
        return 2

    state, shown = await execute_by(engine, workflow.make_flow(), {"payload": 7})
    assert (state.name, shown.state_name, shown.run_count) == ("Completed", "Completed", 1)


async def test_a_failed_run_has_the_same_state_and_the_same_errors_in_its_log(
    workflow: Workflow, client: PrefectClient
) -> None:
    @workflow.step
    async def work() -> None:
        raise ValueError("no")

    states, logs = {}, {}
    for engine in Engine:
        _, shown = await execute_by(engine, workflow.make_flow(), {"payload": 7})
        assert shown.state is not None
        states[engine] = (shown.state.name, shown.state.type, hide_ids(str(shown.state.message)))
        lines = await await_logs(client, shown.id, "Finished in state Failed('Flow run")
        logs[engine] = [hide_ids(message) for level, message in lines if level >= 40]
    assert states[Engine.OURS] == states[Engine.PREFECT]
    assert logs[Engine.OURS] == logs[Engine.PREFECT]


RAISED: dict[str, Callable[[], BaseException]] = {
    "SystemExit": lambda: SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "CancelledError": asyncio.CancelledError,
    "a group": lambda: BaseExceptionGroup("several", [SystemExit(3), ValueError("no")]),
    "Abort": lambda: Abort("leave it"),
    "AssertionError": AssertionError,
}


@pytest.mark.parametrize("name", RAISED)
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_whatever_a_handler_raises_has_the_same_end(kind: str, name: str, workflow: Workflow) -> None:
    def work() -> None:
        raise RAISED[name]()

    async def work_on_the_loop() -> None:
        raise RAISED[name]()

    workflow.step("work")(work if kind == "sync" else work_on_the_loop)
    ends = {}
    for engine in Engine:
        state, shown = await execute_by(engine, workflow.make_flow(), {"payload": 7})
        assert shown.state is not None
        ends[engine] = (state.name, shown.state.name, hide_ids(str(shown.state.message)))
    assert ends[Engine.OURS] == ends[Engine.PREFECT]
    assert ends[Engine.OURS][0] == "Failed"


async def test_a_run_that_completes_has_no_lines_of_its_own(workflow: Workflow, client: PrefectClient) -> None:
    @workflow.step
    async def work() -> None:
        print("printed")

    _, shown = await execute_by(Engine.OURS, workflow.make_flow(), {"payload": 7})
    messages = [message for _, message in await await_logs(client, shown.id, "printed")]
    assert [each for each in messages if each.startswith(("Beginning", "Finished", "View"))] == []


@pytest.mark.parametrize("delay", [0, 1])
async def test_a_flow_run_is_tried_again_as_the_server_says(delay: int, engine: Engine, client: PrefectClient) -> None:
    begun: list[int | None] = []

    @flow(name=make_slug(), retries=2, retry_delay_seconds=delay)
    async def fail_once() -> int:
        begun.append(runtime.run_count)
        if len(begun) == 1:
            raise ValueError("not yet")
        return 2

    state, shown = await execute_by(engine, fail_once)
    assert (state.name, shown.state_name, shown.run_count, begun) == ("Completed", "Completed", 2, [1, 2])
    expected = ["Running", "AwaitingRetry", "Running", "Completed"]
    assert [each for each in await read_states(client, shown.id) if each != "Pending"] == expected


@pytest.mark.thorough
async def test_a_flow_run_that_fails_each_time_ends_as_failed(engine: Engine) -> None:
    @flow(name=make_slug(), retries=1)
    async def fail() -> None:
        raise ValueError("never")

    state, shown = await execute_by(engine, fail)
    assert (state.name, shown.state_name, shown.run_count) == ("Failed", "Failed", 2)
    assert shown.state is not None
    assert shown.state.message == "Flow run encountered an exception: ValueError: never"


async def test_a_flow_run_that_takes_too_long_times_out(engine: Engine) -> None:
    @flow(name=make_slug(), timeout_seconds=0.2)
    async def wait() -> None:
        await anyio.sleep_forever()

    state, shown = await execute_by(engine, wait)
    assert shown.state is not None
    assert (state.name, shown.state_name) == ("TimedOut", "TimedOut")
    assert shown.state.message == "Flow run exceeded timeout of 0.2 second(s)"


async def test_a_time_out_of_the_users_own_is_told_as_such(engine: Engine) -> None:
    @flow(name=make_slug())
    async def give_up() -> None:
        raise TimeoutError("the bank")

    _, shown = await execute_by(engine, give_up)
    assert shown.state is not None
    assert (shown.state.name, shown.state.message) == (
        "TimedOut",
        "Flow run failed due to timeout: TimeoutError('the bank')",
    )


@pytest.mark.parametrize("signal", [Abort("leave it"), Pause("later")], ids=["abort", "pause"])
async def test_a_signal_of_prefects_leaves_the_flow_run_as_it_is(
    signal: PrefectSignal, engine: Engine, client: PrefectClient
) -> None:
    @flow(name=make_slug())
    async def leave() -> None:
        raise signal

    state = engine.first_state
    created = await client.create_flow_run(leave, state=state)
    with pytest.raises(type(signal)):
        await continue_by(engine, client, leave, created)
    assert (await client.read_flow_run(created.id)).state_name == "Running"


async def test_a_flow_run_may_be_paused_and_resumed(engine: Engine, client: PrefectClient) -> None:
    @flow(name=make_slug())
    async def ask() -> str:
        paused: Any = pause_flow_run(timeout=600, poll_interval=1)
        await paused
        return "answered"

    state = engine.first_state
    created = await client.create_flow_run(ask, state=state)
    executing = asyncio.create_task(continue_by(engine, client, ask, created))
    with anyio.fail_after(180):
        while (await client.read_flow_run(created.id)).state_name != "Paused":
            await anyio.sleep(0.1)
        await client.resume_flow_run(created.id)
        ended = await executing
    assert ended.is_completed()
    assert (await client.read_flow_run(created.id)).state_name == "Completed"


async def test_a_flow_run_that_is_broken_off_crashes(engine: Engine, client: PrefectClient) -> None:
    begun = anyio.Event()

    @flow(name=make_slug())
    async def wait() -> None:
        begun.set()
        await anyio.sleep_forever()

    told: list[str | None] = []

    async def note(flow: Any, flow_run: Any, state: State[Any]) -> None:
        told.append(state.name)

    wait.on_crashed(note)
    created = await client.create_flow_run(wait, state=engine.first_state)
    executing = asyncio.create_task(continue_by(engine, client, wait, created))
    with anyio.fail_after(180):
        await begun.wait()
        executing.cancel()
        await asyncio.wait([executing])
    assert executing.cancelled()
    assert told == ["Crashed"]
    shown = await client.read_flow_run(created.id)
    assert shown.state is not None
    assert (shown.state.name, shown.state.message) == ("Crashed", "Execution was cancelled by the runtime environment.")


async def test_a_persisted_result_is_there_for_others(engine: Engine, client: PrefectClient) -> None:
    @flow(name=make_slug(), persist_result=True)
    async def compute() -> int:
        return 7

    _, shown = await execute_by(engine, compute)
    assert shown.state is not None
    assert await shown.state.aresult() == 7


async def test_automations_hear_of_each_state_of_a_flow_run(engine: Engine, client: PrefectClient) -> None:
    @flow(name=make_slug())
    async def nothing() -> None: ...

    _, shown = await execute_by(engine, nothing)
    resource = f"prefect.flow-run.{shown.id}"
    wanted = {"filter": {"resource": {"id": [resource]}}, "limit": 50}
    names: set[str] = set()
    with anyio.fail_after(180):
        while not names >= {"prefect.flow-run.Running", "prefect.flow-run.Completed"}:
            await anyio.sleep(0.1)
            found = (await client.request("POST", "/events/filter", json=wanted)).json()["events"]
            names = {each["event"] for each in found}


async def test_a_nested_flow_knows_the_deployment(engine: Engine, client: PrefectClient) -> None:
    found: list[Any] = []

    @flow(name=make_slug())
    async def inner() -> None:
        found.append(runtime_deployment.id)

    @flow(name=make_slug())
    async def outer() -> None:
        found.append(runtime_deployment.id)
        await inner()

    deployment = await client.create_deployment(await client.create_flow(outer), outer.name)
    state = engine.first_state
    created = await client.create_flow_run_from_deployment(deployment, state=state)
    await continue_by(engine, client, outer, created)
    assert found == [str(deployment), str(deployment)]


async def test_where_results_go_is_asked_once_for_many_flow_runs(
    client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = client.read_server_default_result_storage

    async def count() -> Any:
        asked.append(1)
        return await ask()

    monkeypatch.setattr(PrefectClient, "read_server_default_result_storage", lambda self: count())
    stores: list[ResultStore] = []

    @flow(name=make_slug())
    async def note() -> None:
        context = FlowRunContext.get()
        assert context is not None
        stores.append(context.result_store)

    executes = FlowRunEngine(note, FlowRunWriter(client), client)
    for _ in range(3):
        await executes.execute(await client.create_flow_run(note, state=Running()))
    assert len(asked) == 1
    assert len({id(each.cache) for each in stores}) == 3, "no flow run finds another one's results"
    monkeypatch.setattr(flow_runs, "_LIFETIME", 0.0)
    executes = FlowRunEngine(note, FlowRunWriter(client), client)
    await executes.execute(await client.create_flow_run(note, state=Running()))
    assert len(asked) == 2
    await executes.execute(await client.create_flow_run(note, state=Running()))
    with anyio.fail_after(180):
        while len(asked) < 3 or executes._refreshing is not None:
            await anyio.sleep(0.01)


async def test_no_flow_run_waits_for_the_refresh_of_where_results_go(
    client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    @flow(name=make_slug())
    async def nothing() -> None: ...

    executes = FlowRunEngine(nothing, FlowRunWriter(client), client)
    await executes.execute(await client.create_flow_run(nothing, state=Running()))
    answered = anyio.Event()

    async def be_late() -> Any:
        await answered.wait()
        raise httpx.ConnectError("gone")

    monkeypatch.setattr(PrefectClient, "read_server_default_result_storage", lambda self: be_late())
    executes._results_until = 0.0
    with anyio.fail_after(180):
        ended = await executes.execute(await client.create_flow_run(nothing, state=Running()))
        assert ended.is_completed()
        refreshing = executes._refreshing
        assert refreshing is not None
        answered.set()
        await refreshing
        ended = await executes.execute(await client.create_flow_run(nothing, state=Running()))
    assert ended.is_completed(), "what was right before is kept"


async def test_one_thread_tells_that_long_flow_runs_are_alive(
    client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[Event] = []
    beaten = anyio.Event()
    loop = asyncio.get_running_loop()

    def send(sender: EventSender, make: Make, related: Any = None) -> None:
        event = make()
        if event.event == "prefect.flow-run.heartbeat":
            beats.append(event)
            loop.call_soon_threadsafe(beaten.set)

    monkeypatch.setattr(EventSender, "send", send)
    monkeypatch.setattr(heartbeat, "SHORTEST_HEARTBEAT", 0.05)
    repeat = EventSender.repeat
    monkeypatch.setattr(EventSender, "repeat", lambda self, make, interval: repeat(self, make, interval / 600))

    @flow(name=make_slug())
    async def wait() -> None:
        with anyio.fail_after(180):
            await beaten.wait()

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 30}):
        _, shown = await execute_by(Engine.OURS, wait)
    first = beats[0]
    assert first.resource.id == f"prefect.flow-run.{shown.id}"
    assert f"prefect.flow.{shown.flow_id}" in {each.id for each in first.related}
