"""Tells the outcome of a step from the state of its task run."""

from enum import StrEnum
from typing import Any

from prefect.client.schemas.objects import State, StateType

from pgflow_prefect.execution.process.host import Stop
from pgflow_prefect.state_names import StateName


class StepOutcome(StrEnum):
    """The outcome of a step for its flow run."""

    COMPLETED = "completed"
    SKIPPED = "skipped"
    FAILED = "failed"
    CANCELLED = "cancelled"
    """The run was cancelled, or ended before this step was claimed."""

    SUPERSEDED = "superseded"
    """Another flow run has taken the run."""

    HANDED_BACK = "handed back"
    """The run's next owner executes the step: this process ends, or PostgreSQL did not answer."""

    @property
    def is_done(self) -> bool:
        """Whether the steps that wait for this one may start."""
        return self in (StepOutcome.COMPLETED, StepOutcome.SKIPPED)


_OUTCOMES = {
    StateType.COMPLETED: StepOutcome.COMPLETED,
    StateType.FAILED: StepOutcome.FAILED,
    StateType.CANCELLED: StepOutcome.CANCELLED,
}


_OUTCOMES_BY_NAME: dict[tuple[StateType, str | None], StepOutcome] = {
    (StateType.COMPLETED, StateName.SKIPPED): StepOutcome.SKIPPED,
    (StateType.CANCELLED, StateName.SUPERSEDED): StepOutcome.SUPERSEDED,
    (StateType.CANCELLED, StateName.HANDED_BACK): StepOutcome.HANDED_BACK,
}


_OUTCOMES_OF_STOP = {Stop.ENDED: StepOutcome.CANCELLED, Stop.LOST: StepOutcome.SUPERSEDED}


def find_outcome(state: State[Any]) -> StepOutcome:
    """Return the outcome of a step whose task run has ended in this state."""
    by_name = _OUTCOMES_BY_NAME.get((state.type, state.name))
    return by_name or _OUTCOMES.get(state.type, StepOutcome.HANDED_BACK)


def find_outcome_of_stop(reason: Stop | None) -> StepOutcome:
    """Return the outcome of a step that this process has not begun, because its run was stopped or drained."""
    stopped = None if reason is None else _OUTCOMES_OF_STOP.get(reason)
    return stopped or StepOutcome.HANDED_BACK
