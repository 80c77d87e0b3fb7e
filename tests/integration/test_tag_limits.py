"""Limits on tags, which Prefect keeps: how many tasks run at the same time, and no task that waits for ever."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest
from prefect import tags
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import State
from prefect.concurrency import _asyncio as prefects_limits
from prefect.concurrency.asyncio import concurrency
from prefect.task_runners import ThreadPoolTaskRunner

from pgflow_prefect import Settings, Workflow
from tests.conftest import Connection
from tests.engine import complete, run_workflow, value
from tests.integration.conftest import Define, make_slug, read_steps
from tests.integration.waiting import TIMEOUT, WAITING, await_value, going, note_active_runs

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

STEPS = ["one", "two", "three"]


@pytest.fixture
def workflow(define: Define) -> Workflow:
    """Three steps side by side."""
    workflow = Workflow(make_slug())
    define(workflow.slug, STEPS)
    return workflow


@pytest.fixture
async def tag(client: PrefectClient) -> str:
    """A tag of which one task runs at a time."""
    name = make_slug()
    await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=f"tag:{name}", limit=1))
    return name


async def test_one_step_works_at_a_time(workflow: Workflow, tag: str) -> None:
    working = most = 0

    async def work() -> None:
        nonlocal working, most
        working += 1
        most = max(most, working)
        await anyio.sleep(0.05)
        working -= 1

    for step in STEPS:
        workflow.step(step)(work)
    with tags(tag), anyio.fail_after(TIMEOUT):
        await workflow.flow({})
    assert most == 1


async def test_a_step_asks_for_a_slot_once_its_upstream_has_given_it_back(
    define: Define, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    @asynccontextmanager
    async def note(*arguments: Any, **options: Any) -> AsyncIterator[None]:
        log.append("asked")
        async with concurrency(*arguments, **options):
            yield
        log.append("given back")

    monkeypatch.setattr("pgflow_prefect.execution.reporting.tag_limits.concurrency", note)
    workflow = Workflow(make_slug())
    define(workflow.slug, STEPS, [("one", "two"), ("two", "three")])
    for step in STEPS:

        @workflow.step(step)
        async def work() -> None: ...

    with tags(tag), anyio.fail_after(TIMEOUT):
        await workflow.flow({})
    assert log == ["asked", "given back"] * 3


async def test_a_step_that_others_have_done_ends_while_all_the_rest_waits_for_its_slot(
    workflow: Workflow, tag: str, db: Connection
) -> None:
    flow, run_id = workflow.make_flow(Settings(concurrency=1)), run_workflow(db, workflow.slug).id
    with tags(tag), anyio.fail_after(TIMEOUT):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: flow(run_id=run_id))
            await await_value(db, 1, WAITING)
            for step in STEPS:
                complete(db, run_id, step)
    assert {status for status, *_ in read_steps(db).values()} == {"completed"}


async def test_a_drained_run_begins_none_that_waits_for_a_slot(
    workflow: Workflow, tag: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = note_active_runs(monkeypatch)
    begun: list[str] = []
    ended: list[State] = []
    go_on = anyio.Event()

    async def work() -> None:
        begun.append("a step")
        active[0].drain()
        await go_on.wait()

    for step in STEPS:
        workflow.step(step)(work)

    async def run() -> None:
        ended.append(await workflow.flow({}, return_state=True))

    with tags(tag), anyio.fail_after(TIMEOUT):
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await await_value(db, 1, "SELECT count(*) FROM pgflow.step_states WHERE started_at IS NOT NULL")
            go_on.set()
    assert len(begun) == 1
    assert [state.name for state in ended] == ["HandedBack"]
    assert value(db, "SELECT count(*) FROM pgflow.step_states WHERE status = 'completed'") == 1


async def test_a_prefect_server_that_is_away_when_a_slot_is_given_back_breaks_nothing_off(
    workflow: Workflow, tag: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    give_back = prefects_limits.arelease_concurrency_slots_with_lease

    async def lose(*arguments: object, **named: object) -> None:
        await give_back(*arguments, **named)  # type: ignore[arg-type]
        raise httpx.ConnectError("no server there")

    monkeypatch.setattr(prefects_limits, "arelease_concurrency_slots_with_lease", lose)

    @workflow.step
    async def one() -> int:
        return 1

    @workflow.step
    async def two() -> int:
        return 2

    @workflow.step
    async def three() -> int:
        return 3

    with tags(tag), anyio.fail_after(TIMEOUT):
        assert await workflow.flow({}) == {"one": 1, "two": 2, "three": 3}
    assert sum("is free once its lease ends" in message for message in caplog.messages) == len(STEPS)


@pytest.mark.parametrize("task_runner", [None, ThreadPoolTaskRunner()], ids=["our engine", "Prefect's engine"])
async def test_only_steps_with_a_limited_tag_of_their_own_wait_for_each_other(
    define: Define, tag: str, task_runner: Any
) -> None:
    workflow = Workflow(make_slug(), task_runner=task_runner)
    define(workflow.slug, ["a", "b", "free", "end"], [("a", "end"), ("free", "end")])
    working: list[str] = []
    most: list[int] = []
    free_is_done = threading.Event()

    def work(name: str) -> None:
        working.append(name)
        most.append(len(working))
        assert free_is_done.wait(TIMEOUT), "the step without the tag waits for a slot"
        working.remove(name)

    @workflow.step(tags=[tag, "not-limited"])
    def a() -> None:
        work("a")

    @workflow.step(tags=[tag])
    def b() -> None:
        work("b")

    @workflow.step(tags=["not-limited"])
    def free() -> None:
        free_is_done.set()

    @workflow.step
    def end(a: None) -> str:
        return "done"

    with anyio.fail_after(TIMEOUT):
        assert (await workflow.flow({}))["end"] == "done"
    assert most == [1, 1]


async def test_a_step_that_waits_for_its_slot_holds_no_claim_and_ends_with_its_run(
    define: Define, tag: str, db: Connection, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["one", "look"])
    has_looked = anyio.Event()

    @workflow.step(tags=[tag])
    async def one() -> None:
        raise AssertionError("another program has the only slot")

    @workflow.step
    async def look() -> None:
        has_looked.set()

    async with concurrency([f"tag:{tag}"]), going(workflow, db) as run:
        await has_looked.wait()
        await await_value(db, 1, "SELECT count(*) FROM pgflow.step_states WHERE status = 'completed'")
        assert value(db, "SELECT attempts FROM pgflow.step_states WHERE step_slug = 'one'") == 0
        value(db, "SELECT pgflow.cancel_run(%s, 'cancelled: enough')", run.run_id)
    assert run.ended.name == "Cancelled"
    assert (await client.read_global_concurrency_limit_by_name(f"tag:{tag}")).active_slots == 0
