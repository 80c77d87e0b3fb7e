"""Many small runs: a worker, the one of a former version, and the same work by hand and with DBOS."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import psutil

from benchmarks.commands import HANDLERS, WORKFLOW, Site, open_site
from benchmarks.engine import chain, define
from benchmarks.measure import Report, Row, Sample, Target
from benchmarks.processes import find_postmaster, wait_until_quiet
from pgflow_prefect.database.connection import create_database

FORMER = os.environ.get("BENCHMARK_FORMER", "b1a8665")
"""The commit that the worker is compared with."""

SIDES = [each for each in os.environ.get("BENCHMARK_SIDES", "ours,former,by_hand,dbos").split(",") if each]
STEPS = [int(each) for each in os.environ.get("BENCHMARK_STEPS", "5,1").split(",")]
AT_ONCE = [int(each) for each in os.environ.get("BENCHMARK_AT_ONCE", "10,50").split(",")]
RUNS = int(os.environ.get("BENCHMARK_RUNS", "300"))
WARM_UP = 20  # runs: modules are loaded, connections opened

REPOSITORY = Path(__file__).parent.parent
COUNTED = Path(__file__).parent / "counted"

NAMES = {
    "ours": "pgflow-prefect",
    "former": "pgflow-prefect, former version",
    "by_hand": "by hand: one process, one client",
    "dbos": "DBOS",
}
COMPLETED = "SELECT count(*) FROM pgflow.runs WHERE status = 'completed'"
STATEMENTS = """
    SELECT coalesce(sum(calls), 0)::int FROM pg_stat_statements JOIN pg_database ON pg_database.oid = dbid
    WHERE datname = %s
"""
LATENCY = """
    SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM s.began_at - r.created_at))::float
    FROM (SELECT id, created_at FROM pgflow.runs ORDER BY created_at DESC LIMIT %s) r
    JOIN LATERAL (SELECT min(started_at) AS began_at FROM pgflow.step_states WHERE run_id = r.id) s ON true
