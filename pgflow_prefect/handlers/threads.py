"""The threads of sync handlers: daemons, because a process must not wait for a thread abandoned after a time-out."""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

from anyio import CancelScope
from anyio._core._eventloop import claim_worker_thread, get_async_backend, threadlocals
from anyio.lowlevel import checkpoint_if_cancelled

T = TypeVar("T")

_IDLE_TIME = 10.0  # seconds after which a thread without work ends

_IN_THREAD: ContextVar[bool] = ContextVar("in_thread_of_a_handler", default=False)

_numbers = count(1)
_lock = threading.Lock()
_idle: "deque[_Worker]" = deque()
_given_up: "set[_Job]" = set()


def is_in_thread() -> bool:
    """Tell whether a sync handler calls this, from its own thread."""
    return _IN_THREAD.get()


def count_given_up() -> int:
    """Return how many threads still execute abandoned handlers."""
    return len(_given_up)


async def run_in_thread(function: Callable[[], T]) -> T:
    """Call a function in a daemon thread, in this context, and return its result.

    A thread can't be stopped: after a cancellation, the function goes on until it or the process ends.
    `anyio.from_thread` works in it, and so does `check_cancelled`.

    Raises:
        BaseException: the function raised it.
    """
    await checkpoint_if_cancelled()
    with CancelScope() as scope:
        job = _Job(function, scope)
        _find_worker().jobs.put(job)
        try:
            await job.ended
        except asyncio.CancelledError:
            job.give_up()
            raise
        return cast("T", job.get_result())
    raise AssertionError("no code cancels this scope itself")


class _Job:
    """One call, which a thread makes and an event loop waits for."""

    def __init__(self, function: Callable[[], Any], scope: CancelScope) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._function = function
        self._scope = scope
        self._backend = get_async_backend()
        self._context = _make_context()
        self._result: Any = None
        self._error: BaseException | None = None
        self._is_through = False

    def perform(self) -> None:
        """Make the call, in its thread."""
        with self._claim():
            try:  # inside: a frozen exception can't pass a context manager of contextlib
                self._result = self._context.run(self._function)
            except BaseException as error:  # noqa: BLE001  raised where it is waited for
                self._error = error

    def report(self) -> None:
        """Wake the waiting task."""
        with _lock:
            self._is_through = True
            _given_up.discard(self)
        with suppress(RuntimeError):  # the event loop has ended
            self.ended.get_loop().call_soon_threadsafe(self._wake)

    def give_up(self) -> None:
        """Stop waiting for it."""
        with _lock:
            if not self._is_through:
                _given_up.add(self)

    def get_result(self) -> Any:  # noqa: ANN401  what the function returned
        """Return the function's result or raise its error."""
        # Not the future's own error: a future refuses StopIteration, and GeneratorExit would close all waiting tasks.
        error, self._error = self._error, None
        if error is None:
            return self._result
        try:
            raise error
        finally:
            del error  # its traceback has this frame

    def _wake(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    @contextmanager
    def _claim(self) -> Iterator[None]:
        """Let `anyio.from_thread` find the event loop, as in a thread of anyio."""
        with claim_worker_thread(self._backend, self.ended.get_loop()):
            threadlocals.current_cancel_scope = self._scope
            try:
                yield
            finally:
                del threadlocals.current_cancel_scope


class _Worker:
    """A thread that waits for jobs."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[_Job] = SimpleQueue()
        threading.Thread(target=self._run, name=f"pgflow-handler-{next(_numbers)}", daemon=True).start()

    def _run(self) -> None:
        while (job := self._get()) is not None:
            job.perform()
            with _lock:
                _idle.append(self)  # first, so that the next step finds it
            job.report()
            del job

    def _get(self) -> _Job | None:
        while True:
            try:
                return self.jobs.get(timeout=_IDLE_TIME)
            except Empty:
                with _lock:
                    if self in _idle:
                        _idle.remove(self)
                        return None  # else a job is on its way


def _find_worker() -> _Worker:
    with _lock:
        worker = _idle.pop() if _idle else None
    return worker or _Worker()


def _make_context() -> Context:
    context = copy_context()
    context.run(_IN_THREAD.set, True)
    with suppress(ImportError):
        import sniffio  # noqa: PLC0415  not everywhere

        context.run(sniffio.current_async_library_cvar.set, None)
    return context


def _forget_threads() -> None:
    """Forget the threads in a forked child, which has none of them."""
    global _lock  # noqa: PLW0603  another thread may have held it
    _lock = threading.Lock()
    _idle.clear()
    _given_up.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
