"""`list`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pgflow_prefect.cli.console import out, print_json, print_table
from pgflow_prefect.cli.doers import load_doers, print_stubs
from pgflow_prefect.cli.options import AsJson, Dsn, Handlers, make_settings
from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from pgflow_prefect.definitions.model import WorkflowDefinition
    from pgflow_prefect.models import StepBinding, WorkflowSummary
    from pgflow_prefect.settings import Settings


def list_(workflow: str | None = None, /, *, handlers: Handlers = None, json: AsJson = False, dsn: Dsn = None) -> None:
    """List the workflows that the database defines, or the steps of one workflow and who does each.

    The list shows each workflow's steps, deps and runs, whether it is enabled, and how many steps are bound by rows.
    The other steps are done by the file of handlers. A step without a handler there, or with a stub, is external. With
    a workflow, each step is shown with its function and file.

    Example: `pgflow-prefect list email_campaign`

    Parameters
    ----------
    workflow
        The workflow's slug.
    """
    import anyio

    if workflow is not None:
        _list_steps(*anyio.run(_load_steps, make_settings(dsn), workflow), handlers, json)
        return
    if handlers is not None:
        raise UsageError("--handlers goes with a WORKFLOW")
    workflows, how_to_define = anyio.run(_list_workflows, make_settings(dsn))
    if json:
        print_json(workflows)
    elif workflows:
        columns = ("workflow", "steps", "deps", "pending", "completed", "failed", "enabled", "bound")
        print_table(columns, [_describe(each) for each in workflows])
    else:
        out.print(f"the database defines no workflow: {how_to_define}")


def _describe(workflow: WorkflowSummary) -> tuple[str, ...]:
    enabled = {True: "yes", False: "no", None: "-"}[workflow.enabled]
    counts = workflow.model_dump(exclude={"slug", "enabled", "bound"}).values()
    bound = ", ".join(f"{count} {kind}" for kind, count in sorted((workflow.bound or {}).items()))
    return workflow.slug, *map(str, counts), enabled, bound or "-"


def _list_steps(
    definition: WorkflowDefinition, rows: Mapping[str, StepBinding], handlers: str | None, json: bool
) -> None:
    from pgflow_prefect.definitions.graph import build_graph

    graph = build_graph(definition)
    doers = load_doers(definition, rows, handlers)
    steps = [(slug, sorted(graph.predecessors(slug)), rows.get(slug), each) for slug, each in doers.items()]
    if json:
        keys = ("step", "waits_for", "binding")
        print_json([dict(zip(keys, each[:3], strict=True)) | each[3].to_json() for each in steps])
        return
    print_table(
        ("step", "waits for", "done by", "options"),
        [(slug, ", ".join(upstream) or "-", each.text, each.options) for slug, upstream, _, each in steps],
    )
    print_stubs(doers)


async def _load_steps(settings: Settings, workflow: str) -> tuple[WorkflowDefinition, dict[str, StepBinding]]:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1, only_reads=True) as store:
        return await store.load_definition(workflow), await store.list_bindings(workflow)


async def _list_workflows(settings: Settings) -> tuple[list[WorkflowSummary], str]:
    """Return the workflows, and a sentence that says how to define one."""
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1, only_reads=True) as store:
        return await store.list_workflows(), store.implementation.how_to_define