"""


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


def measure_small_runs(server: str) -> Iterator[Report]:
    """Measure every side with chains of five steps and with single steps, at each number of runs at the same time."""
    with former_version() as former:
        for steps, at_once in product(STEPS, AT_ONCE):
            costs = {side: measure_side(server, side, former, steps, at_once) for side in SIDES}
            yield report(costs, steps, at_once)


@contextmanager
def former_version() -> Iterator[Path]:
    """Take the former version out of the repository, for as long as the block takes."""
    with tempfile.TemporaryDirectory(prefix="pgflow-") as directory:
        if "former" in SIDES:
            archive = subprocess.run(
                ["git", "archive", FORMER],
                cwd=REPOSITORY,
                check=True,
                stdout=subprocess.PIPE,
            )
            subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True)
        yield Path(directory)


def measure_side(server: str, side: str, former: Path, steps: int, at_once: int) -> Cost:
    """Measure one side on a site of its own."""
    sources = former if side == "former" else REPOSITORY
    with open_site(server, sources) as site:
        site.db.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
        if side in ("ours", "former"):
            return measure_worker(site, sources, steps, at_once)
        return measure_script(site, server, side, steps, at_once)


def measure_worker(site: Site, sources: Path, steps: int, at_once: int) -> Cost:
    """Measure a worker that finds all runs waiting, and then one run after the other."""
    if steps != len(chain(5)):
        define(site.db, "small", chain(steps))
        text = HANDLERS.format(slug="small", steps=[*chain(steps)])
        (site.directory / "flows" / "small.py").write_text(text)
    slug = WORKFLOW if steps == len(chain(5)) else "small"
    begin = "SELECT count(pgflow.run_workflow(%s, '{}')) FROM generate_series(1, %s)"
    requests = site.directory / "requests"
    environment = {"PYTHONPATH": f"{COUNTED}{os.pathsep}{sources}", "BENCHMARK_REQUESTS": str(requests)}
    with site.service("worker", "--concurrency", str(at_once), **environment) as process:
        site.ask(begin, slug, WARM_UP)
        site.wait_until(lambda: site.ask(COMPLETED) >= WARM_UP)

        def work() -> None:
            site.ask(begin, slug, RUNS)
            site.wait_until(lambda: site.ask(COMPLETED) >= WARM_UP + RUNS)

        cost = measure(site, process.pid, requests, site.ask("SELECT current_database()"), work)
        for _ in range(WARM_UP):
            count = site.ask(COMPLETED) + site.ask(begin, slug, 1)
            site.wait_until(lambda count=count: site.ask(COMPLETED) >= count)  # type: ignore[misc]
            time.sleep(0.2)  # what the last run left to do, for Prefect, is not the next one's
        return replace(cost, latency=float(site.ask(LATENCY, WARM_UP)))


def measure_script(site: Site, server: str, side: str, steps: int, at_once: int) -> Cost:
    """Measure a script that does the same work in one process."""
    name = f"benchmark_{side}_{steps}_{at_once}_{os.getpid()}"
    dsn = create_database(server, name) if side == "dbos" else site.dsn
    requests = site.directory / "requests"
    environment = {"PYTHONPATH": f"{COUNTED}{os.pathsep}{REPOSITORY}", "BENCHMARK_REQUESTS": str(requests)}
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.sides.small_runs", side, dsn, str(steps), str(at_once)],
        env={**site.environment, **environment},
        cwd=site.directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def work(runs: int = RUNS) -> None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{runs}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"

        work(WARM_UP)
        cost = measure(site, process.pid, requests, name, work)
        process.stdin.close()
        return cost


def measure(site: Site, pid: int, requests: Path, database: str, work: Callable[[], object]) -> Cost:
    """Return what it costs a process, and those that it asks, to do some work, with what is left to do after that."""
    postmaster = find_postmaster(site)
    wait_until_quiet(postmaster)

    def count() -> list[float]:
        return [read_size(requests), site.ask(STATEMENTS, database)]

    before = [*read_cpu(pid, postmaster), *count()]
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    asked = count()  # before it is quiet: a worker that has nothing to do asks for more, once in a while
    wait_until_quiet(postmaster)
    after = [*read_cpu(pid, postmaster), *asked]
    each = [(late - early) / RUNS for early, late in zip(before, after, strict=True)]
    return Cost(seconds / RUNS, *each)


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


def report(costs: dict[str, Cost], steps: int, at_once: int) -> Report:
    """Return what each side took, and ours beside the others."""
    rows = []
    for side, cost in costs.items():
        rows.append(Row(NAMES[side], sample(1 / cost.seconds, "runs/s")))
        rows.append(Row("  CPU of its process, of Prefect's server, of PostgreSQL", sample(cost.cpu * 1000, "ms/run")))
        rows.append(Row("    of Prefect's server", sample(cost.server * 1000, "ms/run")))
        rows.append(Row("    of PostgreSQL", sample(cost.postgres * 1000, "ms/run")))
        rows.append(Row("  requests", sample(cost.requests, "a run")))
        rows.append(Row("  statements of its own", sample(cost.statements, "a run")))
        if cost.latency is not None:
            rows.append(Row("  from the commit to the first step", sample(cost.latency * 1000, "ms")))
    rows += compare(costs, at_once)
    kind = "single steps" if steps == 1 else f"chains of {steps} steps"
    return Report(f"Small runs: {RUNS} {kind}, {at_once} at a time", rows)


def compare(costs: dict[str, Cost], at_once: int) -> Iterator[Row]:
    """Yield ours beside the others, with the targets."""
    ours, former, by_hand = (costs.get(side) for side in ("ours", "former", "by_hand"))
    if ours is None:
        return
    if at_once == max(AT_ONCE):
        yield Row("requests a run", sample(ours.requests, ""), Target(at_most=0.3))
    if by_hand is not None:
        yield Row("rate: ours / by hand", sample(by_hand.seconds / ours.seconds, ""), Target(at_least=2.0))
    if former is not None:
        yield Row("rate: ours / former", sample(former.seconds / ours.seconds, ""), Target(at_least=3.0))
        yield Row("CPU of the worker: ours / former", sample(ours.cpu / former.cpu, ""), Target(at_most=0.2))
    if former is not None and ours.latency and former.latency:
        yield Row("latency: ours / former", sample(ours.latency / former.latency, ""), Target(at_most=0.4))


def sample(value: float, unit: str) -> Sample:
    """Return a single measurement."""
    return Sample((value,), unit)
