"""The order in which the steps of a run execute."""

from asyncio import TaskGroup, current_task
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import Context, copy_context
from functools import partial

from pgflow_prefect.definitions.graph import Graph
from pgflow_prefect.errors import DatabaseUnavailableError, find_first
from pgflow_prefect.execution.decisions import Decisions
from pgflow_prefect.execution.outcomes import StepOutcome
from pgflow_prefect.execution.process.slots import Turns

Advance = Callable[[], bool]
"""Begins the steps that waited for a completed step, and returns whether there are any."""


class Schedule:
    """Decides which steps of a run may start.

    In a run without rules it counts what has ended, as PostgreSQL does. In a run with rules it asks PostgreSQL.

    Attributes:
        graph: the workflow.
        turns: limits how many of its steps work at the same time.
        continues: other steps start after a failure.
        stopped: no further step may start.
        decisions: of PostgreSQL, in a run with rules; None while the run has none.
        is_broken_off: tells whether all its steps are being cancelled, from outside or because one raised.
    """

    def __init__(self, graph: Graph, turns: Turns, *, continues: bool = False) -> None:
        """Begin with a run without a completed step.

        Args:
            graph: the workflow.
            turns: limits how many of its steps work at the same time.
            continues: a failure does not end the run.
        """
        self.graph = graph
        self.turns = turns
        self.continues = continues
        self.stopped = False
        self.decisions: Decisions | None = None
        self.is_broken_off: Callable[[], bool] = lambda: False
        self._unmet = dict(graph.in_degree())
        self._foreseen: set[str] = set()  # steps that have not begun yet
        self._begun: set[str] = set()

    @property
    def roots(self) -> list[str]:
        """The steps without upstream steps."""
        return [slug for slug, in_degree in self.graph.in_degree() if in_degree == 0]

    def follow(self, decisions: Decisions) -> None:
        """Let PostgreSQL decide from now on: the run has rules, or a step of it was skipped."""
        if self.decisions is None:
            decisions.left = set(self.graph) - self._begun
            self.decisions = decisions

    def may_go_on(self, outcome: StepOutcome) -> bool:
        """Tell whether other steps may start after a step with this outcome."""
        return outcome.is_done or (self.continues and outcome is StepOutcome.FAILED)

    async def find_first(self) -> list[str]:
        """Return the steps that are to begin at once."""
        return self.roots if self.decisions is None else await self._ask()

    async def find_next(self, slug: str) -> list[str]:
        """Return the steps that are to begin after a step has ended."""
        return self.conclude(slug) if self.decisions is None else await self._ask([slug])

    async def find_rest(self) -> list[str]:
        """Return the steps that are to begin although no end of a step here has told so: by hand, say."""
        return [] if self.decisions is None or self.stopped else await self._ask()

    async def _ask(self, ended: Sequence[str] | None = None) -> list[str]:
        """Ask PostgreSQL. If it does not answer, leave the rest of the run to the next owner."""
        assert self.decisions is not None
        try:
            return await self.decisions.find_ready(ended)
        except DatabaseUnavailableError:
            self.stopped = True
            return []

    def conclude(self, slug: str) -> list[str]:
        """Note that a step is done, and return the steps that are ready now; a second note returns none."""
        if self.decisions is not None or self._unmet.pop(slug, None) is None:
            return []
        ready = self._find_ready(slug)
        for downstream in self.graph.successors(slug):
            self._unmet[downstream] -= 1
        return ready

    def foresee(self, slug: str) -> list[str]:
        """Return the steps that will start at once when this working step is done."""
        if self.decisions is not None:
            return []
        certain = self._find_ready(slug)[: max(0, self.turns.count_next() - len(self._foreseen))]
        self._foreseen.update(certain)
        return certain

    def note(self, slugs: Iterable[str]) -> None:
        """Note that these steps wait for their turn."""
        self._begun.update(slugs)

    def begin(self, slug: str) -> None:
        """Note that a step's turn has come."""
        self._foreseen.discard(slug)

    def _find_ready(self, slug: str) -> list[str]:
        return [downstream for downstream in self.graph.successors(slug) if self._unmet[downstream] == 1]


async def run_in_order(schedule: Schedule, perform: Callable[[str, Advance], Awaitable[StepOutcome]]) -> None:
    """Perform every step as soon as its own upstream steps are done, and its turn has come.

    Args:
        schedule: of the run.
        perform: executes one step and returns its outcome. After the first step that is not done, no other step
            starts, and working steps go on to their end. It may start the next steps before it returns.
    """
    try:
        await _perform_all(schedule, perform)
    except BaseExceptionGroup as raised:
        # SIGTERM in the main thread, or a pause: Prefect's engine recognises their types.
        if signals := raised.subgroup(lambda error: not isinstance(error, Exception | BaseExceptionGroup)):
            raise find_first(signals) from None
        raise


async def _perform_all(schedule: Schedule, perform: Callable[[str, Advance], Awaitable[StepOutcome]]) -> None:
    context, all_steps = copy_context(), current_task()
    assert all_steps is not None
    cancelled_before = all_steps.cancelling()
    broken: list[str] = []
    schedule.is_broken_off = lambda: bool(broken) or all_steps.cancelling() > cancelled_before
    first = await schedule.find_first()
    while first:
        await _perform_from(schedule, perform, first, context, broken)
        first = await schedule.find_rest()


async def _perform_from(
    schedule: Schedule,
    perform: Callable[[str, Advance], Awaitable[StepOutcome]],
    first: list[str],
    context: Context,
    broken: list[str],
) -> None:
    """Perform these steps, and what becomes ready by them."""
    async with TaskGroup() as group:  # anyio's group takes fifteen times as long to begin a task

        def begin(slugs: list[str]) -> None:
            schedule.note(slugs)
            for slug in slugs:
                # In the run's context: it is not a child of the step that made it ready.
                group.create_task(work(slug), context=context.copy())

        def advance(slug: str) -> bool:
            ready = schedule.conclude(slug)
            begin(ready)
            return bool(ready)

        async def work(slug: str) -> None:
            try:
                async with schedule.turns.take(slug):
                    schedule.begin(slug)
                    if schedule.stopped or not schedule.may_go_on(await perform(slug, partial(advance, slug))):
                        schedule.stopped = True
                        return
                begin(await schedule.find_next(slug))
            except BaseException:
                broken.append(slug)  # asyncio's group cancels the other tasks with it
                raise

        begin(first)
