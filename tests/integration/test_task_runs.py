"""A step's task run beside one that Prefect's own engine made: the server shows the same of both."""

import time
from datetime import timedelta
from typing import Any
from uuid import UUID

import anyio
import httpx
import pytest
from prefect import flow, tags, task
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events import RelatedResource
from prefect.events.filters import EventFilter, EventNameFilter, EventRelatedFilter
from prefect.events.related import related_resources_from_run_context
from prefect.runtime import task_run as runtime
from prefect.transactions import Transaction

from pgflow_prefect import Workflow
from pgflow_prefect.errors import RunFailedError
from pgflow_prefect.execution.outcomes import StepOutcome
from pgflow_prefect.execution.reporting import task_run_events
from pgflow_prefect.execution.run_executor import RunExecutor
from pgflow_prefect.prefect_api import event_sender
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run

pytestmark = pytest.mark.anyio

ENDS = {"first": "Completed", "second": "Completed"}


async def run_stock(slug: str) -> None:
    """Run the same two steps as a user would write them without us."""

    @task(name="first", task_run_name="first", persist_result=False)
    async def first() -> int:
        return 1

    @task(name="second", task_run_name="second", retries=1, persist_result=False)
    async def second(upstream: int) -> int:
        if runtime.run_count == 1:
            raise ValueError("not yet")
        return upstream

    @flow(name=slug)
    async def stock() -> int:
        future: Any = first.submit()
        following: Any = second.submit(future)
        result: int = following.result()
        return result

    await stock()


def make_ours(slug: str) -> Workflow:
    workflow = Workflow(slug)

    @workflow.step()
    async def first() -> int:
        return 1

    @workflow.step(retries=1)
    async def second(first: int) -> int:
        if runtime.run_count == 1:
            raise ValueError("not yet")
        return first

    return workflow


async def read_task_runs(client: PrefectClient, slug: str) -> dict[str, TaskRun]:
    return await await_task_runs(client, await read_flow_run(client, slug), ENDS)


async def test_the_server_shows_what_it_shows_of_prefects_own(
    define: Define, pgflow_dsn: str, client: PrefectClient
) -> None:
    ours, stock = make_slug(), make_slug()
    define(ours, ["first", "second"], [("first", "second")])
    with tags("nightly"):
        await run_stock(stock)
        await make_ours(ours).flow({})
    theirs, mine = await read_task_runs(client, stock), await read_task_runs(client, ours)
    for name in ENDS:
        shown, expected = mine[name], theirs[name]
        for attribute in ("name", "run_count", "flow_run_run_count", "tags", "state_type", "state_name"):
            assert getattr(shown, attribute) == getattr(expected, attribute), attribute
        for attribute in ("start_time", "end_time", "expected_start_time"):
            assert getattr(shown, attribute) is not None, attribute
        assert shown.total_run_time > timedelta(0)
        assert shown.empirical_policy.retries == expected.empirical_policy.retries
        assert shown.state is not None
        assert shown.state.state_details.flow_run_id == shown.flow_run_id
    assert {each.id for inputs in mine["second"].task_inputs.values() for each in inputs} == {mine["first"].id}  # type: ignore[union-attr]


async def read_states(client: PrefectClient, task_run_id: UUID) -> list[str]:
    response = await client.request("GET", "/task_run_states/", params={"task_run_id": str(task_run_id)})
    return [state["name"] for state in sorted(response.json(), key=lambda state: str(state["timestamp"]))]


@pytest.mark.parametrize(("held_back", "states"), [(0.0, ["Running", "Completed"]), (600.0, ["Completed"])])
async def test_every_attempt_is_a_state_of_the_task_run_unless_the_first_one_ends_soon(
    held_back: float,
    states: list[str],
    define: Define,
    pgflow_dsn: str,
    client: PrefectClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_sender, "HELD_BACK", held_back)
    slug = make_slug()
    define(slug, ["first", "second"], [("first", "second")])
    await make_ours(slug).flow({})
    found = await read_task_runs(client, slug)
    assert await read_states(client, found["first"].id) == states
    assert await read_states(client, found["second"].id) == ["Running", "AwaitingRetry", "Retrying", "Completed"]


async def test_its_events_are_related_to_what_prefects_own_are_related_to(
    define: Define, pgflow_dsn: str, client: PrefectClient
) -> None:
    ours, stock = make_slug(), make_slug()
    define(ours, ["first", "second"], [("first", "second")])
    with tags("nightly"):
        await run_stock(stock)
        await make_ours(ours).flow({})
    assert await read_roles(client, ours) == await read_roles(client, stock) == {"flow-run", "flow", "tag"}


async def read_roles(client: PrefectClient, slug: str) -> set[str]:
    """Return what the end of a flow run's first task is related to."""
    flow_run = await read_flow_run(client, slug)
    wanted = EventFilter(
        event=EventNameFilter(name=["prefect.task-run.Completed"]),
        related=EventRelatedFilter(id=[f"prefect.flow-run.{flow_run.id}"]),
    )
    with anyio.fail_after(180):
        while True:
            body = {"filter": wanted.model_dump(mode="json"), "limit": 10}
            found = (await client.request("POST", "/events/filter", json=body)).json()["events"]
            of_first: list[Any] = [event for event in found if event["resource"]["prefect.resource.name"] == "first"]
            if of_first:
                return {related["prefect.resource.role"] for related in of_first[0]["related"]}
            await anyio.sleep(0.1)


