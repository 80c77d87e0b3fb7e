"""The progress of a run, step by step, for its pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import cached_property

from pgflow_prefect.definitions.graph import Graph, find_ancestors, find_last_path
from pgflow_prefect.models import Ending, Held, Run, Status, StepState
from pgflow_prefect.render.labels import format_seconds
from pgflow_prefect.state_names import StateName


class Look(StrEnum):
    """How a step of a run looks: its status, and what `status` has in the column of Prefect."""

    WAITING = "waiting"
    """Its upstream steps are not all completed."""

    PENDING = "pending"
    """It was started, but no process has begun the work."""

    RUNNING = "running"

    RETRYING = "retrying"
    """An attempt has failed, and the next one is to come."""

    ELSEWHERE = "elsewhere"
    """An external worker, a queue or an endpoint does it, and the flow run waits."""

    COMPLETED = "completed"

    CACHED = "cached"
    """It completed before the latest flow run took the run, and was not executed again."""

    SKIPPED = "skipped"
    """It was skipped, and counts as completed."""

    FAILED = "failed"

    NOT_RUN = "not run"
    """A step that it waits for has failed, so that it was not executed."""

    CANCELLED = "cancelled"
    """The run was cancelled before the step ended."""


_LOOKS: dict[str, Look] = {
    StateName.AWAITING_RETRY: Look.RETRYING,
    StateName.WAITING: Look.ELSEWHERE,
    StateName.DEFERRED: Look.ELSEWHERE,
}
"""The looks of a pending step, by the state of its task run."""


@dataclass(frozen=True)
class Mark:
    """A step of a run in pictures.

    Attributes:
        look: its state.
        attempts: how often the work has begun.
        started_at: when the latest attempt began; None if the step was never claimed.
        ended_at: when the step ended, or the moment of the picture while it runs; None if it has done nothing.
        handler: the handler that does it.
        error: the first line of its error, or why it was skipped.
        first_started_at: when the first of several attempts began; None if there was only one.
        tasks: how many tasks a map step has, in words; empty for a plain step.
    """

    look: Look = Look.WAITING
    attempts: int = 0
    started_at: datetime | None = None
    ended_at: datetime | None = None
    handler: str | None = None
    error: str | None = None
    first_started_at: datetime | None = None
    tasks: str = ""

    @property
    def seconds(self) -> float | None:
        """The duration of the latest attempt, up to now if it still runs."""
        if self.started_at is None or self.ended_at is None:
            return None
        return max((self.ended_at - self.started_at).total_seconds(), 0.0)

    @property
    def measures(self) -> str:
        """Duration and attempts in words; empty if there are none."""
        said = [self.tasks] if self.tasks else []
        if self.seconds is not None:
            said.append(format_seconds(self.seconds))
        if self.attempts > 1:
            said.append(f"{self.attempts} attempts")
        return ", ".join(said)


@dataclass(frozen=True)
class Progress:
    """A run at one moment.

    Attributes:
        run: the run.
        marks: all of its steps, in the order of the graph.
        critical: the run's critical path, its first step first; see `find_last_path`.
        now: the moment, by the database's clock.
    """

    run: Run
    marks: Mapping[str, Mark]
    critical: tuple[str, ...]
    now: datetime

    @cached_property
    def critical_steps(self) -> frozenset[str]:
        """The steps of the critical path, as a set for look-ups."""
        return frozenset(self.critical)

    @property
    def summary(self) -> str:
        """The run in a line."""
        done = sum(mark.look in {Look.COMPLETED, Look.CACHED, Look.SKIPPED} for mark in self.marks.values())
        return f"run {self.run.id}: {self.run.ended_as or self.run.status}, {done} of {len(self.marks)} steps completed"


def trace_progress(graph: Graph, run: Run, states: Mapping[str, StepState], now: datetime) -> Progress:
    """Return the progress of a run.

    Args:
        graph: of the definition that the run began with.
        run: the run.
        states: the steps that have started, by slug.
        now: by the database's clock, which also dates run and states.
    """
    # A pending step of an ended run that no process holds has no end of its own.
    ended = run.status is not Status.PENDING and run.held is not Held.LEASED
    latest = run.finished_at if ended and run.finished_at else now
    marks = {slug: _mark(states[slug], latest) if slug in states else Mark() for slug in graph}
    # All running steps end now, so take the one that has run longest.
    ends = {
        slug: (mark.ended_at, -(mark.started_at or mark.ended_at).timestamp())
        for slug, mark in marks.items()
        if mark.ended_at
    }
    failed = [slug for slug, mark in marks.items() if mark.look is Look.FAILED and slug in ends]
    if run.status is Status.FAILED and failed:
        # The first failed step ended the run. A step that was running then may end later, but it decided nothing.
        first = min(failed, key=lambda slug: ends[slug][0])
        ends = {slug: ends[slug] for slug in find_ancestors(graph, first) | {first} if slug in ends}
    return Progress(run, marks, tuple(find_last_path(graph, ends)), now)


def _mark(state: StepState, latest: datetime) -> Mark:
    look = find_look(state)
    ended_at = state.finished_at
    if state.status is Status.PENDING:
        ended_at = state.started_at and max(latest, state.started_at)
    elif look in {Look.CANCELLED, Look.SKIPPED, Look.NOT_RUN} and state.started_at is None:
        ended_at = None  # it has done nothing
    error = (state.skip_message or state.error_message or state.skip_reason or "").split("\n", 1)[0] or None
    first = state.first_claimed_at if state.attempts > 1 else None
    return Mark(look, state.attempts, state.started_at, ended_at, state.handler, error, first, write_tasks(state))


def write_tasks(state: StepState) -> str:
    """Return the number of a map step's tasks, and how many are completed; empty for a plain step."""
    if state.tasks is None or state.skip_reason is not None:
        return ""
    number = f"{state.tasks} task{'s'[: state.tasks != 1]}"
    return number if state.status is Status.COMPLETED else f"{state.tasks_completed or 0} of {number}"


def find_look(state: StepState) -> Look:
    """Return how a step that has started looks."""
    if state.is_skipped:
        return Look.SKIPPED
    if state.is_not_run:
        return Look.NOT_RUN
    if state.status is Status.COMPLETED:
        return Look.CACHED if state.task_state == StateName.CACHED else Look.COMPLETED
    if state.status is Status.FAILED:
        return Look.CANCELLED if state.ended_as is Ending.CANCELLED else Look.FAILED
    return _LOOKS.get(state.task_state or "", Look.RUNNING if state.started_at else Look.PENDING)
