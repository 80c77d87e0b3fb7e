"""The options and hooks that users give their workflow's flow."""

from collections.abc import Iterator
from typing import Any

from prefect import Flow
from prefect.task_runners import ThreadPoolTaskRunner

from pgflow_prefect.execution.flow_hooks import HOOKS
from pgflow_prefect.execution.flow_names import FLOW_RUN_VALUES, find_naming
from pgflow_prefect.execution.workflow_flow import WorkflowFlow
from pgflow_prefect.handlers.run_names import NamingError, check_naming

AnyFlow = Flow[..., Any]

_OPTIONS = (
    *("version", "description", "task_runner", "log_prints", "timeout_seconds"),
    *("retries", "retry_delay_seconds"),
    *("persist_result", "result_storage", "result_serializer", "cache_result_in_memory"),
)


class EventLoopTaskRunner(ThreadPoolTaskRunner[Any]):
    """Executes steps in the flow run's own event loop, the cheapest way: it submits no task."""


def take_options(flow: WorkflowFlow, given: AnyFlow) -> None:
    """Give a flow the options of the user's flow, and its hooks, also those that are added later."""
    for name in (*_OPTIONS, *HOOKS):
        setattr(flow, name, getattr(given, name))
    flow.take_naming(find_naming(given))


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
    if (naming := find_naming(given)) is not None:
        try:
            check_naming(naming, FLOW_RUN_VALUES)
        except NamingError as error:
            yield f"its flow has a `flow_run_name` that {error}"


def find_unshown_problems(given: AnyFlow) -> Iterator[str]:
    """Return what a user's flow has that needs a flow run from the beginning, a sentence each."""
    needs = {
        "a task runner": not isinstance(given.task_runner, EventLoopTaskRunner),
        "retries of its own": bool(given.retries),
        "a `flow_run_name`": find_naming(given) is not None,
        "persisted results": bool(given.persist_result),
        **{name.removesuffix("_hooks"): bool(getattr(given, name)) for name in HOOKS},
    }
    if found := [what for what, is_there in needs.items() if is_there]:
        yield (
            f"its runs are recorded later, and its flow has {', '.join(found)}: these need a flow run of Prefect from "
            "the beginning. Leave them out, or leave out the recording"
        )
