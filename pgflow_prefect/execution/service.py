"""A process that goes on until it is told to stop."""

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import FrameType

import anyio
from prefect.logging.loggers import patch_print

_GRACE = 3.0  # seconds for handing runs back, after the second signal


class Switch:
    """Turns a service off: the first signal drains it, the second one stops it."""

    def __init__(self) -> None:
        self.signals = 0
        self._actions: tuple[Callable[[], None], Callable[[], None]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self, *, drain: Callable[[], None], stop: Callable[[], None]) -> None:
        """Name what the signals do, from within the service's event loop."""
        self._actions = (drain, stop)
        self._loop = asyncio.get_running_loop()
        for earlier in range(min(self.signals, 2)):
            self._actions[earlier]()

    def press(self, number: int, frame: FrameType | None = None) -> None:
        """Hear a signal."""
        self.signals += 1
        if self._loop is not None and self._actions is not None:
            with suppress(RuntimeError):  # the service has come to its end
                self._loop.call_soon_threadsafe(self._actions[min(self.signals, 2) - 1])
        if self.signals > 1:
            # A sync handler can't be stopped, and a thread of it would keep the process.
            timer = threading.Timer(_GRACE, os._exit, (128 + number,))
            timer.daemon = True
            timer.start()


def run_service(serve: Callable[[Switch], Awaitable[None]]) -> int:
    """Run a service to its end and return the exit code: 0, or 1 after a second signal.

    Its event loop is another thread's: where a flow run executes in the main thread, Prefect's engine has SIGTERM
    raise an exception there, and nothing could be drained.
    """
    switch = Switch()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            # Each flow run does this for itself, and takes it back when it ends: from all others, too.
            with patch_print():
                anyio.run(serve, switch)
        except BaseException as error:  # noqa: BLE001  raised again, in the main thread
            failures.append(error)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, switch.press)
    thread = threading.Thread(target=work, name="pgflow-service")
    thread.start()
    thread.join()
    if failures:
        failure = failures[0]
        while isinstance(failure, BaseExceptionGroup):  # what a task raised, and not that one did
            failure = failure.exceptions[0]
        raise failure
    return 0 if switch.signals < 2 else 1  # noqa: PLR2004  the second signal
