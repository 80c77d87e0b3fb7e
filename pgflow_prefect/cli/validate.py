"""`list`, `validate`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pgflow_prefect.cli.console import err, out, print_json, print_table
from pgflow_prefect.cli.options import AsJson, Dsn, Handlers, make_settings
from pgflow_prefect.errors import InvalidDefinitionError, UsageError

if TYPE_CHECKING:
    from pgflow_prefect.definitions.model import WorkflowDefinition
    from pgflow_prefect.deployment.doers import Doer
    from pgflow_prefect.models import StepBinding, WorkflowSummary
    from pgflow_prefect.settings import Settings


def list_(workflow: str | None = None, /, *, handlers: Handlers = None, json: AsJson = False, dsn: Dsn = None) -> None:
    """List the workflows that the database defines, or the steps of one and who does each.

    Of each workflow: its steps, deps and runs, whether workers and bridges take its runs, and how many of its steps
    rows bind to what. The file of handlers does the others; a step that has no handler there, or only a stub, is
    external. Of one workflow, each step is shown with its function and file.

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


def validate(workflow: str, /, *, handlers: Handlers = None, json: AsJson = False, dsn: Dsn = None) -> int:
    """Check a workflow, its handlers and who else does its steps; name every problem; exit code 1 where there is one.

    Example: `pgflow-prefect validate email_campaign`

    Parameters
    ----------
    workflow
        The workflow's slug.
    """
    import anyio

    from pgflow_prefect.definitions.graph import build_graph
    from pgflow_prefect.render.text import describe_graph
    from pgflow_prefect.workflow import to_flow_name

    checked = anyio.run(_check, make_settings(dsn), workflow, handlers)
    definition, doers, problems = checked.definition, checked.doers, checked.problems
    if json:
        print_json(
            {
                "workflow": workflow,
                "handlers": checked.source,
                "steps": checked.kinds,
                "functions": {slug: each.to_json() for slug, each in doers.items() if each.function is not None},
                "stubs": [slug for slug, each in doers.items() if each.is_stub],
                "definition_hash": definition.definition_hash,
                "problems": problems,
            }
        )
        return 1 if problems else 0  # cyclopts takes True for success
    out.print(f"handlers: {checked.source}", markup=False)
    if problems:
        out.print(str(InvalidDefinitionError(workflow, problems)), markup=False)
    else:
        out.print(f"workflow {workflow!r} is valid: {describe_graph(build_graph(definition))}", markup=False)
    if (name := to_flow_name(workflow)) != workflow:
        out.print(f"its flow in Prefect is called {name!r}: Prefect does not take the slug for a name", markup=False)
    print_table(("step", "done by"), [(slug, each.text) for slug, each in doers.items()])
    print_stubs(doers)
    if external := checked.external:
        out.print(f"done by external workers, which call complete_step: {', '.join(external)}", markup=False)
    return 1 if problems else 0


def print_stubs(doers: Mapping[str, Doer]) -> None:
    """Say which steps have only a stub, and what makes a handler of it."""
    if stubs := [each.place for each in doers.values() if each.is_stub]:
        out.print(
            f"still stubs, and external until `unimplemented=True` is taken out: {', '.join(stubs)}", markup=False
        )


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


def load_doers(
    definition: WorkflowDefinition, rows: Mapping[str, StepBinding], handlers: str | None = None
) -> dict[str, Doer]:
    """Return who does each step, in topological order, as far as rows and the handlers that are here say.

    Handlers that can't be loaded are named on standard error: what rows say is shown all the same.
    """
    from pgflow_prefect.definitions.graph import order_steps
    from pgflow_prefect.deployment.doers import describe_doers
    from pgflow_prefect.deployment.handler_files import find_handlers

    try:
        workflow, source = find_handlers(definition.slug, handlers)
    except UsageError as error:
        if handlers is not None:
            raise
        err.print(f"not shown, who does a step in Python: {error}", markup=False)
        workflow, source = None, ""
    return describe_doers(order_steps(definition), rows, workflow, source)


async def _load_steps(settings: Settings, workflow: str) -> tuple[WorkflowDefinition, dict[str, StepBinding]]:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1, only_reads=True) as store:
        return await store.load_definition(workflow), await store.list_bindings(workflow)


async def _list_workflows(settings: Settings) -> tuple[list[WorkflowSummary], str]:
    """Return the workflows, and how one is defined."""
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1, only_reads=True) as store:
        return await store.list_workflows(), store.implementation.how_to_define


class _Checked(NamedTuple):
    """What `validate` has found."""

    definition: WorkflowDefinition
    source: str
    kinds: dict[str, str]
    doers: dict[str, Doer]
    problems: list[str]

    @property
    def external(self) -> list[str]:
        """The steps that an external worker does."""
        from pgflow_prefect.bindings import Kind

        return [slug for slug, kind in self.kinds.items() if kind == Kind.EXTERNAL]


async def _check(settings: Settings, workflow: str, handlers: str | None) -> _Checked:
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.definitions.graph import order_steps
    from pgflow_prefect.deployment.binding_problems import find_all_problems, find_doers, find_missing_here
    from pgflow_prefect.deployment.doers import describe_doers
    from pgflow_prefect.deployment.handler_files import load_workflow

    async with open_store(settings, size=1) as store:
        definition = await store.load_definition(workflow)
        rows = await store.list_bindings(workflow)
        loaded, source = load_workflow(workflow, handlers, has_rows=bool(rows))
        kinds = await find_doers(store, loaded, definition)
        order = order_steps(definition)
        problems = [*await find_all_problems(store, loaded, definition), *await find_missing_here(store, loaded)]
        problems += _find_twins(workflow, await store.list_slugs())
        doers = describe_doers(order, rows, loaded, source)
        return _Checked(definition, source, {slug: kinds[slug] for slug in order}, doers, problems)


def _find_twins(workflow: str, slugs: Iterable[str]) -> list[str]:
    """Return the workflows that Prefect would take for this one, a sentence each."""
    from pgflow_prefect.workflow import to_flow_name

    name = to_flow_name(workflow)
    twins = [slug for slug in slugs if slug != workflow and to_flow_name(slug) == name]
    return [f"workflow {twin!r} has the same flow in Prefect, {name!r}: rename one of them" for twin in twins]
