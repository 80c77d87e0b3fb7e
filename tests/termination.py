"""SIGTERM ends a test session as Ctrl-C does: fixtures stop their servers, and remove what these have kept.

pytest-xdist gives its processes 15 seconds to end, which a busy machine does not keep: then their servers would stay.
So the process that the user has started waits for the others before pytest-xdist ends them.
"""

import fcntl
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

import psutil
import pytest

from tests.sharing import find_shared_directory

_PATIENCE = 600.0
"""Seconds for which the first process waits for the others: longer than these wait for each other."""

_PAUSE = 1.0
"""Seconds between two signals: the product's own handler may have got the one before."""


class Termination:
    """Turns the first SIGTERM of a process into a KeyboardInterrupt. Later ones do not interrupt the cleaning up."""

    def __init__(self) -> None:
        self.has_begun = False
        self._holds = 0
        self._is_due = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Act on SIGTERM, in the main thread."""
        if self._holds:
            self._is_due = True
        elif not self.has_begun:
            self.has_begun = True
            raise KeyboardInterrupt

    @contextmanager
    def delayed(self) -> Iterator[None]:
        """Let SIGTERM act behind this block, which would leave half a server."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._is_due and not self._holds:
            self._is_due = False
            self.handle(signal.SIGTERM, None)


TERMINATION = Termination()
"""That of this process."""

_session: list[IO[str]] = []
"""The file that is locked for as long as this process may have servers."""


def _find_lock() -> Path:
    return find_shared_directory() / "session"


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGTERM, TERMINATION.handle)
    if _is_worker(config):
        _session.append(_find_lock().open("w"))
        fcntl.flock(_session[0], fcntl.LOCK_SH)


def pytest_keyboard_interrupt() -> None:
    TERMINATION.has_begun = True


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let workers clean up, as pytest-xdist ends them next."""
    if TERMINATION.has_begun and session.config.pluginmanager.hasplugin("dsession"):
        _end_workers()


def tell_that_all_is_clean() -> None:
    """Let the first process end this one."""
    while _session:
        _session.pop().close()


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _end_workers() -> None:
    """Tell pytest-xdist's processes to end, until all have cleaned up."""
    deadline = time.monotonic() + _PATIENCE
    with _find_lock().open("w") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_PAUSE)  # Ctrl-C in a terminal reaches them by itself
                for process in psutil.Process().children():  # this process has no others
                    process.send_signal(signal.SIGTERM)
            else:
                return
