"""Making plans with Prefect's API, and carrying them out."""

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from uuid import UUID

import anyio
from anyio import CapacityLimiter
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.utilities.urls import url_for

from pgflow_prefect.deployment.deployments.find import (
    FoundFlows,
    ask_prefect,
    check_block,
    check_that_prefect_answers,
    check_work_pool,
    find_flows,
    find_owned,
)
from pgflow_prefect.deployment.deployments.plan import Outcome, Plan, plan_deletion, plan_deployment
from pgflow_prefect.deployment.deployments.schedules import SLUG
from pgflow_prefect.deployment.deployments.wanted import (
    DEPLOYMENT,
    Options,
    Wanted,
    describe_wanted,
    make_ownership_tag,
)
from pgflow_prefect.errors import PgflowPrefectError, PrefectUnavailableError
from pgflow_prefect.execution.in_process import connect_to_prefect
from pgflow_prefect.models import WorkflowDefinition
from pgflow_prefect.workflow import Workflow, to_flow_name

_AT_A_TIME = 4  # measured: more are not created faster, and keep the server from its other work


@dataclass(frozen=True)
class Deployed:
    """A deployment of ours, as it is after `deploy`.

    Attributes:
        workflow_slug: its workflow.
        id: Prefect's id of it.
        name: as Prefect's commands take it, `flow/deployment`.
        outcome: what became of it.
        work_pool: whose workers execute its flow runs; without one, only `pgflow-prefect worker` does.
        url: its page in Prefect's UI, if there is one that outlives this process.
    """

    workflow_slug: str
    id: UUID
    name: str
    outcome: Outcome
    work_pool: str | None
    url: str | None


@dataclass(frozen=True)
class Carried:
    """What came of several plans.

    Attributes:
        deployed: what was done, in the order of the plans.
        failures: why others were not.
    """

    deployed: Sequence[Deployed]
    failures: Sequence[PgflowPrefectError]


@dataclass(frozen=True)
class Plans:
    """Plans, and what Prefect has, as it was when they were made."""

    client: PrefectClient
    plans: Sequence[Plan]
    flows: FoundFlows

    async def carry_out(self, notice: Callable[[Deployed], None] = lambda deployed: None) -> Carried:
        """Do what they say, several at a time; where Prefect refuses one, the others are done all the same.

        Args:
            notice: is told of each that is done.
        """
        limiter = CapacityLimiter(_AT_A_TIME)
        deployed: dict[int, Deployed] = {}
        failures: dict[int, PgflowPrefectError] = {}

        async def carry_out_one(place: int, plan: Plan) -> None:
            async with limiter:
                if any(isinstance(error, PrefectUnavailableError) for error in failures.values()):
                    return  # it would only be waited for once more
                try:
                    deployed[place] = await _carry_out(self.client, plan, self.flows)
                    notice(deployed[place])
                except PgflowPrefectError as error:
                    failures[place] = error

        async with anyio.create_task_group() as group:
            for place, plan in enumerate(self.plans):
                group.start_soon(carry_out_one, place, plan)
        return Carried([each for _, each in sorted(deployed.items())], [failures[place] for place in sorted(failures)])


@asynccontextmanager
async def open_plans(
    wanted: Sequence[Wanted], installation: UUID, kept: Iterable[str] | None = None
) -> AsyncIterator[Plans]:
    """Connect to Prefect, and compare deployments with what they should be; nothing is written yet.

    Args:
        wanted: what they should be.
        installation: the id of the database.
        kept: all workflows that it defines, if the deployments of others are to go.

    Raises:
        UsageError: there is no such work pool or block.
        PrefectUnavailableError: the API does not answer.
    """
    await check_that_prefect_answers()
    async with connect_to_prefect() as client:
        plans = await make_plans(client, wanted)
        if kept is not None:
            deletions = await _plan_deletions(client, installation, kept)
            plans = replace(plans, plans=[*plans.plans, *deletions])
        yield plans


async def make_plans(client: PrefectClient, wanted: Sequence[Wanted]) -> Plans:
    """Compare deployments with what they should be; arguments and errors as of `open_plans`."""
    await _check_options(client, wanted)
    flows = await find_flows(client, [each.flow_name for each in wanted])
    return Plans(client, [plan_deployment(each, flows.own.get(each.flow_name)) for each in wanted], flows)


async def _plan_deletions(client: PrefectClient, installation: UUID, kept: Iterable[str]) -> list[Plan]:
    known = {to_flow_name(slug) for slug in kept}
    owned = await find_owned(client, make_ownership_tag(installation))
    return [plan_deletion(name, each) for name, each in sorted(owned.items()) if name not in known]


