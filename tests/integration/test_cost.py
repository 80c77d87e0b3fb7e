"""What a run costs, as counts and ratios that hold on any machine: statements a step, and the cost as a run grows."""

import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from benchmarks.engine import Graph, chain
from benchmarks.shapes import layers, wide
from pgflow_prefect import Workflow
from tests.conftest import Connection
from tests.engine import define
from tests.integration.conftest import make_slug
from tests.integration.test_statements import count_commits

pytestmark = pytest.mark.anyio

CONSTANT = 30
"""Statements of a run whatever its size: opening connections, taking the run, its definition, its end, its lease."""


def make_workflow(slug: str, graph: Graph) -> Workflow:
    workflow = Workflow(slug)

    async def work() -> int:
        return 1

    for step in graph:
        workflow.step(step)(work)
    return workflow


@pytest.mark.parametrize(
    ("graph", "most"),
    [(chain(100), 2.0), (layers(10, 10), 1.0), (wide(300), 0.5)],
    ids=["chain", "layers", "wide"],
)
async def test_a_step_costs_two_statements_at_most_and_less_where_several_come_together(
    graph: Graph, most: float, dsn: str, pgflow_dsn: str, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_LEASE", "600")  # or a slow machine extends it meanwhile
    execute, statements = psycopg.AsyncCursor.execute, 0

    async def count(cursor: psycopg.AsyncCursor[Any], *arguments: Any, **named: Any) -> psycopg.AsyncCursor[Any]:
        nonlocal statements
        statements += 1
        return await execute(cursor, *arguments, **named)

    monkeypatch.setattr(psycopg.AsyncCursor, "execute", count)
    with psycopg.connect(dsn, autocommit=True) as db:
        define(db, slug := make_slug(), graph)
    workflow = make_workflow(slug, graph)
    before = await count_commits(dsn)
    await workflow.flow({})
    assert await count_commits(dsn) - before <= most * len(graph) + CONSTANT
    assert len(graph) / 100 < statements <= most * len(graph) + CONSTANT, "and none takes several in a transaction"


@pytest.mark.parametrize("make", [chain, wide])
async def test_a_step_of_a_large_run_costs_what_one_of_a_small_run_does(
    make: Callable[[int], Graph], db: Connection, pgflow_dsn: str, prefect_api: str
) -> None:
    costs: dict[int, float] = {}
    for size in (50, 400):
        define(db, slug := make_slug(), graph := make(size))
        workflow = make_workflow(slug, graph)
        if size == 50:
            await workflow.flow({})  # what only the first run does
        begun = time.thread_time()
        await workflow.flow({})
        costs[size] = (time.thread_time() - begun) / size
    # Of the event loop's thread: what others do counts little, and what is sent after the run not at all. Quadratic
    # would be eight times as much.
    assert costs[400] < 2 * costs[50]
