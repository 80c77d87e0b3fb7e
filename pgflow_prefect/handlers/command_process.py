"""Starts a program under a supervisor, reads its output, and ends it with everything that it has started."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import anyio
from anyio import move_on_after

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""

_ENDING = 20.0  # seconds to wait for the supervisor: the grace, the time that it takes to kill, and some more
_IDLE, _SHORT_IDLE = 60.0, 5.0  # seconds without output after the end; the short one if a process may be left
_CHUNK = 1 << 16  # bytes
_SOON = 0.005  # seconds
_SUPERVISOR = str(Path(__file__).with_name("command_supervisor.py"))
_LOADER = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")
"""Variables that Python itself may need to start. The program does not get them."""

Consumer = Callable[[bytes], Awaitable[None]]
"""Takes a chunk of output."""


@dataclass(frozen=True)
class Launch:
    """A program that is to be started.

    Attributes:
        program: the path of its file.
        argv: its name and its arguments.
        env: its whole environment.
        cwd: its working directory; None for this process's.
        scratch: a directory of its own. If this process dies, the supervisor removes it.
    """

    program: str
    argv: Sequence[str]
    env: Mapping[str, bytes]
    cwd: str | None
    scratch: str

    def write(self) -> bytes:
        """Return the order for the supervisor."""
        order = {
            "program": _write(self.program),
            "argv": [_write(each) for each in self.argv],
            "env": {_write(name): value.decode("latin-1") for name, value in self.env.items()},
            "cwd": None if self.cwd is None else _write(self.cwd),
            "scratch": self.scratch,
            "grace": GRACE,
        }
        return json.dumps(order).encode() + b"\n"


class NotStartedError(OSError):
    """The operating system does not start a program.

    Attributes:
        at: `cwd` where the working directory is the reason, else `start`.
    """

    def __init__(self, number: int, at: str) -> None:
        super().__init__(number, os.strerror(number))
        self.at = at


async def run_program(launch: Launch, stdin: bytes, stdout: Consumer, stderr: Consumer) -> int | None:
    """Start a program, and return its exit code after it has ended, with everything that it has started.

    A cancellation ends the program, too: SIGTERM for all its processes, and SIGKILL after a grace period.

    Args:
        launch: the program.
        stdin: the whole of its input.
        stdout: takes its output.
        stderr: takes what it writes there.

    Returns:
        The exit code, or the negative number of the signal that has ended it. None if that is not known.

    Raises:
        NotStartedError: the operating system does not start it.
        OSError: the operating system starts no process now.
    """
    async with _start(launch, stdin) as supervised, anyio.create_task_group() as group:
        for pipe, consume in zip(supervised.output, (stdout, stderr), strict=True):
            group.start_soon(supervised.read, pipe, consume)
        ended = await supervised.wait()
        await supervised.wait_for_output()
        group.cancel_scope.cancel()
    return ended


class _Supervised:
    """A supervisor, and the program below it.

    Attributes:
        output: what the program writes on stdout and stderr.
    """

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.output: list[asyncio.StreamReader] = []
        self._process = process
        self._transports: list[asyncio.BaseTransport] = []
        self._program: int | None = None
        self._is_over = self._is_clean = False
        self._is_deaf = True  # until it is connected
        self._open, self._received = 0, 0  # pipes that are read, and bytes from them
        self._read_all = anyio.Event()

    async def connect(self, link: socket.socket) -> None:
        """Connect to the supervisor and to the program's output."""
        self._link, self._orders = await asyncio.open_unix_connection(sock=link)
        self._transports.append(self._orders.transport)
        self._is_deaf = False
        for pipe in (self._process.stdout, self._process.stderr):
            reader = asyncio.StreamReader()
            connect = asyncio.get_running_loop().connect_read_pipe
            transport, _ = await connect(partial(asyncio.StreamReaderProtocol, reader), pipe)
            self._transports.append(transport)
            self.output.append(reader)
        self._open = len(self.output)

    async def launch(self, launch: Launch) -> None:
        """Have the program started.

        Raises:
            NotStartedError: the operating system does not start it.
        """
        self._orders.write(launch.write())
        while (said := await self._hear()) and "started" not in said:
            if "refused" in said:
                raise NotStartedError(int(said["refused"]), str(said["at"]))

    async def wait(self) -> int | None:
        """Return how the program has ended; None if the supervisor has died, or could not end it."""
        said = await self._hear()
        if not said:
            self._kill()
        return said.get("ended")

    async def read(self, pipe: asyncio.StreamReader, consume: Consumer) -> None:
        """Hand over what comes through a pipe, until all processes have closed it."""
        while chunk := await pipe.read(_CHUNK):
            self._received += len(chunk)
            await consume(chunk)
        self._open -= 1
        if not self._open:
            self._read_all.set()

    async def wait_for_output(self) -> None:
        """Wait until the output is read. Another process may hold a pipe: then not for ever."""
        received = -1
        while self._open and received < self._received:
            received = self._received
            with move_on_after(_IDLE if self._is_clean else _SHORT_IDLE):
                await self._read_all.wait()

    async def end(self) -> None:
        """End what still runs, and the supervisor, within a bounded time."""
        with move_on_after(_ENDING, shield=True):
            if not self._is_over and self._transports:
                self._orders.write(b"T")
            while self._process.poll() is None:
                if not self._is_deaf:
                    await self._hear()
                else:
                    await anyio.sleep(_SOON)
        if not self._is_over:
            self._kill()
        for transport in self._transports:
            transport.abort() if isinstance(transport, asyncio.WriteTransport) else transport.close()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _kill(self) -> None:
        """Kill the supervisor, and the program's group, which may be left without it."""
        self._process.kill()
        if self._program is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._program, signal.SIGKILL)

    async def _hear(self) -> dict[str, Any]:
        """Return what the supervisor says; nothing if it has died."""
        line = b""
        with suppress(OSError):
            line = await self._link.readline()
        if not line.endswith(b"\n"):
            self._is_deaf = True
            return {}
        said: dict[str, Any] = json.loads(line)
        self._program = said.get("pid", self._program)
        self._is_over = self._is_over or "ended" in said or "refused" in said
        self._is_clean = self._is_clean or bool(said.get("clean"))
        return said


