"""What a run costs, as counts and ratios that hold on any machine: statements a step, and the cost as a run grows."""

import time
from collections.abc import Callable

import pytest

from benchmarks.engine import Graph, chain
from benchmarks.shapes import layers, wide
from pgflow_prefect import Workflow
from tests.conftest import Connection
from tests.engine import define
from tests.growth import ATTEMPTS, ROOM
from tests.integration.conftest import make_slug
from tests.statement_counter import StatementCounter

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
    graph: Graph, most: float, counter: StatementCounter, db: Connection, prefect_api: str
) -> None:
    define(db, slug := make_slug(), graph)
    workflow = make_workflow(slug, graph)
    before = counter.count
    await workflow.flow({})
    assert len(graph) / 100 < counter.count - before <= most * len(graph) + CONSTANT


@pytest.mark.thorough
@pytest.mark.parametrize("make", [chain, wide])
async def test_a_step_of_a_large_run_costs_what_one_of_a_small_run_does(
    make: Callable[[int], Graph], db: Connection, pgflow_dsn: str, prefect_api: str
) -> None:
    workflows = {}
    for size in (50, 400):
        define(db, slug := make_slug(), graph := make(size))
        workflows[size] = make_workflow(slug, graph)

    async def measure(size: int) -> float:
        begun = time.thread_time()
        await workflows[size].flow({})
        return time.thread_time() - begun

    await measure(50)  # what only the first run does
    # Of the event loop's thread: what others do counts little, and what is sent after the run not at all. Quadratic
    # would be sixty-four times as much.
    measured: list[tuple[float, float]] = []
    while not measured or (measured[-1][1] > ROOM * 8 * measured[-1][0] and len(measured) < ATTEMPTS):
        measured.append((await measure(50), await measure(400)))
    assert measured[-1][1] <= ROOM * 8 * measured[-1][0], measured
