"""Prefect's own map, as its documentation has it: a sync task, `.map()`, and the futures' results."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import Task

from benchmarks.engine import Graph
from benchmarks.shapes import Trace
from benchmarks.sides import Job, Prepare


@contextmanager
def open_side(dsn: str) -> Iterator[Prepare]:
    """Prefect keeps everything itself."""
    yield prepare


def prepare(name: str, graph: Graph, pause: float, trace: Trace, *, bare: bool = False) -> Job:
    """Return a flow that maps one task over the names of all steps.

    Args:
        name: of the flow.
        graph: whose steps are the items.
        pause: for which each works, in seconds.
        trace: notes what they do.
        bare: results are not stored, and no cache is asked.
    """
    handlers = {step: trace.make_sync(step, pause) for step in graph}
    work = make_task(handlers, bare=bare)
    items = [*graph]

    @flow(name=f"task_map_{name}", validate_parameters=not bare)
    def run() -> list[int]:
        return work.map(items).result()

    return Job(run)


def make_task(handlers: Mapping[str, Callable[[], int]], *, bare: bool) -> Task[[str], int]:
    """Return the task of an item."""

    def work(item: str) -> int:
        return handlers[item]()

    return task(persist_result=False, cache_policy=NO_CACHE)(work) if bare else task(work)