async def deploy(
    client: PrefectClient,
    workflow: Workflow,
    definition: WorkflowDefinition,
    source: str,
    *,
    options: Options | None = None,
    installation: UUID | None = None,
) -> Deployed:
    """Create a workflow's deployment, or update it where it differs.

    Only what follows from the workflow and the options is written. What people set in Prefect stays: their schedules,
    the paused flag, parameters, further job variables and tags.

    Args:
        client: of Prefect's API.
        workflow: the handlers.
        definition: whose hash becomes the deployment's version.
        source: the file or module that the handlers were loaded from.
        options: what is said beyond that.
        installation: the id of the database that it is made for.

    Raises:
        UsageError: there is no such work pool, or Prefect can't load a flow from such a source.
        PrefectUnavailableError: the API does not answer.
        PrefectRefusedError: Prefect refuses the deployment.
    """
    plans = await make_plans(
        client, [describe_wanted(workflow, definition, source, options or Options(), installation)]
    )
    return await _carry_out(client, plans.plans[0], plans.flows)


async def register(
    client: PrefectClient,
    workflow: Workflow,
    definition: WorkflowDefinition,
    source: str,
    *,
    installation: UUID | None = None,
) -> Deployed:
    """Deploy a workflow for a process that executes it itself, unless a work pool has it.

    Of that deployment, the pool's workers load the code from where it says: not from where this process was started.
    Arguments and errors as of `deploy`.
    """
    name = to_flow_name(workflow.slug)
    flows = await find_flows(client, [name])
    existing = flows.own.get(name)
    if existing is not None and existing.work_pool_name is not None:
        unchanged = Plan(workflow.slug, name, existing.id, Outcome.UNCHANGED, work_pool=existing.work_pool_name)
        return _describe(unchanged, existing.id)
    wanted = describe_wanted(workflow, definition, source, Options(), installation)
    return await _carry_out(client, plan_deployment(wanted, existing), flows)


async def _check_options(client: PrefectClient, wanted: Sequence[Wanted]) -> None:
    options = [each.options for each in wanted]
    for work_pool in {each.work_pool for each in options} - {None}:
        await check_work_pool(client, str(work_pool))
    sources = [each.location.source for each in options if each.location is not None]
    for kind, name in {each.credentials for each in sources if each is not None and each.credentials is not None}:
        await check_block(client, kind, name)


async def _carry_out(client: PrefectClient, plan: Plan, flows: FoundFlows) -> Deployed:
    what = f"the deployment of workflow {plan.workflow_slug!r}"
    if plan.outcome is Outcome.CREATED:
        with ask_prefect(what):
            flow_id = flows.ids.get(plan.flow_name) or await client.create_flow_from_name(plan.flow_name)
            schedules = _make_schedules(plan)
            deployment_id = await client.create_deployment(flow_id, DEPLOYMENT, schedules=schedules, **plan.fields)
        return _describe(plan, deployment_id)
    assert plan.id is not None
    with ask_prefect(what):
        if plan.outcome is Outcome.DELETED:
            await _delete(client, plan.id)
        elif plan.fields:
            # By PATCH: creating it again would delete its schedules and settings.
            await client.update_deployment(plan.id, DeploymentUpdate(**plan.fields))
        if plan.changes_schedule:
            await _change_schedule(client, plan, plan.id)
    return _describe(plan, plan.id)


async def _delete(client: PrefectClient, deployment_id: UUID) -> None:
    try:
        await client.delete_deployment(deployment_id)
    except ObjectNotFound:
        return  # somebody else was faster


def _make_schedules(plan: Plan) -> list[DeploymentScheduleCreate]:
    wish = plan.wanted.options.schedule if plan.wanted else None
    if wish is None or wish.schedule is None:
        return []
    return [DeploymentScheduleCreate(schedule=wish.schedule, active=True, slug=SLUG)]


async def _change_schedule(client: PrefectClient, plan: Plan, deployment_id: UUID) -> None:
    """Change our schedule alone. Whether it is active is left as it is: somebody may have paused it in the UI."""
    schedules = _make_schedules(plan)
    if plan.schedule_id is None:
        await client.create_deployment_schedules(deployment_id, schedules)
    elif schedules:
        await client.update_deployment_schedule(deployment_id, plan.schedule_id, schedule=schedules[0].schedule)
    else:
        await client.delete_deployment_schedule(deployment_id, plan.schedule_id)


def _describe(plan: Plan, deployment_id: UUID) -> Deployed:
    url = url_for("deployment", obj_id=deployment_id) if get_current_settings().api.url else None
    return Deployed(plan.workflow_slug, deployment_id, plan.name, plan.outcome, plan.work_pool, url)
