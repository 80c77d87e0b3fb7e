"""The part of the store for workflows: their definitions, and whether they are enabled."""

from collections.abc import Collection, Iterable

from pgflow_prefect.database.definition_edit import replace_definition
from pgflow_prefect.database.released_script import TaskOptions
from pgflow_prefect.database.statements import Statements
from pgflow_prefect.database.translation import translate_errors
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.errors import UnknownWorkflowError
from pgflow_prefect.models import Enabled, WorkflowSummary
from pgflow_prefect.wording import suggest


class WorkflowStatements(Statements):
    """Definitions and enabling, of one workflow and of many."""

    async def list_workflows(self) -> list[WorkflowSummary]:
        """Return every workflow with its size and the number of its runs."""
        return [WorkflowSummary.model_validate(row) for row in await self._fetch("list_workflows")]

    async def list_slugs(self) -> list[str]:
        """Return the slugs of all workflows in alphabetical order."""
        return [str(row["slug"]) for row in await self._fetch("list_slugs")]

    async def load_definition(self, workflow_slug: str) -> WorkflowDefinition:
        """Return the current definition of a workflow.

        Raises:
            UnknownWorkflowError: with the nearest slug that exists.
        """
        rows = await self._fetch("load_definition", workflow_slug=workflow_slug)
        if not rows:
            await self._raise_unknown_workflow(workflow_slug)
        return WorkflowDefinition.model_validate(rows[0])

    async def find_definitions(self, workflow_slugs: Collection[str] | None = None) -> dict[str, WorkflowDefinition]:
        """Return the current definitions of these workflows, or of all, by slug; leave out those that don't exist."""
        slugs = None if workflow_slugs is None else list(workflow_slugs)
        rows = await self._fetch("load_definitions", workflow_slugs=slugs)
        found = [WorkflowDefinition.model_validate(row) for row in rows]
        return {each.slug: each for each in found}

    async def list_task_options(self, workflow_slug: str) -> list[TaskOptions]:
        """Return how a flow of the released pgflow tries its tasks: first the flow's own options, then each step's."""
        rows = await self._fetch("list_task_options", workflow_slug=workflow_slug)
        return [TaskOptions.model_validate(row) for row in rows]

    async def replace_definition(self, old: WorkflowDefinition | None, new: WorkflowDefinition) -> None:
        """Replace a workflow's definition: all differences in one transaction, or nothing.

        Args:
            old: from `load_definition`; None for a workflow that the database does not know.
            new: of the same slug; if it equals `old`, nothing is sent.

        Raises:
            DefinitionChangedError: the database no longer has `old`.
            UsageError: the new deps make a cycle.
            PgflowPrefectError: a run needs a removed step, or the workflow stays locked.
        """
        with translate_errors():
            async with self._pool.connection() as connection:
                await replace_definition(connection, old, new)

    async def list_workflows_with_bindings(self) -> set[str]:
        """Return the slugs of the workflows with bindings by rows."""
        return {str(row["workflow_slug"]) for row in await self._fetch("list_workflows_with_bindings")}

    async def enable_workflow(self, workflow_slug: str, *, enabled: bool = True) -> Enabled:
        """Let workers and bridges take a workflow's new runs, or no runs at all; a repeated call changes nothing.

        Raises:
            UnknownWorkflowError: with the nearest slug that exists.
        """
        await self.load_definition(workflow_slug)
        [row] = await self._fetch("enable_workflow", workflow_slug=workflow_slug, enabled=enabled)
        return Enabled.model_validate(row)

    async def list_enabled(self) -> dict[str, Enabled]:
        """Return the workflows that were enabled or disabled, by slug."""
        found = [Enabled.model_validate(row) for row in await self._fetch("list_enabled")]
        return {each.workflow_slug: each for each in found}

    async def enable_workflows(self, workflow_slugs: Iterable[str]) -> dict[str, Enabled]:
        """Let workers and bridges take the new runs of several workflows, and return their states by slug."""
        rows = await self._fetch("enable_workflows", workflow_slugs=list(workflow_slugs))
        found = [Enabled.model_validate(row) for row in rows]
        return {each.workflow_slug: each for each in found}

    async def _raise_unknown_workflow(self, workflow_slug: str) -> None:
        known = await self.list_slugs()
        hint = suggest(workflow_slug, known) or (
            "; `pgflow-prefect list` shows all" if known else "; there is none yet"
        )
        raise UnknownWorkflowError(f"unknown workflow {workflow_slug!r}{hint}")
