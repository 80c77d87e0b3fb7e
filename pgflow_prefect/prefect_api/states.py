"""Our own final states of flow runs and task runs, and what they mean for a run."""

from typing import Any

from prefect.client.schemas.objects import State, StateType

from pgflow_prefect.state_names import StateName

OURS = frozenset({StateName.SUPERSEDED, StateName.HANDED_BACK})
"""Names of CANCELLED states that no user asked for: the run itself is not cancelled, and goes on."""


def superseded(message: str) -> State[Any]:
    """Return the state of a flow run or task run that stops because another flow run has taken the run."""
    return State(type=StateType.CANCELLED, name=StateName.SUPERSEDED, message=message)


def handed_back(message: str) -> State[Any]:
    """Return the state of a flow run or task run whose process stops: the next owner goes on with the run."""
    return State(type=StateType.CANCELLED, name=StateName.HANDED_BACK, message=message)


def skipped(message: str | None) -> State[Any]:
    """Return the state of a task run whose step is skipped."""
    return State(type=StateType.COMPLETED, name=StateName.SKIPPED, message=message)


def not_run(message: str | None) -> State[Any]:
    """Return the state of a task run whose step is not executed, because one that it waits for has failed."""
    return State(type=StateType.PENDING, name=StateName.NOT_RUN, message=message)


def is_cancelled(state: State[Any]) -> bool:
    """Tell whether this flow run was cancelled, or is being cancelled."""
    return state.type is StateType.CANCELLING or (state.type is StateType.CANCELLED and state.name not in OURS)
