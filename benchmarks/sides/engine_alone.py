"""The engine alone, driven by a bare loop over one connection: claim, work, complete."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from benchmarks.engine import Connection, Graph, define
from benchmarks.shapes import Trace, find_downstream
from benchmarks.sides import Job, Prepare
from benchmarks.sides.ours import check

THREADS = 100
"""Handlers that sleep at the same time: as many as pgflow-prefect executes by default."""

CLAIM = "SELECT * FROM pgflow.claim_step(%s, %s)"
COMPLETE = "SELECT * FROM pgflow.complete_step(%s, %s, %s)"


Work = Mapping[str, Callable[[], int]]
"""The handlers, by step."""


@contextmanager
def open_side(dsn: str) -> Iterator[Prepare]:
    """Keep one connection, and the threads."""
    with psycopg.connect(dsn, autocommit=True) as db, ThreadPoolExecutor(THREADS) as threads:

        def prepare(name: str, graph: Graph, pause: float, trace: Trace) -> Job:
            slug = f"{name}_alone"
            define(db, slug, graph)
            work = {step: trace.make_sync(step, pause) for step in graph}
            run = partial(run_in_threads, threads) if pause else run_in_turn
            return Job(lambda: run(db, slug, graph, work), lambda: check(db, slug, graph))

        yield prepare


def begin(db: Connection, slug: str) -> UUID:
    """Start a run."""
    [run_id] = db.execute("SELECT id FROM pgflow.run_workflow(%s, '{}')", [slug]).fetchone() or [None]
    assert isinstance(run_id, UUID)
    return run_id


def run_in_turn(db: Connection, slug: str, graph: Graph, work: Work) -> None:
    """Execute the steps one after the other, in the graph's order."""
    run_id = begin(db, slug)
    for step in graph:
        db.execute(CLAIM, [run_id, step])
        result = work[step]()
        db.execute(COMPLETE, [run_id, step, Jsonb(result)])


def run_in_threads(threads: ThreadPoolExecutor, db: Connection, slug: str, graph: Graph, work: Work) -> None:
    """Execute every step in a thread, as soon as its upstream steps are done."""
    run_id = begin(db, slug)
    unmet = {step: len(upstream) for step, upstream in graph.items()}
    downstream = find_downstream(graph)
    ended: SimpleQueue[tuple[str, int]] = SimpleQueue()

    def start(step: str) -> None:
        db.execute(CLAIM, [run_id, step])
        threads.submit(lambda: ended.put((step, work[step]())))

    for step, count in unmet.items():
        if not count:
            start(step)
    for _ in graph:
        step, result = ended.get()
        db.execute(COMPLETE, [run_id, step, Jsonb(result)])
        for each in downstream[step]:
            unmet[each] -= 1
            if not unmet[each]:
                start(each)
