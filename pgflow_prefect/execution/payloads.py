"""Checks a payload against the annotations of the handlers, before a run is created."""

from collections.abc import Mapping

from pgflow_prefect.bindings import Kind
from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.errors import ArgumentInvalidError, PayloadInvalidError
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.models import StepBinding
from pgflow_prefect.raw_json import RawJson


async def check_payload(
    store: Store, workflow_slug: str, handlers: Mapping[str, StepHandlers], payload: RawJson
) -> None:
    """Check that a payload fits the handlers that take it; only a payload that does not fit needs the database.

    Args:
        store: the database.
        workflow_slug: the workflow.
        handlers: the handlers and bindings in Python.
        payload: of the run that will begin.

    Raises:
        PayloadInvalidError: it does not fit a handler that would do a step of the run.
        UsageError: an annotation can't be used.
    """
    if _find_problems(handlers, payload):
        definition = await store.load_definition(workflow_slug)
        check_known_payload(definition, await store.list_bindings(workflow_slug), handlers, payload)


def check_known_payload(
    definition: WorkflowDefinition,
    rows: Mapping[str, StepBinding],
    handlers: Mapping[str, StepHandlers],
    payload: RawJson,
) -> None:
    """Check a payload as `check_payload` does, for a workflow that was read from the database before.

    Args:
        definition: the workflow.
        rows: the bindings by rows.
        handlers: the handlers and bindings in Python.
        payload: of the run that will begin.
    """
    for slug, problem in _find_problems(handlers, payload).items():
        kind = rows[slug].kind if slug in rows else handlers[slug].bound.kind
        if slug in definition.steps and kind == Kind.PYTHON:
            raise PayloadInvalidError(f"workflow {definition.slug!r} can't begin with this payload: {problem}")


def _find_problems(handlers: Mapping[str, StepHandlers], payload: RawJson) -> dict[str, str]:
    problems = {}
    for slug, each in handlers.items():
        try:
            if each.function is not None:
                each.function.check_payload(payload)
        except ArgumentInvalidError as error:
            problems[slug] = str(error)
    return problems
