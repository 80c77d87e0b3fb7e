"""Makes plans with Prefect's API, and executes them."""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from uuid import UUID

import anyio
from anyio import CapacityLimiter
from prefect.client.orchestration import PrefectClient

from pgflow_prefect.blocks import PgflowDatabase
from pgflow_prefect.database.schedules import ScheduledPayload
from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.deployment.deployments.automations import AutomationPlan, plan_automations, write_automation
from pgflow_prefect.deployment.deployments.find import FoundFlows, check_block, check_work_pool, find_flows, find_owned
from pgflow_prefect.deployment.deployments.plan import (
    Outcome,
    Plan,
    list_other_owners,
    plan_deletion,
    plan_deployment,
)
from pgflow_prefect.deployment.deployments.wanted import NO_POOL, Options, Wanted, describe_wanted
from pgflow_prefect.deployment.deployments.write import Deployed, describe, write
from pgflow_prefect.errors import (
    ForeignDeploymentError,
    PgflowPrefectError,
    PrefectUnavailableError,
    UsageError,
)
from pgflow_prefect.prefect_api.client import check_that_prefect_answers, connect_to_prefect
from pgflow_prefect.prefect_api.ownership import make_ownership_tag
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.workflow import Workflow, to_flow_name

Kept = Callable[[], Awaitable[Collection[str]]]
"""Returns the current slugs of the workflows whose deployments stay."""

_AT_A_TIME = 4  # measured: more at a time are not faster, and keep the server from its other work


@dataclass(frozen=True)
class Carried:
    """The results of several plans.

    Attributes:
        plans: as executed: a deployment that another process made meanwhile is updated, and not created.
        deployed: the results, in the order of the plans.
        failures: the errors of the other plans.
        automations: the changes of automations that were made.
    """

    plans: Sequence[Plan]
    deployed: Sequence[Deployed]
    failures: Sequence[PgflowPrefectError]
    automations: Sequence[AutomationPlan] = ()


@dataclass(frozen=True)
class Plans:
    """Plans, and Prefect's objects at the time of the plans."""

    client: PrefectClient
    plans: Sequence[Plan]
    flows: FoundFlows
    kept: Kept | None = field(default=None, repr=False)
    automations: Sequence[AutomationPlan] = ()

    async def carry_out(self, notice: Callable[[Deployed], None] = lambda deployed: None) -> Carried:
        """Execute the plans, several at a time; if one fails, execute the others all the same.

        Args:
            notice: called with each finished plan.

        Raises:
            UsageError: a deployment was made meanwhile and can't be changed as wanted; nothing is written then.
            PrefectUnavailableError: the API does not answer; nothing is written then.
        """
        fresh = await self._look_again()
        limiter = CapacityLimiter(_AT_A_TIME)
        deployed: dict[int, Deployed] = {}
        failures: dict[int, PgflowPrefectError] = {}

        async def carry_out_one(place: int, plan: Plan) -> None:
            async with limiter:
                if any(isinstance(error, PrefectUnavailableError) for error in failures.values()):
                    return  # it would only be waited for once more
                try:
                    if await fresh._is_wanted_again(plan):
                        return
                    deployed[place] = await write(fresh.client, plan, fresh.flows.ids)
                except Exception as error:  # noqa: BLE001  whatever it is, the others go on
                    failures[place] = _to_failure(plan, error)
                else:
                    notice(deployed[place])

        async with anyio.create_task_group() as group:
            for place, plan in enumerate(fresh.plans):
                group.start_soon(carry_out_one, place, plan)
        done = [each for _, each in sorted(deployed.items())]
        told, untold = await fresh._carry_out_automations()
        return Carried(fresh.plans, done, [*(failures[place] for place in sorted(failures)), *untold], told)

    async def _carry_out_automations(self) -> tuple[list[AutomationPlan], list[PgflowPrefectError]]:
        """Change the automations, and return the plans that were executed, and the errors of the others."""
        told: list[AutomationPlan] = []
        failures: list[PgflowPrefectError] = []
        kept = await self.kept() if self.kept is not None else ()  # of a workflow that has come back, it stays
        for plan in self.automations:
            if plan.outcome is Outcome.UNCHANGED or (plan.is_of_none and plan.workflow_slug in kept):
                continue
            try:
                await write_automation(self.client, plan)
            except PgflowPrefectError as error:
                failures.append(error)
            else:
                told.append(plan)
        return told, failures

    async def _look_again(self) -> "Plans":
        """Return the plans again, as of now: a create request to Prefect's API replaces an existing deployment."""
        new = [plan.flow_name for plan in self.plans if plan.outcome is Outcome.CREATED]
        if not new:
            return self
        flows = await find_flows(self.client, new)
        plans = [
            plan_deployment(plan.wanted, flows.own[plan.flow_name])
            if plan.outcome is Outcome.CREATED and plan.wanted and plan.flow_name in flows.own
            else plan
            for plan in self.plans
        ]
        _check_owners([plan.wanted for plan in plans if plan.wanted], flows)
        _check_pools(plans)
        return replace(self, plans=plans, flows=flows)

    async def _is_wanted_again(self, plan: Plan) -> bool:
        """Tell whether the workflow of a deployment to be deleted has come back meanwhile."""
        if plan.outcome is not Outcome.DELETED or self.kept is None:
            return False
        return plan.flow_name in map(to_flow_name, await self.kept())


