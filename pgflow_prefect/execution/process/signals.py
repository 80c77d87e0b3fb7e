"""Handles SIGTERM and Ctrl-C: the main thread gets them, and tells an event loop in another thread.

In the main thread, Prefect's engine would make SIGTERM raise an exception wherever Python is at that moment: in a step,
in the event loop, or just before one task wakes another. The process could not drain, and a task that is never woken
never ends.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from types import FrameType
from typing import Generic, TypeVar

import anyio

from pgflow_prefect.errors import PgflowPrefectError, find_first
from pgflow_prefect.handlers.threads import count_given_up
from pgflow_prefect.prefect_api.internals import patch_print

T = TypeVar("T")

_GRACE = 3.0  # seconds for handing runs back, after the second signal

_CLOSING = 3.0  # seconds for closing the event loop, once its work is done


class Switch:
    """Turns a process off: the first signal drains it, the second one stops it.

    Attributes:
        signals: how many have come.
        latest: the number of the last one.
    """

    def __init__(self) -> None:
        """Begin with no signal."""
        self.signals = 0
        self.latest: int | None = None
        self._actions: tuple[Callable[[], object], Callable[[], object]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self, *, drain: Callable[[], object], stop: Callable[[], object]) -> None:
        """Set what the signals do, from within the event loop."""
        self._actions = (drain, stop)
        self._loop = asyncio.get_running_loop()
        for earlier in range(min(self.signals, 2)):
            self._actions[earlier]()

    def press(self, number: int, frame: FrameType | None = None) -> None:
        """Act on a signal."""
        self.signals += 1
        self.latest = number
        if self._loop is not None and self._actions is not None:
            with suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._actions[min(self.signals, 2) - 1])
        if self.signals > 1:
            # A sync handler can't be stopped, and its thread would keep the process alive.
            timer = threading.Timer(_GRACE, os._exit, (128 + number,))
            timer.daemon = True
            timer.start()


def run_event_loop(function: Callable[..., Awaitable[T]], *arguments: object) -> T:
    """Run an async function that may execute flow runs, and return its result; a signal cancels it.

    Raises:
        KeyboardInterrupt: Ctrl-C has cancelled it.
        SystemExit: SIGTERM has cancelled it; the exit code is the usual one for SIGTERM.
    """
    switch = Switch()

    async def work() -> T:
        task = asyncio.current_task()
        assert task is not None
        switch.attach(drain=task.cancel, stop=task.cancel)
        return await function(*arguments)

    try:
        return _run_beside(switch, work)
    except asyncio.CancelledError:
        if switch.latest is None:
            raise
        if switch.latest == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + switch.latest) from None


def run_service(serve: Callable[[Switch], Awaitable[None]]) -> int:
    """Run a service until a signal stops it, and return the exit code: 0, or 1 after a second signal."""
    switch = Switch()

    async def work() -> None:
        # Each flow run does this for itself, and undoes it at its end: for all other flow runs, too.
        with patch_print():
            await serve(switch)

    _run_beside(switch, work)
    return 0 if switch.signals < 2 else 1  # noqa: PLR2004  the second signal


def _run_beside(switch: Switch, work: Callable[[], Awaitable[T]]) -> T:
    """Run an async function in a thread of its own while the main thread waits for signals."""
    outcome = _Outcome(work)
    # A daemon, and so are the threads that it starts: the process must not wait for a thread that can't be stopped.
    thread = threading.Thread(target=copy_context().run, args=(outcome.run,), name="pgflow-event-loop", daemon=True)
    with _hear(switch):
        thread.start()
        outcome.is_known.wait()
        thread.join(_CLOSING)
    if thread.is_alive():
        _unclosed.append(thread)
    return outcome.get()


_unclosed: list[threading.Thread] = []


def is_held_up() -> bool:
    """Tell whether the process would have to wait for threads or tasks of abandoned handlers."""
    return bool(count_given_up()) or any(thread.is_alive() for thread in _unclosed)


class _Outcome(Generic[T]):
    """The result or error of an async function, known before its event loop is closed.

    Closing the loop waits for tasks that don't end when they are cancelled, and for threads of `asyncio.to_thread`.
    """

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self.is_known = threading.Event()
        self._work = work
        self._results: list[T] = []
        self._failures: list[BaseException] = []

    def run(self) -> None:
        try:
            anyio.run(self._note)
        except BaseException as error:  # noqa: BLE001  raised again, in the main thread
            if not self.is_known.is_set():
                self._failures.append(error)
        finally:
            self.is_known.set()

    async def _note(self) -> None:
        try:
            self._results.append(await self._work())
        except BaseException as error:  # noqa: BLE001  likewise
            self._failures.append(error)
        self.is_known.set()

    def get(self) -> T:
        """Return the result or raise the error.

        Raises:
            PgflowPrefectError: the function raised SystemExit, whose code could make the command look successful.
        """
        if not self._failures:
            return self._results[0]
        failure = find_first(self._failures.pop())  # no traceback may keep the list that has the error
        if isinstance(failure, SystemExit):
            raise PgflowPrefectError(f"code outside of a step has raised SystemExit: {failure}") from failure
        raise failure


@contextmanager
def _hear(switch: Switch) -> Iterator[None]:
    """Let signals press the switch until the block ends."""
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    heard = [number for number, handler in former.items() if handler is not signal.SIG_IGN]  # as after a shell's `&`
    for number in heard:
        signal.signal(number, switch.press)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, former[number] or signal.SIG_DFL)  # None: Python did not install the handler
