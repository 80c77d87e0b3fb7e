"""The part of the store for deploying: a few statements for any number of workflows."""

from collections.abc import Collection, Iterable

from pgflow_prefect.database.installation import InstallationStatements
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.models import Enabled


class DeploymentStatements(InstallationStatements):
    """Definitions, bindings and enabling of many workflows."""

    async def find_definitions(self, workflow_slugs: Collection[str] | None = None) -> dict[str, WorkflowDefinition]:
        """Return the current definitions of these workflows, or of all, by slug; leave out those that don't exist."""
        slugs = None if workflow_slugs is None else list(workflow_slugs)
        rows = await self._fetch("load_definitions", workflow_slugs=slugs)
        found = [WorkflowDefinition.model_validate(row) for row in rows]
        return {each.slug: each for each in found}

    async def list_workflows_with_bindings(self) -> set[str]:
        """Return the slugs of the workflows with bindings by rows."""
        return {str(row["workflow_slug"]) for row in await self._fetch("list_workflows_with_bindings")}

    async def enable_workflows(self, workflow_slugs: Iterable[str]) -> dict[str, Enabled]:
        """Let workers and bridges take the new runs of several workflows, and return their states by slug."""
        rows = await self._fetch("enable_workflows", workflow_slugs=list(workflow_slugs))
        found = [Enabled.model_validate(row) for row in rows]
        return {each.workflow_slug: each for each in found}