async def test_what_a_handler_finds_in_its_context_is_its_task_run(
    define: Define, pgflow_dsn: str, client: PrefectClient
) -> None:
    slug = make_slug()
    define(slug, ["first"])
    workflow = Workflow(slug)

    @workflow.step()
    async def first() -> list[str]:
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None

        @task(name="inner")
        async def inner() -> str:
            return "inner"

        return [runtime.name or "", str(runtime.id), str(context.flow_run.id), await inner()]

    name, task_run_id, flow_run_id, inner = (await workflow.flow({}))["first"]
    flow_run = await read_flow_run(client, slug)
    assert (name, flow_run_id, inner) == ("first", str(flow_run.id), "inner")
    shown: dict[str, TaskRun] = {}
    with anyio.fail_after(180):
        while len(shown) < 2:
            await anyio.sleep(0.1)
            found = await client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [flow_run.id]}))
            shown = {run.name.partition("-")[0]: run for run in found}
    assert str(shown["first"].id) == task_run_id


async def test_a_handler_that_blocks_the_event_loop_keeps_no_other_task_from_hearing_of_it_and_its_upstream(
    define: Define, pgflow_dsn: str, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find_late(client: PrefectClient) -> list[RelatedResource]:
        await anyio.sleep(1)
        return await related_resources_from_run_context(client)

    monkeypatch.setattr(task_run_events, "related_resources_from_run_context", find_late)
    slug = make_slug()
    define(slug, ["first", "second"], [("first", "second")])
    workflow = Workflow(slug)

    def block_until(task_run_id: str, wanted: str) -> str:
        """Return the state that Prefect shows, once it is this one; nothing else runs in the event loop meanwhile."""
        deadline, state = time.monotonic() + 180, ""
        while state != wanted and time.monotonic() < deadline:
            time.sleep(0.1)
            answer = httpx.get(f"{prefect_api}/task_runs/{task_run_id}", timeout=10)
            state = answer.json()["state_name"] if answer.is_success else ""
        return state

    @workflow.step
    async def first() -> list[str]:
        return [str(runtime.id), block_until(str(runtime.id), "Running")]

    @workflow.step
    async def second(first: list[str]) -> list[str]:
        return [first[1], block_until(first[0], "Completed")]

    assert await workflow.flow() == {"second": ["Running", "Completed"]}


async def test_a_step_begins_in_the_flow_run_and_not_in_the_task_run_of_its_upstream(
    define: Define, pgflow_dsn: str, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    perform, found = RunExecutor.perform, list[object]()

    async def note(steps: RunExecutor, *arguments: Any) -> StepOutcome:
        found.append(TaskRunContext.get())
        return await perform(steps, *arguments)

    monkeypatch.setattr(RunExecutor, "perform", note)
    slug = make_slug()
    define(slug, ["first", "second"], [("first", "second")])
    await make_ours(slug).flow()
    assert found == [None, None]


async def test_a_step_that_is_interrupted_is_shown_as_crashed(
    define: Define, pgflow_dsn: str, client: PrefectClient
) -> None:
    slug = make_slug()
    define(slug, ["first"])
    workflow, begun = Workflow(slug), anyio.Event()

    @workflow.step()
    async def first() -> None:
        begun.set()
        await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        group.start_soon(workflow.flow, {})
        await begun.wait()
        group.cancel_scope.cancel()
    await await_task_runs(client, await read_flow_run(client, slug), {"first": "Crashed"})


@pytest.mark.parametrize("message", ["no way", "half a character: \ud800, and none: \0"], ids=["text", "no text"])
async def test_a_step_that_fails_says_so_in_its_state(
    message: str, define: Define, pgflow_dsn: str, client: PrefectClient
) -> None:
    slug = make_slug()
    define(slug, ["first"])
    workflow = Workflow(slug)

    @workflow.step()
    async def first() -> None:
        raise ValueError(message)

    with pytest.raises(RunFailedError):
        await workflow.flow({})
    shown = await await_task_runs(client, await read_flow_run(client, slug), {"first": "Failed"})
    assert shown["first"].state is not None
    assert f"ValueError: {message[:6]}" in (shown["first"].state.message or "")


async def test_what_a_handler_did_in_tasks_of_its_own_is_rolled_back_when_it_raises(
    define: Define, pgflow_dsn: str, prefect_api: str
) -> None:
    slug = make_slug()
    define(slug, ["first"])
    workflow, undone = Workflow(slug), []

    @task(persist_result=False)
    async def inner() -> None:
        pass

    @inner.on_rollback
    def undo(transaction: Transaction) -> None:
        undone.append("inner")

    @workflow.step()
    async def first() -> None:
        await inner()
        raise ValueError("no way")

    with pytest.raises(RunFailedError):
        await workflow.flow({})
    assert undone == ["inner"]
