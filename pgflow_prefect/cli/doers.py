"""Finds and prints who does each step, for several commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pgflow_prefect.cli.console import err, out
from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from pgflow_prefect.definitions.model import WorkflowDefinition
    from pgflow_prefect.deployment.doers import Doer
    from pgflow_prefect.models import StepBinding


def print_stubs(doers: Mapping[str, Doer]) -> None:
    """Say how many steps have only a stub, below a table that names them, and how to turn a stub into a handler."""
    if count := sum(each.is_stub for each in doers.values()):
        stubs = "1 step is still a stub: it stays" if count == 1 else f"{count} steps are still stubs: they stay"
        out.print(f"{stubs} external until you remove `unimplemented=True`", markup=False)


def load_doers(
    definition: WorkflowDefinition, rows: Mapping[str, StepBinding], handlers: str | None = None
) -> dict[str, Doer]:
    """Return who does each step, in topological order, according to the rows and the handlers in this directory.

    If the handlers can't be loaded, a line on standard error says why. The result then rests on the rows alone.
    """
    from pgflow_prefect.definitions.graph import order_steps
    from pgflow_prefect.deployment.doers import describe_doers
    from pgflow_prefect.deployment.handler_files import find_handlers

    try:
        workflow, source = find_handlers(definition.slug, handlers)
    except UsageError as error:
        if handlers is not None:
            raise
        err.print(f"Python handlers are not shown: {error}", markup=False)
        workflow, source = None, ""
    return describe_doers(order_steps(definition), rows, workflow, source, definition.children)
