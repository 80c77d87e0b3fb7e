"""What users say of their workflow's flow, beside its handlers: its options and its hooks."""

import os
from collections.abc import Iterator
from string import Formatter
from typing import Any

from prefect import Flow, get_run_logger
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectHTTPStatusError

from pgflow_prefect.execution.redaction import describe_error

AnyFlow = Flow[..., Any]

_HOOKS = ("on_running_hooks", "on_completion_hooks", "on_failure_hooks", "on_cancellation_hooks", "on_crashed_hooks")
_OPTIONS = (
    *("version", "description", "flow_run_name", "task_runner", "log_prints", "timeout_seconds"),
    *("retries", "retry_delay_seconds"),
    *("persist_result", "result_storage", "result_serializer", "cache_result_in_memory"),
)
_PARAMETERS = {"run_id"}  # of the flow runs of `run`, `worker` and the bridge: the payload stays in PostgreSQL

_RUNNER_OWNS = ("PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS", "false")


def take_options(flow: AnyFlow, given: AnyFlow) -> None:
    """Have a flow behave as the one that the user has made: its options, and the hooks that are added later, too."""
    for name in (*_OPTIONS, *_HOOKS):
        setattr(flow, name, getattr(given, name))


def find_option_problems(given: AnyFlow, name: str) -> Iterator[str]:
    """Tell what a user's flow says that can't be done, a sentence each.

    Args:
        given: the flow.
        name: by which the workflow's flow is known to Prefect.
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


async def run_cancellation_hooks(state: State[Any]) -> None:
    """Run the hooks for a run that was cancelled, in the process that has executed it and is to write this state.

    Prefect's engine runs them for a flow run that is cancelled in Prefect, and not for a run that ends in PostgreSQL.
    """
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow is not None
    assert context.flow_run is not None
    hooks = context.flow.on_cancellation_hooks
    if not hooks or await _is_for_runner(context):
        return
    logger = get_run_logger()
    for hook in hooks:
        name = getattr(hook, "__name__", repr(hook))
        logger.info("Running hook %r in response to entering state %r", name, state.name)
        try:
            result: Any = hook(context.flow, context.flow_run, state)
            if hasattr(result, "__await__"):
                await result
        except Exception:
            logger.exception("An error was encountered while running hook %r", name)


async def _is_for_runner(context: FlowRunContext) -> bool:
    """Tell whether Prefect's runner, whose child this process is, runs the hooks: for what is cancelled in Prefect."""
    name, value = _RUNNER_OWNS
    if os.environ.get(name, "").lower() != value:
        return False
    assert context.flow_run is not None
    assert isinstance(context.client, PrefectClient)
    try:
        flow_run: FlowRun = await context.client.read_flow_run(context.flow_run.id)
    except PrefectHTTPStatusError as error:
        get_run_logger().warning("hooks for the cancellation are left to Prefect: %s", describe_error(error))
        return True
    return flow_run.state_type in (StateType.CANCELLING, StateType.CANCELLED)
