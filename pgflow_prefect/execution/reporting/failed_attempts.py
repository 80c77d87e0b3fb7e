"""What follows an attempt that has raised an error: its log, its state, and the time until the next one."""

from traceback import format_exception
from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Failed

from pgflow_prefect.database.step_transaction import Logger
from pgflow_prefect.errors import HandlerRaisedError, ReturnedStateError
from pgflow_prefect.execution.reporting.tracebacks import trim
from pgflow_prefect.handlers.raised import describe
from pgflow_prefect.prefect_api.internals import clamped_poisson_interval
from pgflow_prefect.state_names import StateName


def log_failure(logger: Logger, error: Exception, exhausted: str) -> None:
    """Log the error of an attempt, as Prefect does; `exhausted` says that it was the last one."""
    message = "Task run failed with exception: %s%s"
    what = str(error) if isinstance(error, HandlerRaisedError) else repr(error)
    shown = trim(error)
    trace = "".join(format_exception(*shown)) if shown else ""
    printable = trace.encode("utf-8", "backslashreplace").decode()
    if trace == printable:
        logger.error(message, what, exhausted, exc_info=shown)
    else:
        # Half a character: Prefect's handler can't send it, and prints that. `print` is a log here: an endless loop.
        logger.error(f"{message}\n%s", what, exhausted, printable)


def make_failed(error: Exception) -> State[Any]:
    """Return the state of a task run whose last attempt has raised this."""
    if isinstance(error, TimeoutError):
        return Failed(name=StateName.TIMED_OUT, data=error, message=f"Task run failed due to timeout: {error!r}")
    if isinstance(error, ReturnedStateError):
        return Failed(name=error.state_name, data=error, message=error.reason)
    state: State[Any] = Failed(data=error, message=f"Task run encountered an exception {describe(error)}")
    state.state_details.retriable = False  # as in Prefect; we decide which states are tried again
    return state


def find_delay(delays: Any, jitter_factor: float | None, retries: int) -> float:  # noqa: ANN401  as Prefect's tasks
    """Return the seconds before the next attempt, after this number of retries.

    Args:
        delays: in seconds: a number, or one for each retry, the last of which repeats.
        jitter_factor: spreads a delay at random, by up to this factor.
        retries: how many there were.
    """
    each = delays if isinstance(delays, list) else [delays] if delays else []
    delay = float(each[min(retries, len(each) - 1)]) if each else 0.0
    if jitter_factor and delay > 0:
        return clamped_poisson_interval(delay, clamping_factor=jitter_factor)
    return delay
