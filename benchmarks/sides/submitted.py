"""A Prefect flow as its documentation has it: sync tasks, `.submit()`, and `wait_for`."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import flow, task
from prefect.futures import PrefectFuture

from benchmarks.engine import Graph
from benchmarks.shapes import Trace
from benchmarks.sides import Job, Prepare


@contextmanager
def open_side(dsn: str) -> Iterator[Prepare]:
    """Prefect keeps everything itself."""
    yield prepare


def prepare(name: str, graph: Graph, pause: float, trace: Trace) -> Job:
    """Return a flow with a task a step."""
    tasks = {step: task(name=step)(trace.make_sync(step, pause)) for step in graph}

    @flow(name=f"submitted_{name}")
    def run() -> list[int]:
        futures: dict[str, PrefectFuture[int]] = {}
        for step, upstream in graph.items():
            waited = [futures[each] for each in upstream]
            futures[step] = tasks[step].submit(wait_for=waited, return_state=False)
        return [future.result() for future in futures.values()]

    return Job(run)
