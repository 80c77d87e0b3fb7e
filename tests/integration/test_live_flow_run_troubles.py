"""A flow run of our engine whose end Prefect does not take, or that waits while its process drains."""

import asyncio
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import httpx
import pytest
from prefect import Flow, flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import Abort, PrefectHTTPStatusError
from prefect.runtime import flow_run as runtime
from prefect.states import Pending, Running, Scheduled

from pgflow_prefect.errors import PrefectUnavailableError
from pgflow_prefect.execution import flow_hooks
from pgflow_prefect.execution.flow_hooks import contain_hook
from pgflow_prefect.execution.reporting.flow_runs import FlowRunEngine
from pgflow_prefect.prefect_api.errors import unavailable
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from tests.integration.conftest import make_slug

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]

AnyFlow = Flow[..., Any]

LONG = 3600.0  # seconds, which no test waits for


def throttle() -> PrefectHTTPStatusError:
    request = httpx.Request("POST", "http://prefect.example/api")
    return PrefectHTTPStatusError("slow down", request=request, response=httpx.Response(429, request=request))


REFUSALS: dict[str, Callable[[], Exception]] = {
    "it is throttled": throttle,
    "there is no answer": lambda: unavailable("no answer"),
    "the link breaks": lambda: httpx.ReadError("gone"),
}


class RefusingWriter(FlowRunWriter):
    """Takes no final state."""

    def __init__(self, client: PrefectClient, refusal: Callable[[], BaseException]) -> None:
        super().__init__(client)
        self._refusal = refusal

    async def enter(self, flow_run_id: Any, state: State[Any], *, force: bool = False) -> State[Any]:
        raise self._refusal()


class Told:
    """Hooks that note what they are called for."""

    def __init__(self, *flows: AnyFlow) -> None:
        self.states: list[str | None] = []
        for each in flows:
            for add in (each.on_completion, each.on_failure, each.on_crashed):
                add(contain_hook(self.note))

    def note(self, flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
        self.states.append(state.name)


@flow(name=make_slug())
async def succeed() -> None: ...


@flow(name=make_slug(), retries=1)
async def fail() -> None:
    raise ValueError("no")


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS.keys())
@pytest.mark.parametrize("made", [succeed, fail], ids=["Completed", "Failed"])
async def test_hooks_are_called_for_an_end_that_prefect_does_not_take(
    made: AnyFlow, refusal: Callable[[], Exception], client: PrefectClient
) -> None:
    made = made.with_options()
    told = Told(made)
    created = await client.create_flow_run(made, state=Running())
    with pytest.raises((PrefectHTTPStatusError, PrefectUnavailableError, httpx.TransportError)):
        await FlowRunEngine(made, RefusingWriter(client, refusal), client).execute(created)
    assert told.states == ["Failed" if made.retries else "Completed"]


async def test_a_flow_run_that_prefect_wants_left_alone_has_no_end_and_calls_no_hooks(client: PrefectClient) -> None:
    made = succeed.with_options()
    told = Told(made)
    created = await client.create_flow_run(made, state=Running())
    with pytest.raises(Abort):
        await FlowRunEngine(made, RefusingWriter(client, lambda: Abort("leave it")), client).execute(created)
    assert told.states == []


async def test_a_flow_run_that_is_broken_off_stays_so_where_prefect_does_not_hear_of_it(client: PrefectClient) -> None:
    begun = anyio.Event()

    @flow(name=make_slug())
    async def wait() -> None:
        begun.set()
        await anyio.sleep_forever()

    told = Told(wait)
    created = await client.create_flow_run(wait, state=Running())
    executing = asyncio.create_task(FlowRunEngine(wait, RefusingWriter(client, throttle), client).execute(created))
    with anyio.fail_after(180):
        await begun.wait()
        executing.cancel()
        await asyncio.wait([executing])
    assert executing.cancelled(), "not Prefect's refusal"
    assert told.states == ["Crashed"]


