"""Contains the exceptions of handlers: they end the attempt, but not the event loop or the process."""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar, cast

from anyio import current_effective_deadline
from anyio.lowlevel import checkpoint_if_cancelled

from pgflow_prefect.handlers.raised import is_from_signal, make_ordinary

T = TypeVar("T")

_IS_OF_A_HANDLER: ContextVar[bool] = ContextVar("is_of_a_handler", default=False)

AnyCoroutine = Coroutine[Any, Any, Any]


def _always() -> bool:
    return True


async def contain(work: Awaitable[T], is_broken_off: Callable[[], bool] = _always) -> T:
    """Return a handler's result. If the handler raises anything, raise an ordinary exception.

    A signal still ends the process. A cancellation from outside still stops the handler.

    Args:
        work: of the handler.
        is_broken_off: tells whether this task is being cancelled from outside without a cancel scope.

    Raises:
        HandlerRaisedError: the handler's error is no `Exception`, or can't be printed.
        Exception: any other error of the handler.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        result = await _contain_subtasks(work)
    except BaseException as error:
        if is_from_signal(error):
            raise
        if issubclass(type(error), asyncio.CancelledError):  # not `isinstance`, which an exception may answer itself
            # A cancelled scope knows its own cancellation only; the handler may have raised another one.
            await checkpoint_if_cancelled()
            if task.cancelling() > before and is_broken_off():
                raise
        await _drop_own_cancellation(task, before, is_broken_off)
        if (ordinary := make_ordinary(error)) is error:
            raise
        raise ordinary from ordinary.__cause__
    await _drop_own_cancellation(task, before, is_broken_off)
    return result


async def _drop_own_cancellation(task: "asyncio.Task[Any]", before: int, is_broken_off: Callable[[], bool]) -> None:
    """Drop the cancellation of a handler that has cancelled its own task. It would stop our own code."""
    if task.cancelling() <= before or is_broken_off() or current_effective_deadline() == -math.inf:
        return
    while task.cancelling() > before:
        task.uncancel()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)  # before Python 3.13, it is still to come


async def _contain_subtasks(work: Awaitable[T]) -> T:
    """Await this, and contain the exceptions of the tasks that it starts.

    asyncio ends its event loop if a task raises `SystemExit` or `KeyboardInterrupt`. That would end all runs of the
    process. Tasks of a handler raise a `HandlerRaisedError` instead.

    This is no context manager of contextlib, because that sets the traceback of an exception, which may be frozen.
    """
    loop = asyncio.get_running_loop()
    factory = loop.get_task_factory()
    if not isinstance(factory, _TaskFactory):
        loop.set_task_factory(cast("Any", _TaskFactory(factory)))
    token = _IS_OF_A_HANDLER.set(True)
    try:
        return await work
    finally:
        _IS_OF_A_HANDLER.reset(token)


class _TaskFactory:
    """A task factory that contains the tasks of handlers.

    It stays with the event loop, because a task may outlive its handler and start others.
    """

    def __init__(self, former: Callable[..., Any] | None) -> None:
        self._make = former or _make_task

    def __call__(self, loop: asyncio.AbstractEventLoop, coroutine: AnyCoroutine, **options: Any) -> Any:  # noqa: ANN401
        if _IS_OF_A_HANDLER.get() and inspect.iscoroutine(coroutine):
            coroutine = _Contained(coroutine)
        return self._make(loop, coroutine, **options)


def _make_task(loop: asyncio.AbstractEventLoop, coroutine: AnyCoroutine, **options: object) -> "asyncio.Task[Any]":
    return asyncio.Task(coroutine, loop=loop, **cast("dict[str, Any]", options))


class _Contained(Coroutine[Any, Any, Any]):
    """A coroutine that replaces exceptions that would end asyncio's event loop by ordinary ones.

    It does not wrap another coroutine: if the task were cancelled before it began, that one would never be awaited.
    """

    def __init__(self, coroutine: AnyCoroutine) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Any:  # noqa: ANN401
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  for tracebacks and names: `cr_frame`, `__qualname__`
        return getattr(self._coroutine, name)

    def send(self, value: Any) -> Any:  # noqa: ANN401
        try:
            return self._coroutine.send(value)
        except (SystemExit, KeyboardInterrupt) as error:
            if is_from_signal(error):
                raise
            raise make_ordinary(error) from error

    def throw(
        self,
        kind: Any,  # noqa: ANN401  an exception, or its type in the former signature
        value: BaseException | object = None,
        traceback: TracebackType | None = None,
    ) -> Any:  # noqa: ANN401
        try:
            if value is None and traceback is None:
                return self._coroutine.throw(kind)
            return self._coroutine.throw(kind, value, traceback)
        except (SystemExit, KeyboardInterrupt) as error:
            if is_from_signal(error):
                raise
            raise make_ordinary(error) from error

    def close(self) -> None:
        self._coroutine.close()
