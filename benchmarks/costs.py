"""What runs cost: time, CPU of each process that takes part, requests and statements."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.commands import Site
from benchmarks.processes import find_postmaster, wait_until_quiet

STATEMENTS = """
    SELECT /* benchmark */ coalesce(sum(calls), 0)::int
    FROM pg_stat_statements JOIN pg_database ON pg_database.oid = dbid
    WHERE datname = %s AND query NOT LIKE '%%/* benchmark */%%'
"""
"""How many statements a database got, without those of the benchmark itself, which have this comment."""


@dataclass(frozen=True)
class Cost:
    """What some runs took on one side, a run each.

    Attributes:
        seconds: of the wall clock.
        cpu: of the process that executes the runs, in seconds.
        server: of Prefect's server.
        postgres: of PostgreSQL, for both.
        requests: of the process.
        statements: that the side's own database got.
        latency: from a run's commit to its first step where nothing else runs, in seconds; None where not measured.
    """

    seconds: float
    cpu: float
    server: float
    postgres: float
    requests: float
    statements: float
    latency: float | None = None


def measure_cost(
    site: Site, pid: int, requests: Path, database: str, work: Callable[[int], object], *, runs: int
) -> Cost:
    """Return what it costs a process, and those that it asks, to do some runs, with what is left to do after that."""
    postmaster = find_postmaster(site)
    wait_until_quiet(postmaster)

    def count() -> list[float]:
        return [read_size(requests), site.ask(STATEMENTS, database)]

    before = [*read_cpu(pid, postmaster), *count()]
    began = time.perf_counter()
    work(runs)
    seconds = time.perf_counter() - began
    asked = count()  # before it is quiet: a worker that has nothing to do asks for more, once in a while
    wait_until_quiet(postmaster)
    after = [*read_cpu(pid, postmaster), *asked]
    each = [(late - early) / runs for early, late in zip(before, after, strict=True)]
    return Cost(seconds / runs, *each)


def read_cpu(pid: int, postmaster: int) -> list[float]:
    """Return the CPU seconds of a process, of the Prefect server, and of PostgreSQL."""
    process, postgres = psutil.Process(pid), psutil.Process(postmaster)
    others = [each for each in psutil.Process().children() if each.pid not in (pid, postmaster)]
    server = [part for each in others if each.is_running() for part in (each, *each.children(recursive=True))]
    return [
        add_up([process, *process.children(recursive=True)]),
        add_up(each for each in server if each.pid != postmaster and postgres not in each.parents()),
        add_up([postgres, *postgres.children()]) + sum(postgres.cpu_times()[2:4]),
    ]


def add_up(processes: "Iterator[psutil.Process] | list[psutil.Process]") -> float:
    """Return the CPU seconds of processes; what has ended meanwhile has none."""
    seconds = 0.0
    for each in processes:
        try:
            used = each.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += used.user + used.system
    return seconds


def read_size(file: Path) -> int:
    """Return how many bytes a file has: one for each request."""
    return file.stat().st_size if file.exists() else 0
