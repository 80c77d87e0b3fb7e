"""The graphs that are executed, and what their steps do."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import networkx as nx

from benchmarks.engine import Graph, chain

PAUSES: Mapping[str, float] = {"nothing": 0.0, "sleep": 0.05}
"""What a handler does, and for how many seconds: nothing shows the overhead, sleeping the concurrency."""


def wide(width: int) -> Graph:
    """Return steps side by side that wait for nothing."""
    return {f"s{n}": [] for n in range(width)}


def fan(width: int) -> Graph:
    """Return one step, many that wait for it, and one that waits for them all."""
    middle = [f"s{n}" for n in range(width)]
    return {"first": [], **{step: ["first"] for step in middle}, "last": middle}


def layers(depth: int, width: int) -> Graph:
    """Return layers of steps, each of which waits for all steps of the layer before."""
    rows = [[f"s{row}_{n}" for n in range(width)] for row in range(depth)]
    return {step: above for above, row in zip([[], *rows], rows, strict=False) for step in row}


def lattice(depth: int, width: int) -> Graph:
    """Return layers of steps, each of which waits for three steps of the layer before."""
    return {
        f"s{row}_{n}": [f"s{row - 1}_{(n + place) % width}" for place in range(3)] if row else []
        for row in range(depth)
        for n in range(width)
    }


SHAPES: Mapping[str, Graph] = {
    "chain of 100": chain(100),
    "1 to 100 to 1": fan(100),
    "10 layers of 10": layers(10, 10),
    "1,000 wide": wide(1_000),
    "100 wide": wide(100),
    "chain of 1,000": chain(1_000),
    "20 layers of 50": lattice(20, 50),
    "40 layers of 50": lattice(40, 50),
    "100 layers of 50": lattice(100, 50),
    "3 layers of 3": layers(3, 3),
    "map of 1,000": wide(1_000),
    "map of 9": wide(9),
}
"""By the names that processes call them by. Those of maps have an item for each step."""


def find_layers(graph: Graph) -> list[list[str]]:
    """Return the steps layer by layer. In every graph here, a layer's steps wait for those right above, and for all."""
    edges = [(above, step) for step, upstream in graph.items() for above in upstream]
    ordered: nx.DiGraph[str] = nx.DiGraph(edges)
    ordered.add_nodes_from(graph)
    return [list(layer) for layer in nx.topological_generations(ordered)]


def find_downstream(graph: Graph) -> Graph:
    """Return the steps that wait for each step."""
    downstream: Graph = {step: [] for step in graph}
    for step, upstream in graph.items():
        for each in upstream:
            downstream[each].append(step)
    return downstream


class Trace:
    """What the handlers of one run did, in order: each exactly once, after its upstream."""

    def __init__(self) -> None:
        self._begun: list[tuple[str, int]] = []  # with how many steps had ended by then
        self._ended: list[str] = []

    def clear(self) -> None:
        """Forget the last run."""
        self._begun.clear()
        self._ended.clear()

    def make_async(self, step: str, pause: float) -> Callable[[], Coroutine[Any, Any, int]]:
        """Return a step's handler for an event loop."""

        async def handle() -> int:
            self._begun.append((step, len(self._ended)))
            if pause:
                await asyncio.sleep(pause)
            self._ended.append(step)
            return 1

        return handle

    def make_sync(self, step: str, pause: float) -> Callable[[], int]:
        """Return a step's handler for a thread."""

        def handle() -> int:
            self._begun.append((step, len(self._ended)))
            if pause:
                time.sleep(pause)
            self._ended.append(step)
            return 1

        return handle

    def check(self, graph: Graph) -> None:
        """Assert that it is this graph that was executed."""
        assert sorted(self._ended) == sorted(graph), "not every step was executed exactly once"
        place = {step: number for number, step in enumerate(self._ended)}
        for step, ended in self._begun:
            assert all(place[upstream] < ended for upstream in graph[step]), f"{step} began before its upstream ended"
