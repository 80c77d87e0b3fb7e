"""The order in which the steps of a run execute."""

from collections.abc import Awaitable, Callable

import anyio

from pgflow_prefect.execution.turns import Turns
from pgflow_prefect.graph import Graph


async def run_in_order(graph: Graph, perform: Callable[[str], Awaitable[bool]], turns: Turns) -> None:
    """Perform every step as soon as its own upstream steps are done, and its turn has come.

    Args:
        graph: the workflow.
        perform: does one step and tells whether it completed. After the first that did not, those under way go on
            to their end, and no other starts.
        turns: how many work at the same time.
    """
    unmet = dict(graph.in_degree())
    stopped = False

    async with anyio.create_task_group() as group:

        async def work(slug: str) -> None:
            nonlocal stopped
            async with turns.take(slug):
                if stopped or not await perform(slug):
                    stopped = True
                    return
            for downstream in graph.successors(slug):
                unmet[downstream] -= 1
                if unmet[downstream] == 0:
                    group.start_soon(work, downstream)

        for slug, in_degree in graph.in_degree():
            if in_degree == 0:
                group.start_soon(work, slug)
