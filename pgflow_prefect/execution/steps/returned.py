"""Turns a Prefect state that a handler returns into the end of its step."""

from collections.abc import Callable
from typing import Any

from prefect.client.schemas.objects import State

from pgflow_prefect.errors import NotRetriableError, ReturnedEndError, ReturnedStateError
from pgflow_prefect.handlers.raised import describe

_COLLECTIONS = (list, tuple, set)


def settle(value: Any) -> Any:  # noqa: ANN401  whatever a handler returned
    """Return the value that a handler returned: the data of a state Completed, or a list of the data of several.

    Raises:
        ReturnedStateError: a state is not a success.
        NotRetriableError: a state is not final.
    """
    if isinstance(value, State):
        return _read(value)
    if isinstance(value, _COLLECTIONS) and value and all(isinstance(each, State) for each in value):
        return _read_all([*value])
    return value


def _read_all(states: list[State[Any]]) -> list[Any]:
    failed = [each for each in states if not each.is_completed()]
    if not failed:
        return [_read(each) for each in states]
    try:
        _read(failed[0])
    except ReturnedStateError as error:  # like Prefect's message for a task that returns the states of other tasks
        reason = f"{len(failed)} of {len(states)} states: {error.reason}"
        raise type(error)(error.state_name, reason) from error.__cause__
    raise AssertionError("a state that is not completed has no value")


def _read(state: State[Any]) -> Any:  # noqa: ANN401
    if not state.is_final():
        raise NotRetriableError(
            f"the handler returned Prefect's state {state.name}, which is no end: return a value, Completed(data=…) or "
            "Failed(message=…)"
        )
    # A state of this process has its value; one from Prefect's API says where its value is stored.
    read: Callable[..., Any] = state.result
    data = None if state.data is None else read(raise_on_failure=False, _sync=True)
    if state.is_completed():
        return data
    cause = data if isinstance(data, BaseException) else None
    reason = state.message or (describe(cause) if cause is not None else "")
    kind = ReturnedStateError if state.is_failed() else ReturnedEndError
    raise kind(state.name or state.type.value.title(), reason) from cause
