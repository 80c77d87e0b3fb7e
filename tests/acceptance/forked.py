"""Commands in processes of their own that are forked off one that has imported Prefect: see `forker.py`."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4


class ForkedProcess:
    """A command that was started: what `subprocess.Popen` has, as far as it is needed."""

    def __init__(self, answers: socket.socket) -> None:
        self._socket = answers
        self._answers = answers.makefile("rb", buffering=0)
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while it goes on."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, -9 for who was killed, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not ended within so many seconds.
        """
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._socket.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forker:
    """Starts commands; may be used from several threads."""

    def __init__(self, address: Path) -> None:
        self._address = str(address)

    def fork(
        self, arguments: Sequence[str], directory: Path, environment: Mapping[str, str], *files: IO[bytes]
    ) -> ForkedProcess:
        """Start `python -m pgflow_prefect` with arguments, in a directory, with three files to read and write."""
        wish = json.dumps([arguments, str(directory), dict(environment)]).encode()
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        connection.sendall(len(wish).to_bytes(4, "big"))
        sent = socket.send_fds(connection, [wish], [file.fileno() for file in files])
        connection.sendall(wish[sent:])
        return ForkedProcess(connection)


@contextmanager
def open_forker(directory: Path) -> Iterator[Forker]:
    """Start the process that is forked, and end it with the block."""
    address = directory / f"forker_{uuid4().hex[:8]}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(16)
        process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forker.py"), str(listener.fileno())],
            stdin=subprocess.PIPE,  # it ends when this does, whatever becomes of the tests
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
    try:
        yield Forker(address)
    finally:
        process.communicate()
        assert process.returncode == 0
