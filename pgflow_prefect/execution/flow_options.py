"""The options and hooks that users give their workflow's flow."""

from collections.abc import Iterator
from string import Formatter
from typing import Any

from prefect import Flow

from pgflow_prefect.execution.flow_hooks import HOOKS

AnyFlow = Flow[..., Any]

_OPTIONS = (
    *("version", "description", "flow_run_name", "task_runner", "log_prints", "timeout_seconds"),
    *("retries", "retry_delay_seconds"),
    *("persist_result", "result_storage", "result_serializer", "cache_result_in_memory"),
)
_PARAMETERS = {"run_id"}  # of the flow runs of `run`, `worker` and the bridge: the payload stays in PostgreSQL


def take_options(flow: AnyFlow, given: AnyFlow) -> None:
    """Give a flow the options of the user's flow, and its hooks, also those that are added later."""
    for name in (*_OPTIONS, *HOOKS):
        setattr(flow, name, getattr(given, name))


def find_option_problems(given: AnyFlow, name: str) -> Iterator[str]:
    """Return the options of a user's flow that are not supported, a sentence each.

    Args:
        given: the flow.
        name: the name of the workflow's flow in Prefect.
    """
    if given.name != name:
        yield f"its flow is called {given.name!r}: leave out `name`, by which Prefect knows the workflow, {name!r}"
    if given.should_validate_parameters:
        yield "its flow has `validate_parameters=True`: leave it out, a payload is checked by the handlers' annotations"
    if isinstance(given.flow_run_name, str) and (unknown := _find_fields(given.flow_run_name) - _PARAMETERS):
        yield (
            f"its flow has a `flow_run_name` with {', '.join(sorted(unknown))}: only run_id is known to Prefect, the "
            "payload stays in PostgreSQL"
        )


def _find_fields(template: str) -> set[str]:
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError:
        return {repr(template)}
    return {name.partition(".")[0].partition("[")[0] or "an unnamed field" for name in names}
