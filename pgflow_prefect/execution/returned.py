"""What a handler means that returns one of Prefect's states: a state counts as what it is."""

from collections.abc import Callable
from typing import Any

from prefect.client.schemas.objects import State

from pgflow_prefect.errors import NotRetriableError, ReturnedEndError, ReturnedStateError
from pgflow_prefect.handlers.raised import describe

_COLLECTIONS = (list, tuple, set)


def settle(value: Any) -> Any:  # noqa: ANN401  whatever a handler returned
    """Return the value of what a handler returned: of a state Completed its data, of several a list of them.

    Raises:
        ReturnedStateError: a state is none of success.
        NotRetriableError: a state is no end.
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
    except ReturnedStateError as error:  # as Prefect has it for a task that returns the states of others
        reason = f"{len(failed)} of {len(states)} states: {error.reason}"
        raise type(error)(error.state_name, reason) from error.__cause__
    raise AssertionError("a state that is not completed has no value")


def _read(state: State[Any]) -> Any:  # noqa: ANN401
    if not state.is_final():
        raise NotRetriableError(
            f"the handler returned Prefect's state {state.name}, which is no end: return a value, Completed(data=…) or "
            "Failed(message=…)"
        )
    # A state of ours has its value with it; one that was read from Prefect's API says where its value is kept.
    read: Callable[..., Any] = state.result
    data = None if state.data is None else read(raise_on_failure=False, _sync=True)
    if state.is_completed():
        return data
    cause = data if isinstance(data, BaseException) else None
    reason = state.message or (describe(cause) if cause is not None else "")
    kind = ReturnedStateError if state.is_failed() else ReturnedEndError
    raise kind(state.name or state.type.value.title(), reason) from cause
