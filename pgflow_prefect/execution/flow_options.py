"""The options and hooks that users give their workflow's flow."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from string import Formatter
from typing import Any

from prefect import Flow, get_run_logger
from prefect.context import FlowRunContext
from prefect.task_runners import ThreadPoolTaskRunner

from pgflow_prefect.execution.flow_hooks import HOOKS
from pgflow_prefect.prefect_api.internals import get_call_parameters

AnyFlow = Flow[..., Any]

_OPTIONS = (
    *("version", "description", "flow_run_name", "task_runner", "log_prints", "timeout_seconds"),
    *("retries", "retry_delay_seconds"),
    *("persist_result", "result_storage", "result_serializer", "cache_result_in_memory"),
)
_PARAMETERS = {"run_id"}  # of the flow runs of `run`, `worker` and the bridge: the payload stays in PostgreSQL


class EventLoopTaskRunner(ThreadPoolTaskRunner[Any]):
    """Executes steps in the flow run's own event loop, the cheapest way: it submits no task."""


def take_options(flow: AnyFlow, given: AnyFlow) -> None:
    """Give a flow the options of the user's flow, and its hooks, also those that are added later."""
    for name in (*_OPTIONS, *HOOKS):
        setattr(flow, name, getattr(given, name))
    if given.flow_run_name is not None:
        flow.flow_run_name = partial(_name_current_flow_run, given.flow_run_name)


def _name_current_flow_run(given: str | Callable[[], str]) -> str:
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    assert context.flow is not None
    parameters = get_call_parameters(context.flow.fn, (), context.parameters or {})
    return make_flow_run_name(given, parameters, context.flow_run.name)


def make_flow_run_name(given: str | Callable[[], str] | None, parameters: Mapping[str, Any], otherwise: str) -> str:
    """Return the name that a user's flow gives to the flow run in the context.

    A name that can't be made keeps no run from being executed: the flow run's log tells why it has another one.

    Args:
        given: a template, or a function.
        parameters: of the flow run.
        otherwise: the name if there is no other one.
    """
    try:
        name = given() if callable(given) else str(given).format(**parameters)
        if not isinstance(name, str):
            raise TypeError(f"it returned {type(name).__name__}, not a text")  # noqa: TRY301
    except (Exception, SystemExit) as error:  # noqa: BLE001  of the user's function
        get_run_logger().error(
            "The flow run is called %r, for its `flow_run_name` failed: %s: %s", otherwise, type(error).__name__, error
        )
        return otherwise
    return name


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


def find_unshown_problems(given: AnyFlow) -> Iterator[str]:
    """Return what a user's flow has that needs a flow run from the beginning, a sentence each."""
    needs = {
        "a task runner": not isinstance(given.task_runner, EventLoopTaskRunner),
        "retries of its own": bool(given.retries),
        "a `flow_run_name`": given.flow_run_name is not None,
        "persisted results": bool(given.persist_result),
        **{name.removesuffix("_hooks"): bool(getattr(given, name)) for name in HOOKS},
    }
    if found := [what for what, is_there in needs.items() if is_there]:
        yield (
            f"its runs are recorded later, and its flow has {', '.join(found)}: these need a flow run of Prefect from "
            "the beginning. Leave them out, or leave out the recording"
        )


def _find_fields(template: str) -> set[str]:
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError:
        return {repr(template)}
    return {name.partition(".")[0].partition("[")[0] or "an unnamed field" for name in names}
