"""Whatever a handler raises ends its attempt at once, with type and text, and neither its process nor its run."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.exceptions import Abort, Pause

from pgflow_prefect import AsyncStepContext, StepContext, Workflow
from pgflow_prefect.errors import RunFailedError
from tests.conftest import Connection
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_run, read_steps

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]


class PanicError(BaseException):
    """As a library in Rust raises it."""


class MuteError(Exception):
    """Its text needs what is not there."""

    def __str__(self) -> str:
        raise AttributeError("no response")


class MumblingError(Exception):
    def __repr__(self) -> str:
        sys.exit("no repr")


class GoneError(BaseException):
    def __str__(self) -> str:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int


class DeafError(Exception):
    def __getattribute__(self, name: str) -> object:
        raise RuntimeError("no attributes")


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def exhaust() -> None:
    next(iter([]))


RAISED: dict[str, tuple[Callable[[], None], str]] = {
    "sys.exit with a text": (lambda: sys.exit("config file missing"), "SystemExit: config file missing"),
    "sys.exit with 0": (lambda: sys.exit(0), "SystemExit: 0"),
    "KeyboardInterrupt": (raising(KeyboardInterrupt()), "KeyboardInterrupt"),
    "GeneratorExit": (raising(GeneratorExit()), "GeneratorExit"),
    "a panic": (raising(PanicError("index out of bounds")), "PanicError: index out of bounds"),
    "Abort": (raising(Abort("not now")), "Abort: not now"),
    "Pause": (raising(Pause("until approval")), "Pause: until approval"),
    "CancelledError": (raising(asyncio.CancelledError()), "CancelledError: a task or a future that the handler"),
    "StopIteration": (exhaust, "StopIteration: next() found no further item"),
    "StopAsyncIteration": (raising(StopAsyncIteration("no more")), "StopAsyncIteration: no more"),
    "no text": (raising(MuteError()), "MuteError: its str() raises"),
    "no repr": (raising(MumblingError("lost")), "MumblingError: lost"),
    "frozen": (raising(FrozenError(7)), "FrozenError: 7"),
    "no attributes": (raising(DeafError("lost")), "DeafError: lost"),
    "neither": (raising(GoneError()), "GoneError: its str() raises"),
    "a group": (
        raising(BaseExceptionGroup("two", [SystemExit(1), ConnectionError("host 2 refused")])),
        "BaseExceptionGroup: two (2 sub-exceptions): SystemExit: 1; ConnectionError: host 2 refused",
    ),
}


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("name", RAISED)
async def test_whatever_is_raised_fails_the_attempt_and_another_one_may_succeed(
    name: str, kind: str, db: Connection, define: Define, client: PrefectClient
) -> None:
    fail, message = RAISED[name]
    workflow = Workflow(make_slug())
    define(workflow.slug, ["hopeless", "shaky"], [("shaky", "hopeless")])

    def work(context: StepContext | AsyncStepContext) -> int:
        if context.step_slug == "hopeless" or context.attempt == 1:
            fail()
        return context.attempt

    async def work_on_the_loop(context: AsyncStepContext) -> int:
        return work(context)

    for step in ("hopeless", "shaky"):
        workflow.step(step, retries=1)(work if kind == "sync" else work_on_the_loop)

    with anyio.fail_after(180), pytest.raises(RunFailedError) as raised:
        await workflow.flow()

    steps = read_steps(db)
    assert steps["shaky"][:3] == ("completed", 2, 2)
    assert steps["hopeless"][:2] == ("failed", 2)
    assert str(steps["hopeless"][3]).startswith(message)
    assert message in str(raised.value)
    assert read_run(db)[0] == "failed"
    shown = await await_task_runs(
        client, await read_flow_run(client, workflow.slug), {"hopeless": "Failed", "shaky": "Completed"}
    )
    assert message in str(shown["hopeless"].state and shown["hopeless"].state.message)


async def cancel_a_child() -> None:
    child = asyncio.create_task(asyncio.sleep(30))
    await asyncio.sleep(0)
    child.cancel()
    await child


async def cancel_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(30)


async def cancel_itself_and_raise() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    raise asyncio.CancelledError


async def exit_in_a_child() -> None:
    async def leave() -> None:
        await asyncio.sleep(0)
        sys.exit("no licence")

    await asyncio.create_task(leave())


async def exit_in_a_group() -> None:
    async def leave() -> None:
        sys.exit("no licence")

    async with asyncio.TaskGroup() as group:
        group.create_task(leave())
        group.create_task(asyncio.sleep(30))


async def exit_in_a_scope() -> None:
    async def leave() -> None:
        raise KeyboardInterrupt

    async with anyio.create_task_group() as group:
        group.start_soon(leave)
        await anyio.sleep_forever()


ON_THE_LOOP: dict[str, tuple[Callable[[], Awaitable[None]], str]] = {
    "a cancelled child": (cancel_a_child, "CancelledError: a task or a future"),
    "itself cancelled": (cancel_itself, "CancelledError: a task or a future"),
    "itself cancelled, and raised": (cancel_itself_and_raise, "CancelledError: a task or a future"),
    "a child that exits": (exit_in_a_child, "SystemExit: no licence"),
    "one of a group that exits": (exit_in_a_group, "SystemExit: no licence"),
    "one in a scope that is interrupted": (exit_in_a_scope, "KeyboardInterrupt"),
}


@pytest.mark.parametrize("name", ON_THE_LOOP)
async def test_what_tasks_of_a_handler_raise_fails_its_step_and_no_other(
    name: str, db: Connection, define: Define
) -> None:
    fail, message = ON_THE_LOOP[name]
    workflow = Workflow(make_slug())
    define(workflow.slug, ["beside", "broken"])
    has_failed = anyio.Event()

    @workflow.step
    async def broken() -> None:
        try:
            await fail()
        finally:
            has_failed.set()

    @workflow.step
    async def beside() -> str:
        await has_failed.wait()
        await anyio.lowlevel.checkpoint()
        return "to its end"

    with anyio.fail_after(180), pytest.raises(RunFailedError):
        await workflow.flow()

    steps = read_steps(db)
    assert steps["broken"][:2] == ("failed", 1)
    assert message in str(steps["broken"][3])
    assert read_run(db)[0] == "failed"


async def test_a_handler_that_cancels_its_own_task_and_returns_has_completed(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["hasty", "after"], [("hasty", "after")])

    @workflow.step
    async def hasty() -> int:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return 1

    @workflow.step
    async def after(hasty: int) -> int:
        return hasty + 1

    assert await workflow.flow() == {"after": 2}


@pytest.mark.parametrize("how", ["cancelled anew", "another exception"])
async def test_what_a_handler_makes_of_its_time_out_ends_the_attempt(how: str, db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["slow"])

    @workflow.step(timeout_seconds=0.1)
    async def slow() -> None:
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            if how == "cancelled anew":
                raise asyncio.CancelledError from None
            raise ConnectionError("closed in the midst") from None

    with anyio.fail_after(180), pytest.raises(RunFailedError):
        await workflow.flow()
    message = read_steps(db)["slow"][3]
    assert ("longer than 0.1 s" if how == "cancelled anew" else "ConnectionError: closed in the midst") in message


async def test_a_flow_that_is_cancelled_from_outside_still_stops_its_handlers(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["first", "second"])
    begun, ended = [], []

    async def work(context: AsyncStepContext) -> None:
        begun.append(context.step_slug)
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(context.step_slug)

    for step in ("first", "second"):
        workflow.step(step)(work)

    flow: asyncio.Task[Any] = asyncio.create_task(workflow.flow())
    with anyio.fail_after(180):
        while len(begun) < 2:
            await anyio.sleep(0.01)
        flow.cancel()
        with pytest.raises(BaseException):  # noqa: B017, PT011  what Prefect makes of it
            await flow
    assert sorted(ended) == ["first", "second"]
    assert {slug: step[0] for slug, step in read_steps(db).items()} == {"first": "pending", "second": "pending"}
    assert read_run(db)[0] == "pending"
