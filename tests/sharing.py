"""Servers that all processes of a test session use: the first one that needs a server starts it.

pytest-xdist runs tests in several processes. A server of each one's own would cost more than most tests.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO

_DIRECTORY = "PGFLOW_TEST_SHARED"
_PATIENCE = 300.0
"""Seconds for which the process that has started a server waits for the others: longer than any test takes."""


def choose_directory(path: str) -> None:
    """Share servers in this directory, unless this process was told of another one by the process that started it."""
    os.environ.setdefault(_DIRECTORY, path)


def find_shared_directory() -> Path:
    """Return the directory that all processes of a test session share."""
    return Path(os.environ[_DIRECTORY])


@contextmanager
def share(name: str, start: Callable[[], AbstractContextManager[str]]) -> Iterator[str]:
    """Yield the address of a server that all processes share.

    The process that has started it stops it, once no other one uses it any more. What comes after that starts another.

    Args:
        name: of the server.
        start: starts it, yields its address and stops it.
    """
    directory = find_shared_directory()
    address = directory / f"{name}.address"
    server = ExitStack()
    is_ours = False
    with (directory / f"{name}.starts").open("w") as starts, (directory / f"{name}.uses").open("w") as uses:
        try:
            with _locked(starts):
                is_ours = not address.exists()
                if is_ours:
                    address.write_text(server.enter_context(start()), encoding="utf-8")
                fcntl.flock(uses, fcntl.LOCK_SH)
                found = address.read_text(encoding="utf-8")
            yield found
        finally:
            if is_ours:
                with _used_by_no_other(starts, uses), server:
                    address.unlink(missing_ok=True)


@contextmanager
def _locked(file: IO[str]) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def _used_by_no_other(starts: IO[str], uses: IO[str]) -> Iterator[None]:
    """Wait until no other process uses the server; until the block ends, none begins to."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        with _locked(starts):
            try:
                fcntl.flock(uses, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "another process of these tests still uses the server"
            else:
                yield
                return
        time.sleep(0.1)
