"""A worker that gets three times as many runs as it can execute, for ten minutes."""

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import psutil

from benchmarks.commands import Site, open_site
from benchmarks.measure import Report, Row, Sample, Target

SECONDS = float(os.environ.get("BENCHMARK_OVERLOAD_SECONDS", "600"))
TIMES = 3
"""So many times the rate at which the worker gets through runs that wait."""

CONCURRENCY = 50
FIRST_RUNS = int(os.environ.get("BENCHMARK_RUNS", "300"))  # by which that rate is found
TICK = 1.0  # seconds between two transactions that start runs
FAILING = 50
"""One run of so many fails."""

PATIENCE = 120.0
"""Seconds without progress after which what is missing will not come any more."""

SLUG = "overload"
HANDLERS = f"""
from pgflow_prefect import Workflow

workflow = Workflow({SLUG!r})


@workflow.step
async def first(payload: dict[str, int]) -> int:
    return payload["number"] + 1


@workflow.step
async def second(first: int) -> int:
    if first % {FAILING} == 0:
        raise ValueError("it is one of those that fail")
    return first + 1
"""
DEFINE = """
    INSERT INTO pgflow.workflows VALUES ('overload');
    INSERT INTO pgflow.steps VALUES ('overload', 'first'), ('overload', 'second');
    INSERT INTO pgflow.deps VALUES ('overload', 'first', 'second')
"""
BEGIN = """
    SELECT count(pgflow.run_workflow('overload', jsonb_build_object('number', n)))
    FROM generate_series(%s::int, %s::int) n
"""
STATUSES = "SELECT count(*) FILTER (WHERE status <> 'pending') FROM pgflow.runs"
WRONG = """
    SELECT count(*) FROM pgflow.runs r
    JOIN pgflow.step_states a ON a.run_id = r.id AND a.step_slug = 'first'
    LEFT JOIN pgflow.step_states b ON b.run_id = r.id AND b.step_slug = 'second'
    CROSS JOIN LATERAL (SELECT (r.payload ->> 'number')::int + 1 AS value) expected
    WHERE a.status <> 'completed' OR a.step_result <> to_jsonb(expected.value) OR b.step_slug IS NULL
       OR CASE WHEN expected.value %% %s = 0
               THEN r.status <> 'failed' OR b.status <> 'failed' OR b.error_message NOT LIKE '%%those that fail%%'
               ELSE r.status <> 'completed' OR b.status <> 'completed' OR b.attempts <> 1
                    OR b.step_result <> to_jsonb(expected.value + 1) END
"""
FAILED = """
    SELECT f.flow_run_id::text FROM pgflow.runs r
    JOIN LATERAL (SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f WHERE f.run_id = r.id
                  ORDER BY f.epoch DESC LIMIT 1) f ON true
    WHERE r.status = 'failed'
"""


@dataclass(frozen=True)
class Overload:
    """What became of a worker under more runs than it can execute.

    Attributes:
        borne: runs a second that it gets through.
        begun: runs that were started.
        waiting: runs that waited at the end of the load.
        memory: MiB of the worker, at each second of the load.
        wrong: runs that are not as they should be in PostgreSQL.
        failed: runs that failed, as some should.
        hidden: those of them that Prefect does not show as failed.
    """

    borne: float
    begun: int
    waiting: int
    memory: list[float]
    wrong: int
    failed: int
    hidden: int


def measure_overload(server: str) -> Iterator[Report]:
    """Overload a worker, let it come to the end of all runs, and compare what it left with what it should have."""
    with open_site(server) as site:
        site.db.execute(DEFINE)
        (site.directory / "flows" / "overload.py").write_text(HANDLERS)
        with site.service("worker", "--concurrency", str(CONCURRENCY)) as process:
            yield report(overload(site, process))


