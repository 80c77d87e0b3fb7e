"""`python -m benchmarks.sides NAME`: `{"act": "measure", "shape": …, "handler": …}` in, a line of what it took out."""

import gc
import json
import os
import sys
import time
from importlib import import_module
from resource import RUSAGE_SELF, getrusage

import psutil
import psycopg

from benchmarks.shapes import PAUSES, SHAPES, Trace
from benchmarks.sides import Job, Prepare

# Of one database, what clients send: not what functions execute.
STATEMENTS = """
    SELECT coalesce(sum(calls), 0)::int
    FROM pg_stat_statements JOIN pg_database ON pg_database.oid = dbid WHERE datname = %s
"""


class Measurements:
    """What is prepared, each graph once."""

    def __init__(self, prepare: Prepare, dsn: str, statistics: str) -> None:
        self._prepare = prepare
        self._jobs: dict[tuple[str, str], tuple[Job, Trace]] = {}
        self._database = psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]
        self._statistics = psycopg.connect(statistics, autocommit=True)

    def prepare(self, shape: str, handler: str) -> None:
        """Get a graph ready, where it is not."""
        self._find(shape, handler)

    def measure(self, shape: str, handler: str) -> dict[str, float]:
        """Run a graph once and return what it took: see `benchmarks.processes.Measurement`."""
        job, trace = self._find(shape, handler)
        trace.clear()
        gc.collect()
        memory, statements, begun = psutil.Process().memory_info().rss, self._count_statements(), time.perf_counter()
        job.run()
        seconds = time.perf_counter() - begun
        memory = getrusage(RUSAGE_SELF).ru_maxrss * 1024 - memory
        statements = self._count_statements() - statements
        trace.check(SHAPES[shape])
        job.check()
        return {"seconds": seconds, "memory": memory / 2**20, "statements": statements}

    def _find(self, shape: str, handler: str) -> tuple[Job, Trace]:
        key = (shape, handler)
        if key not in self._jobs:
            trace = Trace()
            name = f"{shape}, {handler}".replace(",", "").replace(" ", "_")
            self._jobs[key] = self._prepare(name, SHAPES[shape], PAUSES[handler], trace), trace
        return self._jobs[key]

    def _count_statements(self) -> int:
        [count] = self._statistics.execute(STATEMENTS, [self._database]).fetchone() or [0]
        return int(count)


def main() -> None:
    """Answer until there is nothing more to read."""
    # Answers only: whatever else prints, prints to the log.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    dsn, statistics = os.environ["BENCHMARK_DSN"], os.environ["BENCHMARK_STATISTICS"]
    side = import_module(f"benchmarks.sides.{sys.argv[1]}")
    with side.open_side(dsn) as prepare:
        measurements = Measurements(prepare, dsn, statistics)
        acts = {"prepare": measurements.prepare, "measure": measurements.measure}
        for line in sys.stdin:
            question = json.loads(line)
            answers.write(json.dumps(acts[question.pop("act")](**question)) + "\n")


if __name__ == "__main__":
    main()
