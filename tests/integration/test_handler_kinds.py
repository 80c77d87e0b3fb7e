"""Handlers as people bring them along from Prefect: its functions, its states, generators."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from functools import wraps
from itertools import pairwise
from typing import Any
from uuid import uuid4

import anyio
import anyio.from_thread
import pytest
from prefect import get_run_logger
from prefect.artifacts import Artifact, create_markdown_artifact
from prefect.blocks.system import Secret
from prefect.client.orchestration import PrefectClient
from prefect.context import TaskRunContext
from prefect.states import Cancelled, Completed, Crashed, Failed, Running
from prefect.variables import Variable

from pgflow_prefect import StepContext, Workflow
from pgflow_prefect.errors import RunFailedError
from tests.conftest import Connection
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_steps

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]


def make_workflow(define: Define, *functions: Callable[..., Any], **options: Any) -> Workflow:
    """Return a workflow of these functions, each a step of its own, one after the other."""
    workflow = Workflow(make_slug())
    names = [function.__name__ for function in functions]
    define(workflow.slug, names, pairwise(names))
    for function in functions:
        workflow.step(function.__name__, **options)(function)
    return workflow


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate as many do: with a sync function around whatever it is."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def use_prefect(key: str) -> None:
    create_markdown_artifact("# done", key=key)
    Variable.set(key.replace("-", "_"), "42", overwrite=True)
    assert Variable.get(key.replace("-", "_")) == "42"
    Secret(value="hunter2").save(key, overwrite=True)
    loaded: Any = Secret.load(key)
    assert loaded.get() == "hunter2"
    get_run_logger().info("in a handler")
    context = TaskRunContext.get()
    assert context is not None
    assert not context.task.isasync


async def await_prefect(key: str) -> None:
    created: Any = create_markdown_artifact("# done", key=key)
    await created
    changed: Any = Variable.set(key.replace("-", "_"), "42", overwrite=True)
    await changed
    saved: Any = Secret(value="hunter2").save(key, overwrite=True)
    await saved
    loaded: Any = Secret.load(key)
    assert (await loaded).get() == "hunter2"
    context = TaskRunContext.get()
    assert context is not None
    assert context.task.isasync


@pytest.mark.parametrize("kind", ["sync", "async", "async behind a sync decorator", "sync, with a loop of its own"])
async def test_prefects_functions_do_in_a_handler_what_they_do_in_a_task(kind: str, define: Define) -> None:
    key = f"key-{uuid4().hex[:8]}"

    def sync_step() -> str:
        use_prefect(key)
        return "ok"

    async def async_step() -> str:
        await await_prefect(key)
        return "ok"

    def loop_step() -> str:
        async def nothing() -> None:
            await asyncio.sleep(0)

        asyncio.run(nothing())
        return sync_step()

    functions = {"sync": sync_step, "async": async_step, "sync, with a loop of its own": loop_step}
    workflow = make_workflow(define, functions.get(kind) or logged(async_step))

    assert [*(await workflow.flow()).values()] == ["ok"]
    assert await Variable.aget(key.replace("-", "_")) == "42"
    assert await Artifact.aget(key) is not None
    saved: Any = await Secret.aload(key)
    assert saved.get() == "hunter2"


STATES: dict[str, tuple[Any, str, int, str | None]] = {
    "Completed with data": (lambda: Completed(data=[1, 2]), "completed", 1, None),
    "Completed without": (Completed, "completed", 1, None),
    "several Completed": (lambda: [Completed(data=1), Completed(data=2)], "completed", 1, None),
    "Failed": (lambda: Failed(message="only 3 of 900 rows"), "failed", 2, "Failed: only 3 of 900 rows"),
    "Failed, of another name": (lambda: Failed(name="Short", message="3 rows"), "failed", 2, "Short: 3 rows"),
    "Failed with an exception": (lambda: Failed(data=ValueError("3 rows")), "failed", 2, "Failed: ValueError: 3 rows"),
    "Crashed": (lambda: Crashed(message="killed"), "failed", 1, "Crashed: killed"),
    "Cancelled": (lambda: Cancelled(message="not today"), "failed", 1, "Cancelled: not today"),
    "Running": (Running, "failed", 1, "the handler returned Prefect's state Running, which is no end: return a value"),
    "one of two": (lambda: (Completed(), Failed(message="3 rows")), "failed", 2, "Failed: 1 of 2 states: 3 rows"),
}
VALUES = {"Completed with data": [1, 2], "Completed without": None, "several Completed": [1, 2]}


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("name", STATES)
async def test_a_state_that_a_handler_returns_counts_as_what_it_is(
    name: str, kind: str, db: Connection, define: Define, client: PrefectClient
) -> None:
    make, status, attempts, message = STATES[name]

    def check() -> Any:
        return make()

    async def check_on_the_loop() -> Any:
        return make()

    def publish(upstream: dict[str, Any]) -> str:
        return "published"

    first = check if kind == "sync" else check_on_the_loop
    workflow = make_workflow(define, first, publish, retries=1)

    state = await workflow.flow(return_state=True)

    steps = read_steps(db)
    found = steps[first.__name__]
    assert found[:2] == (status, attempts)
    assert found[2] == VALUES.get(name)
    assert str(found[3]).startswith(message) if message else found[3] is None
    assert ("publish" in steps) is (status == "completed")
    assert state.is_completed() is (status == "completed")
    if name == "Failed, of another name":
        flow_run = await read_flow_run(client, workflow.slug)
        shown = await await_task_runs(client, flow_run, {first.__name__: "Short"})
        assert shown[first.__name__].state_type == "FAILED"
        assert "3 rows" in str(shown[first.__name__].state)


async def test_a_sync_generator_is_consumed_in_its_thread_and_times_out(db: Connection, define: Define) -> None:
    loop_thread = threading.get_ident()
    given_up = threading.Event()
    threads: set[int] = set()

    def pages() -> Iterator[int]:
        try:
            for number in range(100_000):
                threads.add(threading.get_ident())
                yield number
                time.sleep(0.01)
        finally:
            given_up.set()

    workflow = make_workflow(define, pages, timeout_seconds=0.3)
    with pytest.raises(RunFailedError, match=r"longer than 0\.3 s"):
        await workflow.flow()
    assert loop_thread not in threads
    # No task waits for it, and it does not go on for ever. A slow machine may not have begun it in that time.
    assert not threads or await asyncio.to_thread(given_up.wait, 60)


def yields() -> Generator[int, None, None]:
    yield from (1, 2)


def maps() -> Any:
    return map(abs, [-1, -2])


def nests() -> Any:
    return {"rows": (each for each in (1, 2))}


def annotated() -> list[int]:
    return (each for each in (1, 2))  # type: ignore[return-value]


async def gives_lazily() -> Any:
    return (each for each in (1, 2))


async def yields_async() -> AsyncIterator[int]:
    for each in (1, 2):
        await asyncio.sleep(0)
        yield each


@pytest.mark.parametrize("function", [yields, maps, nests, annotated, gives_lazily, yields_async, logged(yields_async)])
async def test_yielded_items_are_stored_as_a_list(function: Callable[..., Any], define: Define) -> None:
    workflow = make_workflow(define, function)
    [result] = (await workflow.flow()).values()
    assert result == ({"rows": [1, 2]} if function is nests else [1, 2])


async def test_an_item_that_does_not_fit_says_which(db: Connection, define: Define) -> None:
    def rows() -> Iterator[int]:
        yield 1
        yield "two"  # type: ignore[misc]

    with pytest.raises(RunFailedError, match="result does not fit its annotation: 1: Input should be a valid integer"):
        await make_workflow(define, rows).flow()


async def test_an_async_generator_times_out(db: Connection, define: Define) -> None:
    begun, closed = [], []

    async def rows() -> AsyncIterator[int]:
        begun.append(True)
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            closed.append(True)

    with anyio.fail_after(180), pytest.raises(RunFailedError, match="longer than"):
        await make_workflow(define, rows, timeout_seconds=0.2).flow()
    assert closed == begun, "a slow machine may not have begun it in that time"


async def test_a_sync_handler_reaches_the_event_loop_and_hears_of_its_time_out(db: Connection, define: Define) -> None:
    begun, heard = threading.Event(), threading.Event()

    async def answer() -> int:
        await asyncio.sleep(0)
        return 42

    def ask() -> int:
        return anyio.from_thread.run(answer)

    def wait(context: StepContext) -> None:
        begun.set()
        try:
            while True:
                anyio.from_thread.check_cancelled()
                time.sleep(0.01)
        finally:
            heard.set()

    assert await make_workflow(define, ask).flow() == {"ask": 42}
    with pytest.raises(RunFailedError, match="longer than"):
        await make_workflow(define, wait, timeout_seconds=0.2).flow()
    # A slow machine may not have begun it in that time.
    assert not begun.is_set() or await asyncio.to_thread(heard.wait, 60)
