"""The workers of the storm, and a supervisor as a machine has one: who has ended is started again."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Self

from tests.faults.broken import BROKEN
from tests.faults.servers import PATIENCE

_PAUSE = 3.0  # seconds before a worker that has ended by itself is started again


def make_command(environment: Mapping[str, str], *arguments: str) -> list[str]:
    """Return `pgflow-prefect` with arguments; with a broken fence, where the environment names one."""
    module = "tests.faults.broken" if BROKEN in environment else "pgflow_prefect"
    return [sys.executable, "-m", module, *arguments]


def make_worker_command(environment: Mapping[str, str], concurrency: int) -> list[str]:
    """Return what starts a worker for so many runs at the same time."""
    return make_command(environment, "worker", "tests.faults.handlers", "--concurrency", str(concurrency))


@dataclass(frozen=True)
class _Worker:
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def is_ready(self) -> bool:
        return b"ready: " in self.log.read_bytes()

    @property
    def name(self) -> str:
        return self.log.stem

    def kill(self) -> None:
        """Kill it and whatever it has started; nothing of it gets a chance to tidy up."""
        with suppress(ProcessLookupError):  # it had ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


class Fleet:
    """So many workers; may be used from several threads.

    Attributes:
        faults: the workers that have ended though they were ready and were not killed.
    """

    def __init__(self, size: int, command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> None:
        self.faults: list[str] = []
        self._size = size
        self._directory = directory
        self._environment = environment
        self._command = command
        self._workers: list[_Worker] = []
        self._started = 0
        self._next_start = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            for worker in self._workers:
                worker.kill()
            self._workers.clear()

    def tend(self) -> None:
        """Start as many workers as are missing."""
        with self._lock:
            for worker in [*self._workers]:
                if (code := worker.process.poll()) is None:
                    continue
                # One that finds no server when it starts says so and ends; later, it has to wait for it.
                if worker.is_ready:
                    tail = worker.log.read_text(errors="replace")[-2000:]
                    self.faults.append(f"{worker.name} has ended by itself, exit code {code}:\n{tail}")
                worker.kill()
                self._workers.remove(worker)
                self._next_start = time.monotonic() + _PAUSE
            while len(self._workers) < self._size and time.monotonic() >= self._next_start:
                self._workers.append(self._start())

    def _start(self) -> _Worker:
        self._started += 1
        log = self._directory / f"worker_{self._started}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command,
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return _Worker(process, log)

    def count_ready(self) -> int:
        with self._lock:
            return sum(worker.is_ready for worker in self._workers)

    def kill_one(self, random: Random) -> str:
        """Kill one of them, and return which."""
        with self._lock:
            if not self._workers:
                return "no worker"
            victim = random.choice(self._workers)
            victim.kill()
            self._workers.remove(victim)
            return victim.name
