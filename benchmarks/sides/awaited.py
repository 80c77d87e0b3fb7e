"""The fastest flow that Prefect's public API allows: async tasks, awaited and not submitted, gathered layer by layer.

Results and caching are off, and so are the validation of the flow's parameters and the line of the log that says of
each task that it is completed, which Prefect writes by default. In the graphs here, a layer's steps wait for the whole
layer above, so that layers lose nothing. What was tried, on chains, layers and wide graphs:

- a task for each step, or one task for all of them that is told its step: the same;
- a ready queue with counters in an `asyncio.TaskGroup` in place of layers: the same, or a little slower;
- a semaphore, 20, 50 or 100 tasks at a time: the same;
- `return_state=True`: the same;
- `wait_for` with the upstream's states, which draws the edges in Prefect's graph: slower, by half on the layers;
- sync tasks called in a sync flow: less CPU on wide graphs, but one after the other, and a second at the flow's end;
- sync tasks called in an async flow: five times slower.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from benchmarks.engine import Graph
from benchmarks.shapes import Trace, find_layers
from benchmarks.sides import Job, Prepare


@contextmanager
def open_side(dsn: str) -> Iterator[Prepare]:
    """Prefect keeps everything itself."""
    logging.getLogger("prefect.task_runs").setLevel(logging.WARNING)
    yield prepare


def prepare(name: str, graph: Graph, pause: float, trace: Trace) -> Job:
    """Return a flow with a task a step."""
    tasks = {
        step: task(name=step, persist_result=False, cache_policy=NO_CACHE)(trace.make_async(step, pause))
        for step in graph
    }
    layers = find_layers(graph)

    @flow(name=f"awaited_{name}", persist_result=False, validate_parameters=False)
    async def run() -> None:
        for layer in layers:
            await asyncio.gather(*(tasks[step]() for step in layer))

    return Job(lambda: asyncio.run(run()))
