"""DBOS: an async workflow whose async steps are gathered layer by layer, as its documentation has it.

It numbers steps in the order in which they begin, and has to begin them in the same order when it recovers; so steps
can't begin whenever their own upstream is done. In the graphs here, layers lose nothing by it.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from dbos import DBOS
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import URL

from benchmarks.engine import Graph
from benchmarks.shapes import Trace, find_layers
from benchmarks.sides import Job, Prepare


@contextmanager
def open_side(dsn: str) -> Iterator[Prepare]:
    """Launch DBOS on a database of its own."""
    DBOS(config={"name": "benchmark", "system_database_url": to_url(dsn)})
    DBOS.launch()
    try:
        yield prepare
    finally:
        DBOS.destroy()


def to_url(dsn: str) -> str:
    """Return how SQLAlchemy connects to a database."""
    parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    place = {str(name): parts[name] for name in ("host", "port") if name in parts}
    url = URL.create("postgresql+psycopg", username=parts.get("user"), database=parts["dbname"], query=place)
    return url.render_as_string(hide_password=False)


def prepare(name: str, graph: Graph, pause: float, trace: Trace) -> Job:
    """Register a workflow, and a step each."""
    steps: dict[str, Callable[[], Coroutine[Any, Any, int]]] = {
        step: DBOS.step(name=step)(trace.make_async(step, pause)) for step in graph
    }
    layers = find_layers(graph)

    async def execute() -> None:
        for layer in layers:
            await asyncio.gather(*(steps[step]() for step in layer))

    execute.__qualname__ = name
    run = DBOS.workflow(name=name)(execute)
    return Job(lambda: asyncio.run(run()))
