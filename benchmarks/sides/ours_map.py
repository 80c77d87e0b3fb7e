"""pgflow-prefect with its defaults: a workflow of one map, with an item for each step of the graph."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg

from benchmarks.engine import Connection, Graph, define
from benchmarks.shapes import Trace
from benchmarks.sides import Job, Prepare
from pgflow_prefect import Workflow

COMPLETED = """
    SELECT r.status, jsonb_array_length(s.step_result),
           (SELECT count(*) FROM pgflow.step_items i
            WHERE i.run_id = r.id AND i.status = 'completed' AND i.item_result = '1')
    FROM pgflow.runs r JOIN pgflow.step_states s ON s.run_id = r.id
    WHERE r.workflow_slug = %s ORDER BY r.created_at DESC LIMIT 1
"""


@contextmanager
def open_side(dsn: str) -> Iterator[Prepare]:
    """Keep a connection, to define workflows and to look how runs ended; flows open and close their own."""
    token = uuid4().hex[:8]  # the database may have the workflows of other processes
    with psycopg.connect(dsn, autocommit=True) as db:

        def prepare(name: str, graph: Graph, pause: float, trace: Trace) -> Job:
            slug = f"{name}_{token}"
            define(db, slug, {"work": []})
            db.execute("UPDATE pgflow.steps SET step_type = 'map' WHERE workflow_slug = %s", [slug])
            workflow = Workflow(slug)
            handlers = {step: trace.make_async(step, pause) for step in graph}

            @workflow.map(over="payload")
            async def work(item: str) -> int:
                return await handlers[item]()

            return Job(lambda: asyncio.run(workflow.flow(payload=[*graph])), lambda: check(db, slug, graph))

        yield prepare


def check(db: Connection, slug: str, graph: Graph) -> None:
    """Assert that PostgreSQL has the run, and each item, as completed."""
    assert db.execute(COMPLETED, [slug]).fetchone() == ("completed", len(graph), len(graph))
