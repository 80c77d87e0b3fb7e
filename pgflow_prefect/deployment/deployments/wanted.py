"""Describes the deployment that a workflow should have, from the workflow and the user's options."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from pgflow_prefect.database.schedules import ScheduledPayload
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.deployment.deployments.entrypoint import make_entrypoint
from pgflow_prefect.deployment.deployments.location import Location, Steps, make_default_steps
from pgflow_prefect.deployment.deployments.payloads import make_parameter_schema
from pgflow_prefect.deployment.deployments.schedule_plan import ScheduleRows
from pgflow_prefect.deployment.deployments.schedules import ScheduleWish
from pgflow_prefect.deployment.handler_files import BY_ROWS
from pgflow_prefect.errors import UsageError
from pgflow_prefect.prefect_api.ownership import make_ownership_tag
from pgflow_prefect.workflow import Workflow, to_flow_name

DEPLOYMENT = "pgflow"
"""The name of the one deployment of each workflow, and also a tag of it."""

NO_LIMIT = 0
"""Means no concurrency limit."""

NO_BLOCK = ""
"""Means no automation that tells of failures."""

NO_POOL = ""
"""Means no work pool: `pgflow-prefect worker` and `serve` execute the flow runs."""


@dataclass(frozen=True)
class Options:
    """The options of the user who deploys. Prefect keeps the former value of each option that is not given.

    Attributes:
        work_pool: its workers execute the flow runs; `NO_POOL` takes the pool away.
        tags: further tags of the deployments.
        schedule: the change of one of our schedules.
        concurrency_limit: the most flow runs of a deployment at the same time; `NO_LIMIT` for any number.
        image: the image in which the workers start flow runs.
        block: the Prefect block that has the database's address for flow runs.
        location: the place of the code for a worker on another machine.
        here: the directory on this machine that corresponds to it; by default, the current one.
        take_over: take over deployments of another installation.
        on_failure: the notification block of the automation that tells of failures, as `TYPE/NAME`; `NO_BLOCK` deletes
            the automation.
        prune: delete our schedules whose payload is gone, and payloads whose schedule is gone.
    """

    work_pool: str | None = None
    tags: tuple[str, ...] = ()
    schedule: ScheduleWish | None = None
    concurrency_limit: int | None = None
    image: str | None = None
    block: str | None = None
    location: Location | None = None
    here: Path = field(default_factory=Path.cwd)
    take_over: bool = False
    prune: bool = False
    on_failure: str | None = None

    @property
    def job_variables(self) -> dict[str, Any]:
        """The job variables of these options."""
        variables: dict[str, Any] = {}
        if self.image is not None:
            variables["image"] = self.image
        if self.block is not None:
            variables["env"] = {"PGFLOW_BLOCK": self.block}
        return variables

    def name_for_pools(self) -> list[str]:
        """Return the given options that only the workers of a work pool use."""
        return [f"--{name}" for name in ("image", "block") if getattr(self, name) is not None]


@dataclass(frozen=True)
class Wanted:
    """The deployment that a workflow should have.

    Attributes:
        workflow_slug: its workflow.
        flow_name: that one's name in Prefect.
        version: the hash of the definition.
        entrypoint: what workers load the flow by.
        pull_steps: how they get the code.
        schema: of its parameters.
        description: the workflow's; None: it has none, and what people wrote stays.
        first_description: what a new deployment gets in its place.
        tags: those that it has to have; others stay.
        options: what the deploying user says.
        installation: the id of the database that it is made for, if it is to be known.
        schedule_rows: the rows with the payloads of its schedules.
    """

    workflow_slug: str
    flow_name: str
    version: str
    entrypoint: str
    pull_steps: Steps
    schema: Mapping[str, Any]
    description: str | None
    first_description: str | None
    tags: tuple[str, ...]
    options: Options
    installation: UUID | None = None
    schedule_rows: ScheduleRows = field(default_factory=ScheduleRows)


def describe_wanted(
    workflow: Workflow,
    definition: WorkflowDefinition,
    source: str,
    options: Options,
    installation: UUID | None = None,
    *,
    payloads: Iterable[ScheduledPayload] | None = None,
) -> Wanted:
    """Return what the deployment of a workflow should be.

    Args:
        workflow: the handlers.
        definition: whose hash becomes the deployment's version.
        source: the file or module that the handlers were loaded from, or `BY_ROWS`.
        options: what the deploying user says.
        installation: the id of the database, if the deployment is to be known as made for it.
        payloads: of schedules, of this workflow and others; None if they are not known.

    Raises:
        UsageError: Prefect can't load a flow from such a source, or an annotation can't be used.
    """
    here = options.here.resolve()
    entrypoint = make_entrypoint(workflow.slug, source, here)
    if options.location is not None and Path(entrypoint).is_absolute():
        raise UsageError(
            f"{source} is not beneath {here}, so its path under --source or --directory is unknown: run this command "
            "in the directory that they stand for"
        )
    owned = (make_ownership_tag(installation),) if installation is not None else ()
    return Wanted(
        workflow_slug=workflow.slug,
        flow_name=to_flow_name(workflow.slug),
        version=definition.definition_hash,
        entrypoint=entrypoint,
        pull_steps=_find_steps(source, options, here),
        schema=make_parameter_schema(workflow, definition),
        description=workflow.description or None,
        first_description=workflow.description or workflow.flow.description,
        tags=tuple(dict.fromkeys([DEPLOYMENT, *workflow.tags, *options.tags, *owned])),
        options=options,
        installation=installation,
        schedule_rows=ScheduleRows(workflow.slug, installation, _choose_rows(workflow.slug, payloads)),
    )


def _choose_rows(
    workflow_slug: str, payloads: Iterable[ScheduledPayload] | None
) -> Mapping[str, ScheduledPayload] | None:
    if payloads is None:
        return None
    return {each.name: each for each in payloads if each.workflow_slug == workflow_slug}


def _find_steps(source: str, options: Options, here: Path) -> Steps:
    if options.location is not None:
        return options.location.make_steps(here)
    return [] if source == BY_ROWS else make_default_steps(here)
