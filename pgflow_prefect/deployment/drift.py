"""Describes the differences between the definition in PostgreSQL, the handlers in a file and the deployment."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.deployment.deployments.automations import AutomationPlan
from pgflow_prefect.deployment.deployments.plan import Outcome, Plan
from pgflow_prefect.errors import InvalidDefinitionError
from pgflow_prefect.wording import clean
from pgflow_prefect.workflow import Workflow


class Part(StrEnum):
    """The part that differs from the definition in the database."""

    HANDLERS = "handlers"
    DEPLOYMENT = "deployment"
    AUTOMATION = "automation"
    ENABLED = "enabled"


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        workflow_slug: its workflow; for a deployment whose workflow is gone, the name of the flow.
        part: the part that differs.
        message: the difference in words.
        field: of the deployment.
        before: the deployment's value.
        after: the value that it would get.
    """

    workflow_slug: str
    part: Part
    message: str
    field: str | None = None
    before: str | None = None
    after: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """Return the JSON for scripts."""
        return {
            "workflow": self.workflow_slug,
            "part": self.part,
            "message": self.message,
            "field": self.field,
            "from": self.before,
            "to": self.after,
        }


def compare_handlers(
    workflow: Workflow, definition: WorkflowDefinition, problems: Iterable[str]
) -> Iterator[Difference]:
    """Yield the places where a file does not fit the definition in the database.

    Args:
        workflow: the handlers.
        definition: the workflow as the database defines it.
        problems: the reasons that prevent its execution, a sentence each.
    """
    for problem in problems:
        yield Difference(definition.slug, Part.HANDLERS, problem)
    # A missing argument means nothing, but a file with `after` states all its dependencies.
    if not workflow.after:
        return
    try:
        own = workflow.definition
    except InvalidDefinitionError:
        return  # with problems that are named already, or steps that only the database has
    known = set(own.deps)
    for dep in definition.deps:
        if dep not in known and {*dep} <= {*own.steps}:
            message = (
                f"step {dep.downstream!r} waits for {dep.upstream!r} in the database, but not in the file: add it to "
                "`after` there, or remove the dependency with `pgflow-prefect push`"
            )
            yield Difference(definition.slug, Part.HANDLERS, message)


def compare_deployment(plan: Plan, defined: Collection[str]) -> Iterator[Difference]:
    """Yield the differences that a new deploy of the workflow would change.

    Args:
        plan: for deploying it, or for deleting a deployment that has no handlers here.
        defined: the names of the flows of all workflows of the database.
    """
    slug = plan.workflow_slug
    if plan.outcome is Outcome.CREATED:
        yield Difference(slug, Part.DEPLOYMENT, f"it is not deployed: `pgflow-prefect deploy {slug}`")
    elif plan.outcome is Outcome.DELETED and plan.flow_name in defined:
        yield Difference(slug, Part.DEPLOYMENT, "it has a deployment, and no handlers here")
    elif plan.outcome is Outcome.DELETED:
        message = "it has a deployment, and is gone from the database: `pgflow-prefect deploy --all --prune` deletes it"
        yield Difference(slug, Part.DEPLOYMENT, message)
    for trouble in plan.schedules.troubles:
        yield Difference(slug, Part.DEPLOYMENT, trouble)
    for change in plan.changes:
        message = f"its deployment differs, {change}: `pgflow-prefect deploy {slug}`"
        yield Difference(slug, Part.DEPLOYMENT, message, change.field, change.before, change.after)


def compare_automation(plan: AutomationPlan, defined: Collection[str]) -> Iterator[Difference]:
    """Yield a difference if an automation can't tell of failures, or if its workflow is gone.

    Args:
        plan: for deploying its workflow, or for deleting it.
        defined: the slugs of all workflows of the database.
    """
    slug = plan.workflow_slug
    if plan.is_of_none and slug not in {clean(each) for each in defined}:
        message = (
            f"{plan.name} tells of its failures, and it is gone from the database: `pgflow-prefect deploy --all "
            "--prune` deletes it"
        )
        yield Difference(slug, Part.AUTOMATION, message)
    elif plan.trouble is not None:
        message = f"{plan.name} tells of no failure, {plan.trouble}: `pgflow-prefect deploy {slug} --on-failure BLOCK`"
        yield Difference(slug, Part.AUTOMATION, message)


def compare_enabling(workflow_slug: str, enabled: Collection[str]) -> Iterator[Difference]:
    """Yield a difference if no process takes a workflow's runs."""
    if workflow_slug not in enabled:
        message = f"no worker and no bridge takes its runs: `pgflow-prefect enable {workflow_slug}`"
        yield Difference(workflow_slug, Part.ENABLED, message)
