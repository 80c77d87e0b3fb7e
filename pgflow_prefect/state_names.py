"""The names of the states that a task run or a flow run of ours is in: Prefect's own, and those that we add."""

from collections.abc import Callable
from enum import StrEnum

Observer = Callable[[str, str], None]
"""Called with a step's slug and the name of the state that it entered."""


class StateName(StrEnum):
    """A state's name in Prefect, in `pgflow_prefect.task_runs` and in events.

    A handler may return a state of Prefect's by another name: where a state comes from a handler, its name is any text.
    """

    PENDING = "Pending"
    RUNNING = "Running"
    RETRYING = "Retrying"
    AWAITING_RETRY = "AwaitingRetry"
    """An attempt has failed, and the next one is to come."""

    WAITING = "Waiting"
    """An external worker is to do the step."""

    DEFERRED = "Deferred"
    """A queue or an endpoint was asked to do the step, and is yet to report it."""

    COMPLETED = "Completed"
    CACHED = "Cached"
    """The step completed before, and was not executed again."""

    SKIPPED = "Skipped"
    """The step was not needed, and what waits for it may go on."""

    NOT_RUN = "NotReady"
    """A step that it waits for has failed, so that this one is not executed."""

    FAILED = "Failed"
    TIMED_OUT = "TimedOut"
    CANCELLED = "Cancelled"
    CRASHED = "Crashed"
    REFUSED = "Refused"
    """PostgreSQL refuses to note the step's claim or its end: the run is set aside."""

    SUPERSEDED = "Superseded"
    """Another flow run has taken the run."""

    HANDED_BACK = "HandedBack"
    """The process was stopped, and the next owner goes on with the run."""


WORKING = frozenset(
    {
        StateName.PENDING,
        StateName.RUNNING,
        StateName.RETRYING,
        StateName.AWAITING_RETRY,
        StateName.WAITING,
        StateName.DEFERRED,
    }
)
"""Of a step that has not ended."""

IDLE = frozenset({StateName.AWAITING_RETRY, StateName.WAITING, StateName.DEFERRED})
"""Of a step that has not ended, and that no process of ours works on now."""

DONE = frozenset({StateName.COMPLETED, StateName.CACHED, StateName.SKIPPED})
"""Of a step that what waits for it may go on after."""
