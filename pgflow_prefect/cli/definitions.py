"""`list`, `validate`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from pgflow_prefect.cli.console import out, print_json, print_table
from pgflow_prefect.cli.options import AsJson, Dsn, Handlers, make_settings
from pgflow_prefect.errors import InvalidDefinitionError

if TYPE_CHECKING:
    from pgflow_prefect.models import StepBinding, WorkflowDefinition, WorkflowSummary
    from pgflow_prefect.settings import Settings


def list_(workflow: str | None = None, /, *, json: AsJson = False, dsn: Dsn = None) -> None:
    """List the workflows that the database defines, or the steps of one and who does each.

    Of each workflow: its steps, deps and runs, whether workers and bridges take its runs, and how many of its steps
    rows bind to what. The others are done by the file of handlers or, where that has none for them, by somebody else.

    Example: `pgflow-prefect list email_campaign`

    Parameters
    ----------
    workflow
        The workflow's slug.
    """
    import anyio

    if workflow is not None:
        _list_steps(*anyio.run(_load_steps, make_settings(dsn), workflow), json)
        return
    workflows = anyio.run(_list_workflows, make_settings(dsn))
    if json:
        print_json(workflows)
    elif workflows:
        columns = ("workflow", "steps", "deps", "pending", "completed", "failed", "enabled", "bound")
        print_table(columns, [_describe(each) for each in workflows])
    else:
        out.print("the database defines no workflow: insert one into pgflow.workflows, pgflow.steps and pgflow.deps")


def validate(workflow: str, /, *, handlers: Handlers = None, json: AsJson = False, dsn: Dsn = None) -> int:
    """Check a workflow, its handlers and who else does its steps; name every problem; exit code 1 where there is one.

    Example: `pgflow-prefect validate email_campaign`

    Parameters
    ----------
    workflow
        The workflow's slug.
    """
    import anyio

    from pgflow_prefect.bindings import Kind
    from pgflow_prefect.graph import build_graph
    from pgflow_prefect.render.text import describe_graph

    definition, source, doers, problems = anyio.run(_check, make_settings(dsn), workflow, handlers)
    if json:
        print_json(
            {
                "workflow": workflow,
                "handlers": source,
                "steps": doers,
                "definition_hash": definition.definition_hash,
                "problems": problems,
            }
        )
        return 1 if problems else 0  # cyclopts takes True for success
    out.print(f"handlers: {source}", markup=False)
    if problems:
        out.print(str(InvalidDefinitionError(workflow, problems)), markup=False)
        return 1
    out.print(f"workflow {workflow!r} is valid: {describe_graph(build_graph(definition))}", markup=False)
    if external := [slug for slug, doer in doers.items() if doer == Kind.EXTERNAL]:
        out.print(f"done by somebody else, who calls complete_step: {', '.join(sorted(external))}", markup=False)
    return 0


async def load_definitions(settings: Settings, slugs: Collection[str] | None) -> list[WorkflowDefinition]:
    """Return these workflows as they are defined now, each once; all of them where none is named.

    Raises:
        UnknownWorkflowError: the database does not define one of them.
    """
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        wanted = dict.fromkeys(await store.list_slugs() if slugs is None else slugs)
        return [await store.load_definition(slug) for slug in wanted]


def _describe(workflow: WorkflowSummary) -> tuple[str, ...]:
    enabled = {True: "yes", False: "no", None: "-"}[workflow.enabled]
    counts = workflow.model_dump(exclude={"slug", "enabled", "bound"}).values()
    bound = ", ".join(f"{count} {kind}" for kind, count in sorted((workflow.bound or {}).items()))
    return workflow.slug, *map(str, counts), enabled, bound or "-"


def _list_steps(definition: WorkflowDefinition, rows: Mapping[str, StepBinding], json: bool) -> None:
    from pgflow_prefect.graph import build_graph

    graph = build_graph(definition)
    steps = [(slug, sorted(graph.predecessors(slug)), rows.get(slug)) for slug in definition.steps]
    if json:
        print_json([{"step": slug, "waits_for": upstream, "binding": row} for slug, upstream, row in steps])
        return
    print_table(
        ("step", "waits for", "done by", "options"),
        [(slug, ", ".join(upstream) or "-", *describe_binding(row)) for slug, upstream, row in steps],
    )


def describe_binding(row: StepBinding | None) -> tuple[str, str]:
    """Return who does a step by its row, and the options of that."""
    if row is None:
        return "the file of handlers, else somebody else", ""
    doer = " ".join(filter(None, [row.kind, row.target]))
    return doer, ", ".join(f"{name}={value}" for name, value in row.options.items())


async def _load_steps(settings: Settings, workflow: str) -> tuple[WorkflowDefinition, dict[str, StepBinding]]:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        return await store.load_definition(workflow), await store.list_bindings(workflow)


async def _list_workflows(settings: Settings) -> list[WorkflowSummary]:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        return await store.list_workflows()


async def _check(
    settings: Settings, workflow: str, handlers: str | None
) -> tuple[WorkflowDefinition, str, dict[str, str], list[str]]:
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.deployment.binding_problems import find_all_problems, find_doers
    from pgflow_prefect.deployment.handler_files import load_workflow

    async with open_store(settings, size=1) as store:
        definition = await store.load_definition(workflow)
        loaded, source = load_workflow(workflow, handlers, has_rows=bool(await store.list_bindings(workflow)))
        doers = await find_doers(store, loaded, definition)
        return definition, source, doers, await find_all_problems(store, loaded, definition)