@asynccontextmanager
async def _start(launch: Launch, stdin: bytes) -> AsyncIterator[_Supervised]:
    """Start a supervisor with a program, and end both with the block."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs, _hold(stdin) as given:
            supervised = _Supervised(_start_supervisor(theirs, given))
        try:
            await supervised.connect(ours)
            await supervised.launch(launch)
            yield supervised
        finally:
            await supervised.end()


def _start_supervisor(link: socket.socket, stdin: IO[bytes]) -> "subprocess.Popen[bytes]":
    number = link.fileno()
    return subprocess.Popen(  # noqa: S603  our own file
        # Without site-packages and the user's settings of Python: it starts sooner, and imports nothing else.
        [sys.executable, "-I", "-S", "-B", _SUPERVISOR, str(number), str(os.getpid())],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[number],
        start_new_session=True,  # Ctrl-C is for the worker
        env={name: os.environ[name] for name in _LOADER if name in os.environ},
        bufsize=0,
    )


def _hold(data: bytes) -> IO[bytes]:
    """Return a file with these bytes that no other process finds. Unlike a pipe, it need not be read."""
    file = _open_nameless()
    file.write(data)
    file.flush()
    file.seek(0)
    return file


def _open_nameless() -> IO[bytes]:
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it
            return os.fdopen(os.memfd_create("pgflow-stdin"), "w+b")
    return tempfile.TemporaryFile()


def _write(text: str) -> str:
    """Return a text of the operating system, whose characters stand for its bytes."""
    return os.fsencode(text).decode("latin-1")
