"""What SIGTERM and Ctrl-C do: the main thread hears them, and tells an event loop in another thread.

In the main thread, Prefect's engine would have SIGTERM raise an exception wherever Python is at that moment: in a step,
in the event loop, between a task that is to be woken and the one that wakes it. Nothing could be drained, and what is
never woken never ends.
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

_CLOSING = 3.0  # seconds for closing the event loop, once all is done


class Switch:
    """Turns off what a process does: the first signal drains it, the second one stops it.

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
        """Name what the signals do, from within the event loop."""
        self._actions = (drain, stop)
        self._loop = asyncio.get_running_loop()
        for earlier in range(min(self.signals, 2)):
            self._actions[earlier]()

    def press(self, number: int, frame: FrameType | None = None) -> None:
        """Hear a signal."""
        self.signals += 1
        self.latest = number
        if self._loop is not None and self._actions is not None:
            with suppress(RuntimeError):  # the event loop has come to its end
                self._loop.call_soon_threadsafe(self._actions[min(self.signals, 2) - 1])
        if self.signals > 1:
            # A sync handler can't be stopped, and a thread of it would keep the process.
            timer = threading.Timer(_GRACE, os._exit, (128 + number,))
            timer.daemon = True
            timer.start()


def run_event_loop(function: Callable[..., Awaitable[T]], *arguments: object) -> T:
    """Run an async function that may execute flow runs, and return what it returns; a signal cancels it.

    Raises:
        KeyboardInterrupt: Ctrl-C has.
        SystemExit: SIGTERM has, with the exit code that is usual for it.
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
    """Run what goes on until it is told to stop, and return the exit code: 0, or 1 after a second signal."""
    switch = Switch()

    async def work() -> None:
        # Each flow run does this for itself, and takes it back when it ends: from all others, too.
        with patch_print():
            await serve(switch)

    _run_beside(switch, work)
    return 0 if switch.signals < 2 else 1  # noqa: PLR2004  the second signal


def _run_beside(switch: Switch, work: Callable[[], Awaitable[T]]) -> T:
    """Run an async function in a thread of its own while the main thread hears signals."""
    outcome = _Outcome(work)
    # A daemon, and so are the threads that it starts: the process is not to wait for what can't be stopped.
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
    """Tell whether the process would have to wait for handlers that were given up, for their threads or tasks."""
    return bool(count_given_up()) or any(thread.is_alive() for thread in _unclosed)


class _Outcome(Generic[T]):
    """What an async function returns or raises, known before its event loop is closed.

    Closing it waits for tasks that don't end when they are cancelled, and for the threads of `asyncio.to_thread`.
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
        """Return or raise it.

        Raises:
            PgflowPrefectError: it has raised SystemExit: with its code, a command could pass for one that is done.
        """
        if not self._failures:
            return self._results[0]
        failure = find_first(self._failures.pop())  # no traceback is to keep the list that has it
        if isinstance(failure, SystemExit):
            raise PgflowPrefectError(f"code outside of a step has raised SystemExit: {failure}") from failure
        raise failure


@contextmanager
def _hear(switch: Switch) -> Iterator[None]:
    """Have signals press the switch, for as long as the block takes."""
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    heard = [number for number, handler in former.items() if handler is not signal.SIG_IGN]  # as a shell's `&` has it
    for number in heard:
        signal.signal(number, switch.press)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, former[number] or signal.SIG_DFL)  # None: it is none of Python's
