"""The sides as processes, and the quiet between two measurements."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.commands import Site

QUIET = 0.1
"""Of one core: what all processes may use together when they have nothing to do. An idle Prefect server polls."""

GLANCE = 1.0  # seconds, and longer than any side is idle on purpose
PATIENCE = 60.0  # seconds, after which it is measured all the same, and said


@dataclass(frozen=True)
class Measurement:
    """What one run of a graph took.

    Attributes:
        seconds: from the call to its return.
        statements: that the side's database got meanwhile.
        memory: MiB by which the process's peak, over its life, is above what it had before.
        cpu: seconds that the side's own process used, with what it still did after the return.
    """

    seconds: float
    statements: int
    memory: float
    cpu: float = 0.0


@dataclass(frozen=True)
class SideProcess:
    """A side in its process, with everything loaded and connected."""

    process: "subprocess.Popen[str]"
    log: Path

    @property
    def cpu(self) -> float:
        """The CPU seconds that it has used so far."""
        used = psutil.Process(self.process.pid).cpu_times()
        return used.user + used.system

    def prepare(self, shape: str, handler: str) -> None:
        """Get a graph ready, where it is not: define the workflow, make the flow."""
        self._ask("prepare", shape, handler)

    def measure(self, shape: str, handler: str) -> Measurement:
        """Run a graph once."""
        return Measurement(**self._ask("measure", shape, handler))

    def _ask(self, act: str, shape: str, handler: str) -> Any:  # noqa: ANN401  JSON
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"act": act, "shape": shape, "handler": handler}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()[-5000:]
        return json.loads(answer)


@contextmanager
def side_process(site: Site, name: str, dsn: str, statistics: str, label: str = "") -> Iterator[SideProcess]:
    """Start the process of a side, for as long as the block takes.

    Args:
        site: the Prefect server, and where files may be.
        name: the module.
        dsn: the side's database.
        statistics: how to connect to where pg_stat_statements is.
        label: tells its log from that of another process of the same module.
    """
    configured = {"BENCHMARK_DSN": dsn, "BENCHMARK_STATISTICS": statistics, "PGFLOW_DSN": dsn}
    log = site.directory / f"{name}_{label}.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sides", name],
            env={**site.environment, **configured},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        ) as process,
    ):
        try:
            yield SideProcess(process, log)
        finally:
            assert process.stdin is not None
            process.stdin.close()  # it ends when there is nothing more to read


def find_postmaster(site: Site) -> int:
    """Return the process id of the database server."""
    return int(site.ask("SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)"))


def wait_until_quiet(postmaster: int) -> None:
    """Return once PostgreSQL and what this process has started, the Prefect server above all, have little to do."""
    deadline = time.monotonic() + PATIENCE
    while _use(postmaster, lambda: time.sleep(GLANCE)) > QUIET * GLANCE:
        if time.monotonic() > deadline:
            Console(stderr=True).print(f"not quiet after {PATIENCE:g} s: going on all the same")
            return


def _use(postmaster: int, act: Callable[[], object]) -> float:
    """Return the CPU seconds that are used while something happens."""
    before = _read_times(postmaster)
    act()
    return sum(used - before.get(pid, 0) for pid, used in _read_times(postmaster).items())


def _read_times(postmaster: int) -> dict[int, float]:
    server = psutil.Process(postmaster)
    times = {}
    for process in [server, *server.children(), *psutil.Process().children(recursive=True)]:
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        times[process.pid] = used.user + used.system
    return times
