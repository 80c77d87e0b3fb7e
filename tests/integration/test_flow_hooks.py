"""Hooks of a flow as Prefect users write them: sync ones run in a thread, and none of them harms another one."""

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import pytest
from prefect import Flow, get_client
from prefect.artifacts import create_markdown_artifact
from prefect.blocks.system import Secret
from prefect.client.orchestration import PrefectClient, SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, State
from prefect.variables import Variable
from pydantic import SecretStr

from pgflow_prefect import Workflow
from pgflow_prefect.workflow.module import UserModule
from tests.conftest import Connection
from tests.integration import live
from tests.integration.conftest import Define, make_slug, read_flow_run, read_run
from tests.integration.live import Engine, execute_by

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

AnyFlow = Flow[..., Any]


async def execute(workflow: Workflow, payload: str = "well") -> State[Any]:
    with anyio.fail_after(180):
        if live.chosen is Engine.OURS:
            return (await execute_by(live.chosen, workflow.make_flow(), {"payload": payload}))[0]
        state: State[Any] = await workflow.make_flow()(payload, return_state=True)
    return state


@pytest.fixture
def workflow(define: Define, engine: Engine) -> Workflow:
    made = Workflow(make_slug())
    define(made.slug, ["work"])

    @made.step
    async def work(payload: str) -> str:
        if payload == "fail":
            raise ValueError("no")
        return payload

    return made


async def test_prefects_functions_return_results_in_sync_hooks(workflow: Workflow, client: PrefectClient) -> None:
    name = workflow.slug.replace("-", "_")
    await Variable.set(name, "from prefect")  # type: ignore[misc]
    await Secret(value=SecretStr("hidden")).save(workflow.slug)
    told: list[Any] = []

    def note(flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
        told.append(Variable.get(name))
        told.append(Secret.load(workflow.slug).get())  # type: ignore[union-attr]
        told.append(isinstance(create_markdown_artifact(f"# {state.name}"), asyncio.Future))
        with get_client(sync_client=True) as sync_client:
            assert isinstance(sync_client, SyncPrefectClient)
            told.append(sync_client.read_flow_run(flow_run.id).id == flow_run.id)

    workflow.flow.on_running(note)
    workflow.flow.on_completion(note)
    await execute(workflow)

    assert told == ["from prefect", "hidden", False, True] * 2
    flow_run = await read_flow_run(client, workflow.slug)
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run.id]))
    shown = [each.data for each in await client.read_artifacts(artifact_filter=of_run)]
    assert "# Completed" in shown


async def test_prefects_functions_return_coroutines_in_async_hooks(workflow: Workflow) -> None:
    name = workflow.slug.replace("-", "_")
    await Variable.set(name, "from prefect")  # type: ignore[misc]
    told: list[Any] = []

    async def note(flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
        told.append(await Variable.get(name))  # type: ignore[misc]

    workflow.flow.on_completion(note)
    await execute(workflow)
    assert told == ["from prefect"]


async def test_a_sync_hook_does_not_block_the_event_loop(workflow: Workflow) -> None:
    is_released = threading.Event()
    loop = asyncio.get_running_loop()
    told: list[bool] = []

    def wait(flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
        loop.call_soon_threadsafe(is_released.set)
        told.append(is_released.wait(60))

    workflow.flow.on_completion(wait)
    await execute(workflow)
    assert told == [True]


def leave(flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
    sys.exit("a hook has no licence")


def interrupt(flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
    raise KeyboardInterrupt


async def leave_on_the_loop(flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
    sys.exit("a hook has no licence")


async def cancel(flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
    raise asyncio.CancelledError


async def leave_in_a_child(flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
    await asyncio.create_task(leave_on_the_loop(flow, flow_run, state))


@pytest.mark.parametrize("harmful", [leave, interrupt, leave_on_the_loop, cancel, leave_in_a_child])
@pytest.mark.parametrize("end", ["well", "fail"])
async def test_after_a_hook_that_raises_anything_the_next_one_runs(
    harmful: Callable[..., Any], end: str, workflow: Workflow, db: Connection, client: PrefectClient
) -> None:
    told: list[str] = []

    def note(flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
        told.append(state.name or "")

    for add in (workflow.flow.on_running, workflow.flow.on_completion, workflow.flow.on_failure):
        add(harmful)
        add(note)
    await execute(workflow, end)

    state, status = ("Completed", "completed") if end == "well" else ("Failed", "failed")
    assert told == ["Running", state]
    assert (await read_flow_run(client, workflow.slug)).state_name == state
    assert read_run(db)[0] == status


class Notifier:
    """A hook that has settings, as users write it."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def __call__(self, flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
        self.told.append(state.name)

    def tell(self, channel: str, flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
        self.told.append(channel)

    async def tell_async(self, flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
        await asyncio.sleep(0)
        self.told.append("async")


class AsyncNotifier(Notifier):
    async def __call__(  # type: ignore[override]
        self, flow: AnyFlow, flow_run: FlowRun, state: State[Any]
    ) -> None:
        self.told.append(threading.current_thread().name)


@pytest.mark.parametrize("how", ["by decorator", "by option", "of the flow that is called"])
async def test_a_hook_may_be_any_callable(how: str, workflow: Workflow) -> None:
    notifier, on_the_loop = Notifier(), AsyncNotifier()

    def returns_a_coroutine(flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> Awaitable[None]:
        return notifier.tell_async(flow, flow_run, state)

    hooks: list[Callable[..., Any]] = [
        *(notifier, partial(notifier.tell, "mail"), notifier.tell_async),
        returns_a_coroutine,
        on_the_loop,
    ]
    flow: AnyFlow = workflow.flow
    if how == "by decorator":
        for hook in hooks:
            flow.on_completion(hook)
    else:
        flow = flow.with_options(on_completion=hooks)
    if how == "by option":
        workflow._module = UserModule({"flow": flow})
    if how == "of the flow that is called":
        await flow("well", return_state=True)  # type: ignore[misc]
    else:
        await execute(workflow)
    assert notifier.told == ["Completed", "mail", "async", "async"]
    assert on_the_loop.told == [threading.main_thread().name]