async def write_schedules(store: Store, plans: Iterable[Plan]) -> None:
    """Write the payloads of schedules, before Prefect gets the ids of their rows.

    Raises:
        PgflowPrefectError: a payload is beyond the limits, or the role of this process may not write it.
    """
    for plan in plans:
        for row in plan.schedules.written:
            await store.write_schedule(row)


async def delete_schedules(store: Store, carried: Carried) -> None:
    """Delete the payloads of schedules that Prefect no longer has."""
    done = {each.name for each in carried.deployed}
    if ids := [row for plan in carried.plans if plan.name in done for row in plan.schedules.deleted]:
        await store.delete_schedules(ids)


@asynccontextmanager
async def open_plans(wanted: Sequence[Wanted], installation: UUID, kept: Kept | None = None) -> AsyncIterator[Plans]:
    """Connect to Prefect, and compare existing deployments with the wanted ones; write nothing yet.

    Args:
        wanted: the wanted deployments.
        installation: the id of the database.
        kept: returns all workflows of the database, if deployments of other workflows must go. It is called after the
            deployments are read, and before each deletion, because workflows come and go meanwhile.

    Raises:
        UsageError: there is no such work pool or block, or an option needs a work pool and there is none.
        ForeignDeploymentError: a deployment belongs to another installation, without `take_over`.
        PrefectUnavailableError: the API does not answer.
    """
    await check_that_prefect_answers()
    async with connect_to_prefect() as client:
        plans = await make_plans(client, wanted)
        if kept is not None:
            deletions = await _plan_deletions(client, installation, kept)
            plans = replace(plans, plans=[*plans.plans, *deletions], kept=kept)
        known = await kept() if kept is not None else None
        yield replace(plans, automations=await plan_automations(client, wanted, installation, known))


async def make_plans(client: PrefectClient, wanted: Sequence[Wanted]) -> Plans:
    """Compare existing deployments with the wanted ones; for arguments and errors, see `open_plans`."""
    await _check_options(client, wanted)
    flows = await find_flows(client, [each.flow_name for each in wanted])
    _check_owners(wanted, flows)
    plans = [plan_deployment(each, flows.own.get(each.flow_name)) for each in wanted]
    _check_pools(plans)
    return Plans(client, plans, flows)


async def _plan_deletions(client: PrefectClient, installation: UUID, kept: Kept) -> list[Plan]:
    owned = await find_owned(client, make_ownership_tag(installation))
    # In this order, so that each found deployment belongs to a workflow that existed before.
    known = set(map(to_flow_name, await kept()))
    return [plan_deletion(name, each) for name, each in sorted(owned.items()) if name not in known]


