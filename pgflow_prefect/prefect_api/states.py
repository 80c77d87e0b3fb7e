"""Our own final states of flow runs and task runs, and what they mean for a run."""

from typing import Any, cast

from prefect.client.schemas.objects import State, StateType, TaskRun
from prefect.types import DateTime

from pgflow_prefect.state_names import StateName

OURS = frozenset({StateName.SUPERSEDED, StateName.HANDED_BACK})
"""Names of CANCELLED states that no user asked for: the run itself is not cancelled, and goes on."""

DECIDED = frozenset({StateName.SKIPPED, StateName.NOT_RUN})
"""Names of the states of steps that have ended without an execution, or after one that does not count."""


def superseded(message: str) -> State[Any]:
    """Return the state of a flow run or task run that stops because another flow run has taken the run."""
    return State(type=StateType.CANCELLED, name=StateName.SUPERSEDED, message=message)


def handed_back(message: str) -> State[Any]:
    """Return the state of a flow run or task run whose process stops: the next owner goes on with the run."""
    return State(type=StateType.CANCELLED, name=StateName.HANDED_BACK, message=message)


def refused(message: str) -> State[Any]:
    """Return the state of a task run whose claim or end PostgreSQL refuses to note: its run is set aside."""
    return State(type=StateType.CRASHED, name=StateName.REFUSED, message=message)


def skipped(message: str | None) -> State[Any]:
    """Return the state of a task run whose step is skipped."""
    return State(type=StateType.COMPLETED, name=StateName.SKIPPED, message=message)


def not_run(message: str | None) -> State[Any]:
    """Return the state of a task run whose step is not executed, because one that it waits for has failed."""
    return State(type=StateType.PENDING, name=StateName.NOT_RUN, message=message)


def date_decided(task_run: TaskRun, state: State[Any]) -> None:
    """Date a task run whose step is skipped or not run, so that it has a place in Prefect's graph.

    The graph leaves out a task run without a beginning, and draws one without an end until today.
    """
    time = cast("DateTime", state.timestamp)
    task_run.expected_start_time = task_run.expected_start_time or time
    task_run.end_time = task_run.end_time or time


def is_cancelled(state: State[Any]) -> bool:
    """Tell whether this flow run was cancelled, or is being cancelled."""
    return state.type is StateType.CANCELLING or (state.type is StateType.CANCELLED and state.name not in OURS)
