"""Names flow runs as the user's `flow_run_name` says, also after the payload, which only PostgreSQL has."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from prefect import Flow, get_run_logger
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from pydantic import JsonValue

from pgflow_prefect.execution.steps.step_names import call_briefly, describe_failure
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.handlers.redaction import find_secrets
from pgflow_prefect.handlers.run_names import Naming, NamingError, find_fields, make_name
from pgflow_prefect.handlers.task_options import merge
from pgflow_prefect.prefect_api.event_sender import Sender
from pgflow_prefect.raw_json import RawJson

FLOW_RUN_VALUES = ("payload", "run_id")
"""The values that a `flow_run_name` may need."""


def find_naming(flow: Flow[..., Any] | None) -> Naming | None:
    """Return the `flow_run_name` of a flow as the user gave it."""
    naming: Naming | None = getattr(flow, "naming", None) or getattr(flow, "flow_run_name", None)
    return naming


def needs_values(naming: Naming | None) -> bool:
    """Tell whether a name is made of values, so that it is known once the run is taken."""
    if naming is None:
        return False
    try:
        return bool(find_fields(naming))
    except NamingError:  # the log of the flow run tells it then
        return True


def needs_payload(naming: Naming) -> bool:
    """Tell whether a name is made of the run's payload."""
    try:
        return bool(find_fields(naming) & {"payload", "parameters"})
    except NamingError:
        return False


def name_without_values(naming: Naming) -> str:
    """Return the name of the current flow run, from a template or a function that needs no value."""
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    return _try(partial(make_name, naming, {}), context.flow_run.name)


def _try(make: Callable[[], str], otherwise: str) -> str:
    try:
        return make()
    except Exception as error:  # noqa: BLE001  of the user's function
        _tell(otherwise, error)
        return otherwise


def _tell(otherwise: str, error: Exception) -> None:
    get_run_logger().error(
        "The flow run is called %r, for its `flow_run_name` failed: %s", otherwise, describe_failure(error)
    )


async def name_by_values(
    naming: Naming,
    flow_run: FlowRun,
    handlers: Iterable[StepHandlers],
    values: Mapping[str, RawJson],
    sender: Sender,
) -> None:
    """Give a flow run the name that its payload leads to. A name that can't be made keeps no run from being executed.

    Args:
        naming: a template or a function.
        flow_run: the flow run.
        handlers: of the workflow. Their annotations say what is secret, and have defaults.
        values: the payload and the run's id, by name.
        sender: sends the name to Prefect, which the run does not wait for.
    """
    try:
        made = partial(_make, naming, values, [*handlers])
        name = await call_briefly(made, is_code=callable(naming))
    except Exception as error:  # noqa: BLE001  whatever a user's function raises
        _tell(flow_run.name, error)
        return
    if name != flow_run.name:
        flow_run.name = name
        sender.request(
            lambda client: client.update_flow_run(flow_run.id, name=name), f"flow run {flow_run.id}: its name"
        )


def _make(naming: Naming, values: Mapping[str, RawJson], handlers: Iterable[StepHandlers]) -> str:
    read: dict[str, JsonValue] = {name: value.decode() for name, value in values.items()}
    secrets = {*find_secrets(read)}
    for function in [each.function for each in handlers if each.function is not None and "payload" in values]:
        typed = function.read_payload(values["payload"])
        secrets |= {*find_secrets(typed)}
        read["payload"] = merge(read["payload"], typed)
    return make_name(naming, read, secrets)