async def deploy(
    client: PrefectClient,
    workflow: Workflow,
    definition: WorkflowDefinition,
    source: str,
    *,
    options: Options | None = None,
    installation: UUID | None = None,
    payloads: Collection[ScheduledPayload] | None = None,
) -> Deployed:
    """Create a workflow's deployment, or update the parts that differ.

    This writes only values that follow from the workflow and the options. Users' settings in Prefect stay: their
    schedules, the paused flag, parameters, further job variables and tags.

    Args:
        client: of Prefect's API.
        workflow: the handlers.
        definition: whose hash becomes the deployment's version.
        source: the file or module that the handlers were loaded from.
        options: of the deploying user.
        installation: the id of the database that it is made for.
        payloads: of the workflow's schedules, if they are known.

    Raises:
        UsageError: there is no such work pool or block, or Prefect can't load a flow from such a source.
        PrefectUnavailableError: the API does not answer.
        PrefectRefusedError: Prefect refuses the deployment.
    """
    plans = await make_plans(
        client, [describe_wanted(workflow, definition, source, options or Options(), installation, payloads=payloads)]
    )
    return await write(client, plans.plans[0], plans.flows.ids)


async def register(
    client: PrefectClient,
    workflow: Workflow,
    definition: WorkflowDefinition,
    source: str,
    *,
    installation: UUID | None = None,
) -> Deployed:
    """Deploy a workflow for a process that executes it itself, unless a work pool has it.

    A pool's workers load the code from the deployment's location, not from this process's directory. For arguments and
    errors, see `deploy`.
    """
    name = to_flow_name(workflow.slug)
    flows = await find_flows(client, [name])
    existing = flows.own.get(name)
    wanted = describe_wanted(workflow, definition, source, Options(), installation)
    _check_owners([wanted], flows)
    if existing is not None and existing.work_pool_name is not None:
        unchanged = Plan(workflow.slug, name, existing.id, Outcome.UNCHANGED, work_pool=existing.work_pool_name)
        return describe(unchanged, existing.id)
    return await write(client, plan_deployment(wanted, existing), flows.ids)


async def _check_options(client: PrefectClient, wanted: Sequence[Wanted]) -> None:
    options = [each.options for each in wanted]
    for work_pool in {each.work_pool for each in options} - {None, NO_POOL}:
        await check_work_pool(client, str(work_pool))
    sources = [each.location.source for each in options if each.location is not None]
    for kind, name in {each.credentials for each in sources if each is not None and each.credentials is not None}:
        await check_block(client, kind, name, "`prefect block ls` shows those that there are, by slug")
    for block in {each.block for each in options} - {None}:
        await check_block(
            client, PgflowDatabase.get_block_type_slug(), str(block), f"make it with `pgflow-prefect block {block}`"
        )


def _check_owners(wanted: Sequence[Wanted], flows: FoundFlows) -> None:
    """Refuse to change the deployments of another installation.

    Raises:
        ForeignDeploymentError: with the workflows, and what to do.
    """
    foreign = {
        each.workflow_slug: owners
        for each in wanted
        if not each.options.take_over
        and (existing := flows.own.get(each.flow_name)) is not None
        and (owners := list_other_owners(each, existing))
    }
    if foreign:
        raise ForeignDeploymentError(foreign)


def _check_pools(plans: Sequence[Plan]) -> None:
    """Refuse options for the workers of a work pool if there is none.

    Raises:
        UsageError: with the workflows whose deployments have none.
    """
    without = [plan for plan in plans if plan.wanted and plan.wanted.options.job_variables and plan.work_pool is None]
    if without and without[0].wanted:
        slugs = ", ".join(repr(plan.workflow_slug) for plan in without)
        raise UsageError(
            f"{' and '.join(without[0].wanted.options.name_for_pools())} would have no effect without a work pool, and "
            f"the deployment of {slugs} has none: name one with --work-pool"
        )


def _to_failure(plan: Plan, error: Exception) -> PgflowPrefectError:
    if isinstance(error, PgflowPrefectError):
        return error
    why = f"{type(error).__name__}: {describe_error(error)}" if str(error) else type(error).__name__
    failure = PgflowPrefectError(f"the deployment of workflow {plan.workflow_slug!r} failed: {why}")
    failure.__cause__ = error
    return failure