def overload(site: Site, process: "subprocess.Popen[bytes]") -> Overload:
    """Find out what the worker bears, give it more for a while, and wait until it is through."""
    began = time.monotonic()
    site.ask(BEGIN, 1, FIRST_RUNS)
    wait_until_ended(site, FIRST_RUNS)
    borne = FIRST_RUNS / (time.monotonic() - began)
    begun, memory = feed(site, process, FIRST_RUNS, TIMES * borne)
    waiting = begun - site.ask(STATUSES)
    wait_until_ended(site, begun)
    failed = [str(row[0]) for row in site.db.execute(FAILED).fetchall()]
    return Overload(borne, begun, waiting, memory, site.ask(WRONG, FAILING), len(failed), count_hidden(site, failed))


def feed(site: Site, process: "subprocess.Popen[bytes]", begun: int, rate: float) -> tuple[int, list[float]]:
    """Start runs at a rate; return how many there are then, and the worker's memory on the way."""
    first, memory, began = begun, [], time.monotonic()
    while (passed := time.monotonic() - began) < SECONDS:
        due = first + int(rate * (passed + TICK))
        site.ask(BEGIN, begun + 1, due)
        begun = due
        memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        time.sleep(max(0.0, passed + TICK - (time.monotonic() - began)))
    return begun, memory


def wait_until_ended(site: Site, count: int) -> None:
    """Return once so many runs have ended.

    Raises:
        AssertionError: none of them ends any more.
    """
    ended, seen_at = site.ask(STATUSES), time.monotonic()
    while ended < count:
        time.sleep(0.05)
        if (now := site.ask(STATUSES)) != ended:
            ended, seen_at = now, time.monotonic()
        assert time.monotonic() < seen_at + PATIENCE, f"{count - ended} runs do not end"


def count_hidden(site: Site, failed: list[str]) -> int:
    """Return how many of these flow runs Prefect does not show as failed, once it shows no more of them."""
    missing, seen_at = {*failed}, time.monotonic()
    while missing and time.monotonic() < seen_at + PATIENCE:
        found = find_failed(site, [*missing])
        if found:
            seen_at = time.monotonic()
        missing -= found
        time.sleep(0 if found else 1)
    return len(missing)


def find_failed(site: Site, flow_runs: list[str]) -> set[str]:
    """Return those of these flow runs that Prefect shows as failed, not necessarily all of them."""
    chosen = {"id": {"any_": flow_runs[:200]}, "state": {"type": {"any_": ["FAILED"]}}}
    answer = httpx.post(f"{site.api_url}/flow_runs/filter", json={"flow_runs": chosen, "limit": 200}, timeout=60)
    return {each["id"] for each in answer.raise_for_status().json()}


def report(found: Overload) -> Report:
    """Return what became of it."""
    half, end = (sorted(part)[len(part) // 2] for part in split(found.memory))
    expected = (found.begun + 1) // FAILING
    return Report(
        f"Overload: {TIMES} times what a worker bears, for {SECONDS:g} s",
        [
            Row("what it bears", single(found.borne, "runs/s")),
            Row("runs begun", single(found.begun, "")),
            Row("runs that waited at the end of the load", single(found.waiting, "")),
            Row("memory in the second quarter", single(half, "MiB")),
            Row("memory in the last quarter", single(end, "MiB")),
            Row("memory: last / second quarter", single(end / half, ""), Target(at_most=1.1)),
            Row("runs that are not right in PostgreSQL", single(found.wrong, ""), Target(at_most=0)),
            Row("failed runs, of those that had to fail", single(found.failed / expected, ""), Target(1, 1)),
            Row("failed runs that Prefect does not show", single(found.hidden, ""), Target(at_most=0)),
        ],
    )


def split(memory: list[float]) -> tuple[list[float], list[float]]:
    """Return the second quarter and the last one."""
    quarter = max(1, len(memory) // 4)
    return memory[quarter : 2 * quarter] or memory, memory[-quarter:]


def single(value: float, unit: str) -> Sample:
    """Return a single measurement."""
    return Sample((float(value),), unit)
