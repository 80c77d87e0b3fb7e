"""Loads the handlers of the workflows that a workflow runs as steps, and of those that these run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.deployment.binding_problems import find_all_problems, find_missing_here
from pgflow_prefect.deployment.handler_files import load_workflow
from pgflow_prefect.errors import UsageError
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


async def load_child_workflows(
    store: Store, definition: WorkflowDefinition, settings: Settings, policy: RowPolicy
) -> ChildWorkflows:
    """Load the handlers of all workflows that a run of this definition may begin, at any depth.

    Args:
        store: the database.
        definition: of the run.
        settings: of this process.
        policy: what rows of bindings may name here.
    """
    loaded = ChildWorkflows()
    for child in await list_child_workflows(store, [definition]):
        rows = await store.list_bindings(child.slug)
        try:
            workflow, _ = load_workflow(child.slug, has_rows=bool(rows))
        except UsageError as error:
            loaded.missing.append(str(error))
            continue
        problems = await find_all_problems(store, workflow, child, rows, policy=policy)
        if problems := [*problems, *find_missing_here(workflow, rows, settings)]:
            loaded.missing.append(f"workflow {child.slug!r}: {'; '.join(problems)}")
        else:
            loaded.found[child.slug] = workflow
    return loaded
