"""One worker: how soon it executes what SQL starts, and how it gets through a thousand runs that wait."""

import os
import time
from collections.abc import Iterator
from statistics import quantiles
from uuid import UUID

import psutil

from benchmarks.commands import GRAPH, WORKFLOW, Site, open_site
from benchmarks.measure import Report, Row, Sample, Target

RUNS = int(os.environ.get("BENCHMARK_RUNS", "1000"))  # fewer, for trying something out
CONCURRENCY = 10
LATENCY_RUNS = 60
PAUSE = 0.5  # seconds: what the last run left to do, for Prefect, is not the next one's

FIRST_STEP = """
    SELECT extract(epoch FROM min(s.started_at) - r.created_at)::float
    FROM pgflow.runs r JOIN pgflow.step_states s ON s.run_id = r.id
    WHERE r.id = %s GROUP BY r.created_at
"""
COMPLETED = "SELECT count(*) FROM pgflow.runs WHERE status = 'completed'"
DURATION = """
    SELECT extract(epoch FROM max(r.finished_at) - (SELECT min(taken_at) FROM pgflow_prefect.owners))::float
    FROM pgflow.runs r
"""


def measure_worker(server: str) -> Iterator[Report]:
    """Measure one worker, at idle and under load."""
    with open_site(server) as site:
        yield measure_latency(site)
    with open_site(server) as site:
        yield measure_load(site, RUNS, CONCURRENCY)


def measure_latency(site: Site) -> Report:
    """Measure the time from a run's row to its first step's start, by the database's clock, one run at a time."""
    with site.service("worker"):
        find_latency(site)  # connections are opened, modules loaded
        latencies = tuple(find_latency(site) for _ in range(LATENCY_RUNS))
    high = quantiles(latencies, n=20, method="inclusive")[-1]
    return Report(
        f"Worker, warm and idle: from SQL to the first step, {LATENCY_RUNS} runs one after the other",
        [
            Row("from run_workflow to the first step", Sample(latencies, "s")),
            Row("  95 of 100 within", Sample((high,), "s"), Target(at_most=0.5)),
        ],
    )


def find_latency(site: Site) -> float:
    """Start a run, wait for its end and a moment longer, and return when its first step started."""
    run_id = site.ask("SELECT id FROM pgflow.run_workflow(%s, '{}')", WORKFLOW)
    assert isinstance(run_id, UUID)
    site.wait_until(lambda: site.ask("SELECT status = 'completed' FROM pgflow.runs WHERE id = %s", run_id))
    time.sleep(PAUSE)
    return float(site.ask(FIRST_STEP, run_id))


def measure_load(site: Site, runs: int, concurrency: int) -> Report:
    """Measure a worker that finds all runs waiting: its throughput, and its memory after each quarter."""
    site.begin_runs(runs)
    with site.service("worker", "--adopt", "--concurrency", str(concurrency)) as process:
        memory = [find_memory(site, process.pid, runs * quarter // 4) for quarter in (1, 2, 3, 4)]
    quarter, half, _, end = memory
    rate = runs * len(GRAPH) / float(site.ask(DURATION))
    return Report(
        f"Worker: {runs:,} waiting runs of {len(GRAPH)}-step chains, {concurrency} at a time",
        [
            Row("throughput", Sample((rate,), "steps/s")),
            Row("memory after a quarter", Sample((quarter,), "MiB")),
            Row("memory after half", Sample((half,), "MiB")),
            Row("memory in the end", Sample((end,), "MiB")),
            Row("memory: end / half", Sample((end / half,), ""), Target(at_most=1.1)),
        ],
    )


def find_memory(site: Site, pid: int, completed: int) -> float:
    """Return how many MiB of memory a process occupies when so many runs are completed."""
    site.wait_until(lambda: site.ask(COMPLETED) >= completed)
    return float(psutil.Process(pid).memory_info().rss) / 2**20
