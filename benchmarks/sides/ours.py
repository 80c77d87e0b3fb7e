"""pgflow-prefect with its defaults: the flow that `workflow.flow` is, called as any Prefect flow is."""

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
    SELECT r.status, count(*) FILTER (WHERE s.status = 'completed')
    FROM pgflow.runs r JOIN pgflow.step_states s ON s.run_id = r.id
    WHERE r.workflow_slug = %s GROUP BY r.id ORDER BY r.created_at DESC LIMIT 1
"""


@contextmanager
def open_side(dsn: str, *, sync: bool = False) -> Iterator[Prepare]:
    """Keep a connection, to define workflows and to look how runs ended; flows open and close their own."""
    token = uuid4().hex[:8]  # the database may have the workflows of other processes
    with psycopg.connect(dsn, autocommit=True) as db:

        def prepare(name: str, graph: Graph, pause: float, trace: Trace) -> Job:
            slug = f"{name}_{token}"
            define(db, slug, graph)
            workflow = Workflow(slug)
            make = trace.make_sync if sync else trace.make_async
            for step in graph:
                workflow.step(step)(make(step, pause))
            return Job(lambda: asyncio.run(workflow.flow(payload={})), lambda: check(db, slug, graph))

        yield prepare


def check(db: Connection, slug: str, graph: Graph) -> None:
    """Assert that PostgreSQL has the run and its steps as completed."""
    assert db.execute(COMPLETED, [slug]).fetchone() == ("completed", len(graph))
