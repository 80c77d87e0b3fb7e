"""Checks a payload against the annotations of the handlers, before a run is created."""

from collections.abc import Mapping

from pgflow_prefect.bindings import Kind
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import ArgumentInvalidError, PayloadInvalidError
from pgflow_prefect.handlers.choice import StepHandlers
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
    if not (problems := _find_problems(handlers, payload)):
        return
    steps = set((await store.load_definition(workflow_slug)).steps)
    rows = await store.list_bindings(workflow_slug)
    for slug, problem in problems.items():
        kind = rows[slug].kind if slug in rows else handlers[slug].bound.kind
        if slug in steps and kind == Kind.PYTHON:
            raise PayloadInvalidError(f"workflow {workflow_slug!r} can't begin with this payload: {problem}")


def _find_problems(handlers: Mapping[str, StepHandlers], payload: RawJson) -> dict[str, str]:
    problems = {}
    for slug, each in handlers.items():
        try:
            if each.function is not None:
                each.function.check_payload(payload)
        except ArgumentInvalidError as error:
            problems[slug] = str(error)
    return problems
