"""What PostgreSQL decides about the steps of a run with rules: this process only begins and shows what it says."""

from asyncio import sleep
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field

from pgflow_prefect.definitions.graph import Graph
from pgflow_prefect.models import StepState

Look = Callable[[Collection[str]], Awaitable[list[StepState]]]
"""Returns the states of those of these steps that have one."""


@dataclass
class Decisions:
    """The steps of a run that this process has neither begun nor shown.

    Attributes:
        graph: the workflow.
        look: asks PostgreSQL.
        show: shows a step that has ended without a claim: skipped, not run, failed before.
        left: their slugs.
    """

    graph: Graph
    look: Look
    show: Callable[[StepState], None]
    left: set[str] = field(default_factory=set)

    async def find_ready(self, ended: Collection[str] | None = None) -> list[str]:
        """Return the steps that are to begin, and show those that were decided otherwise; each step once.

        Args:
            ended: only what is below these steps; None for all.
        """
        ready: list[str] = []
        asked = set(self.left) if ended is None else self._find_below(ended)
        while asked:
            decided: list[str] = []
            for state in await self.look(asked):
                if state.step_slug not in self.left:
                    continue  # another look was faster
                self.left.discard(state.step_slug)
                if state.is_decided:
                    self.show(state)
                    await sleep(0)  # there may be thousands, and leases are extended meanwhile
                    decided.append(state.step_slug)
                else:
                    ready.append(state.step_slug)
            asked = self._find_below(decided)
        return ready

    def _find_below(self, ended: Collection[str]) -> set[str]:
        return {below for slug in ended for below in self.graph.successors(slug) if below in self.left}