async def test_a_flow_run_that_waits_for_its_next_try_is_left_to_others_when_its_process_drains(
    client: PrefectClient,
) -> None:
    @flow(name=make_slug(), retries=1, retry_delay_seconds=LONG)
    async def fail_first() -> None:
        raise ValueError("not yet")

    drained = asyncio.Event()
    created = await client.create_flow_run(fail_first, state=Running())
    executing = asyncio.create_task(FlowRunEngine(fail_first, FlowRunWriter(client), client, drained).execute(created))
    with anyio.fail_after(180):
        while (await client.read_flow_run(created.id)).state_name != "AwaitingRetry":
            await anyio.sleep(0.1)
        assert not executing.done()
        drained.set()
        left = await executing
    assert left.name == "AwaitingRetry"
    shown = await client.read_flow_run(created.id)
    assert (shown.state_name, shown.run_count) == ("AwaitingRetry", 1)


async def test_a_flow_run_is_tried_again_at_once_whatever_the_process_does(client: PrefectClient) -> None:
    drained, tries = asyncio.Event(), 0

    @flow(name=make_slug(), retries=1)
    async def fail_first() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ValueError("not yet")

    created = await client.create_flow_run(fail_first, state=Running())
    ended = await FlowRunEngine(fail_first, FlowRunWriter(client), client, drained).execute(created)
    assert (ended.name, tries) == ("Completed", 2)


async def test_a_scheduled_flow_run_that_may_not_begin_yet_is_scheduled_again_when_its_process_drains(
    client: PrefectClient,
) -> None:
    later = datetime.now(UTC) + timedelta(seconds=LONG)
    created = await client.create_flow_run(succeed, state=Scheduled(scheduled_time=later))
    drained = asyncio.Event()
    drained.set()
    with anyio.fail_after(180):
        left = await FlowRunEngine(succeed, FlowRunWriter(client), client, drained).execute(created)
    assert left.is_scheduled()
    assert (await client.read_flow_run(created.id)).state_name == "Scheduled"


async def test_a_state_that_is_under_way_is_waited_for_when_the_process_drains(client: PrefectClient) -> None:
    created = await client.create_flow_run(succeed, state=Pending())
    drained = asyncio.Event()
    drained.set()
    ended = await FlowRunEngine(succeed, FlowRunWriter(client), client, drained).execute(created)
    assert ended.is_completed(), "what Prefect lets begin at once begins: its steps are handed back by the run"


async def wait_for_ever(flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
    await anyio.sleep_forever()


def block_for_ever(flow: AnyFlow, flow_run: FlowRun, state: State[Any]) -> None:
    blocked.wait(LONG)


blocked = threading.Event()


@pytest.mark.parametrize("hook", [wait_for_ever, block_for_ever])
async def test_a_hook_that_hangs_holds_up_no_process_that_drains(
    hook: Callable[..., Any], client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_hooks, "HOOK_GRACE", 0.05)
    blocked.clear()
    drained = asyncio.Event()
    made = succeed.with_options(on_completion=[hook])
    told = Told(made)
    created = await client.create_flow_run(made, state=Running())
    executing = asyncio.create_task(FlowRunEngine(made, FlowRunWriter(client), client, drained).execute(created))
    try:
        with anyio.fail_after(180):
            while (await client.read_flow_run(created.id)).state_name != "Completed":
                await anyio.sleep(0.1)
            assert told.states == [], "without a signal, the next hook waits for this one"
            drained.set()
            assert (await executing).is_completed()
    finally:
        blocked.set()
    assert told.states == ["Completed"], "the next hook is called"


async def test_a_flow_run_that_prefect_scheduled_counts_its_tries(client: PrefectClient) -> None:
    counts: list[int | None] = []

    @flow(name=make_slug(), retries=1)
    async def count() -> None:
        counts.append(runtime.run_count)
        if len(counts) == 1:
            raise ValueError("not yet")

    created = await client.create_flow_run(count.with_options(retries=0), state=Scheduled())
    ended = await FlowRunEngine(count, FlowRunWriter(client), client).execute(created)
    assert (ended.name, counts) == ("Failed", [1]), "it was created with a policy of its own"

    deployment = await client.create_deployment(await client.create_flow(count), count.name)
    counts.clear()
    asked = await client.create_flow_run_from_deployment(deployment)
    ended = await FlowRunEngine(count, FlowRunWriter(client), client).execute(asked)
    assert (ended.name, counts) == ("Completed", [1, 2]), "its policy is the flow's"
