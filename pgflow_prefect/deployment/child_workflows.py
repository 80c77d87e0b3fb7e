"""Loads the handlers of the workflows that a workflow runs as steps, and of those that these run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.deployment.binding_problems import find_all_problems, find_missing_here
from pgflow_prefect.deployment.handler_files import (
    default_path,
    find_handlers,
    list_workflows,
    load_module,
    load_workflow,
)
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.child_edges import KnownWorkflow, find_child_type_problems
from pgflow_prefect.handlers.row_policy import RowPolicy
from pgflow_prefect.settings import Settings
from pgflow_prefect.workflow import Workflow


@dataclass
class ChildWorkflows:
    """The workflows that runs are nested in a run of.

    Attributes:
        found: those whose handlers are here, by slug.
        missing: a sentence for each of the others: workers have to execute its runs.
    """

    found: dict[str, Workflow] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


async def list_child_workflows(store: Store, definitions: Sequence[WorkflowDefinition]) -> list[WorkflowDefinition]:
    """Return the definitions of all workflows that runs of these may begin, at any depth, without these."""
    known = {each.slug: each for each in definitions}
    below = {child.workflow for each in definitions for child in each.children.values()}
    found: list[WorkflowDefinition] = []
    while unknown := below - known.keys():
        for slug in sorted(unknown):
            known[slug] = await store.load_definition(slug)
            found.append(known[slug])
            below |= {child.workflow for child in known[slug].children.values()}
    return found


def refuse_few_places(definitions: Mapping[str, WorkflowDefinition], places: int) -> None:
    """Refuse so few places that a run and those nested in it can't have one each, where a waiting run keeps its own.

    Args:
        definitions: of the workflows that are executed in these places, by slug.
        places: how many runs are executed at the same time.

    Raises:
        UsageError: a run would wait for ever for another one, which waits for its place.
    """
    nested = _find_nested(definitions)
    if len(nested) > places:
        chain = ", which waits for one of ".join(map(repr, nested))
        raise UsageError(
            f"--limit {places} is too small for a run of {chain}, as each keeps its place: --limit {len(nested)} at "
            "least, and more if several such runs can be under way"
        )


def _find_nested(definitions: Mapping[str, WorkflowDefinition]) -> tuple[str, ...]:
    """Return the longest way down through workflows whose steps run others: PostgreSQL allows 20, and no circle."""
    found: dict[str, tuple[str, ...]] = {}

    def descend(slug: str) -> tuple[str, ...]:
        if slug not in found:
            found[slug] = (slug,)
            below = {child.workflow for child in definitions[slug].children.values()} & definitions.keys()
            found[slug] = (slug, *max((descend(each) for each in sorted(below)), key=len, default=()))
        return found[slug]

    return max(map(descend, sorted(definitions)), key=len, default=())


async def find_nested_problems(
    store: Store, workflow: Workflow, definition: WorkflowDefinition, source: str
) -> list[str]:
    """Return a sentence for each annotation that contradicts one of a workflow that a step is a run of.

    Workflows whose handlers are not here are not checked.
    """
    children: dict[str, KnownWorkflow] = {}
    known = set(await store.list_slugs()) if definition.children else set()
    for slug in {child.workflow for child in definition.children.values()} & known:
        try:
            loaded, _ = find_handlers(slug, _find_source(slug, source))
        except UsageError:
            continue  # `validate` of that workflow says it
        if loaded is not None:
            children[slug] = KnownWorkflow(await store.load_definition(slug), loaded.handlers)
    return [*find_child_type_problems(KnownWorkflow(definition, workflow.handlers), children)]


def _find_source(slug: str, parent: str) -> str | None:
    """Return where the handlers of a child are: in the parent's file, or in one beside it; None: where `run` looks.

    Args:
        slug: the child's workflow.
        parent: the file or module of the parent's handlers, or what stands for it where there is none.
    """
    path = Path(parent)
    if not path.is_file():
        return None
    if slug in list_workflows(load_module(parent)):
        return parent
    beside = default_path(slug, path.parent)
    return str(beside) if beside.is_file() else None


async def load_child_workflows(
    store: Store, definition: WorkflowDefinition, source: str, settings: Settings, policy: RowPolicy
) -> ChildWorkflows:
    """Load the handlers of all workflows that a run of this definition may begin, at any depth.

    Args:
        store: the database.
        definition: of the run.
        source: the file or module of its handlers.
        settings: of this process.
        policy: what rows of bindings may name here.
    """
    loaded = ChildWorkflows()
    for child in await list_child_workflows(store, [definition]):
        rows = await store.list_bindings(child.slug)
        try:
            workflow, _ = load_workflow(child.slug, _find_source(child.slug, source), has_rows=bool(rows))
        except UsageError as error:
            loaded.missing.append(str(error))
            continue
        problems = await find_all_problems(store, workflow, child, rows, policy=policy)
        if problems := [*problems, *find_missing_here(workflow, rows, settings)]:
            loaded.missing.append(f"workflow {child.slug!r}: {'; '.join(problems)}")
        else:
            loaded.found[child.slug] = workflow
    return loaded
