"""The states of ours that a flow run or a task run may end in, beside Prefect's own."""

from typing import Any

from prefect.client.schemas.objects import State, StateType

SUPERSEDED = "Superseded"
HANDED_BACK = "HandedBack"

OURS = frozenset({SUPERSEDED, HANDED_BACK})
"""Names of states of the type CANCELLED that nobody asked for: the run itself is not cancelled, and goes on."""


def superseded(message: str) -> State[Any]:
    """Return the state of what stops because somebody else has the run."""
    return State(type=StateType.CANCELLED, name=SUPERSEDED, message=message)


def handed_back(message: str) -> State[Any]:
    """Return the state of what stops because its process does: somebody else goes on with the run."""
    return State(type=StateType.CANCELLED, name=HANDED_BACK, message=message)


def is_cancelled(state: State[Any]) -> bool:
    """Tell whether somebody has cancelled this flow run, or is doing so."""
    return state.type is StateType.CANCELLING or (state.type is StateType.CANCELLED and state.name not in OURS)
