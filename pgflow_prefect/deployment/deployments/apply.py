"""Making plans with Prefect's API, and carrying them out."""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from uuid import UUID

import anyio
from anyio import CapacityLimiter
from prefect.client.orchestration import PrefectClient

from pgflow_prefect.blocks import PgflowDatabase
from pgflow_prefect.definitions.model import WorkflowDefinition
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
"""Returns the slugs of the workflows whose deployments stay, as they are when it is called."""

_AT_A_TIME = 4  # measured: more are not created faster, and keep the server from its other work


@dataclass(frozen=True)
class Carried:
    """What came of several plans.

    Attributes:
        plans: as they were carried out: what another process had made meanwhile is updated, and not created.
        deployed: what was done, in the order of the plans.
        failures: why others were not.
    """

    plans: Sequence[Plan]
    deployed: Sequence[Deployed]
    failures: Sequence[PgflowPrefectError]


@dataclass(frozen=True)
class Plans:
    """Plans, and what Prefect has, as it was when they were made."""

    client: PrefectClient
    plans: Sequence[Plan]
    flows: FoundFlows
    kept: Kept | None = field(default=None, repr=False)

    async def carry_out(self, notice: Callable[[Deployed], None] = lambda deployed: None) -> Carried:
        """Do what they say, several at a time; where one of them fails, the others are done all the same.

        Args:
            notice: is told of each that is done.

        Raises:
            UsageError: one of them was made meanwhile, and it can't get what is wanted; nothing is written then.
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
        return Carried(fresh.plans, done, [failures[place] for place in sorted(failures)])

    async def _look_again(self) -> "Plans":
        """Return the plans as of now: Prefect's API replaces what exists with what is created, schedules and all."""
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
        """Tell whether the workflow of a deployment that is to be deleted has come back meanwhile."""
        if plan.outcome is not Outcome.DELETED or self.kept is None:
            return False
        return plan.flow_name in map(to_flow_name, await self.kept())


@asynccontextmanager
async def open_plans(wanted: Sequence[Wanted], installation: UUID, kept: Kept | None = None) -> AsyncIterator[Plans]:
    """Connect to Prefect, and compare deployments with what they should be; nothing is written yet.

    Args:
        wanted: what they should be.
        installation: the id of the database.
        kept: tells all workflows that it defines, if the deployments of others are to go. It is called after these
            are read, and before each is deleted: workflows come and go meanwhile.

    Raises:
        UsageError: there is no such work pool or block, or no work pool for what only its workers use.
        ForeignDeploymentError: a deployment belongs to another installation, and is not to be taken over.
        PrefectUnavailableError: the API does not answer.
    """
    await check_that_prefect_answers()
    async with connect_to_prefect() as client:
        plans = await make_plans(client, wanted)
        if kept is not None:
            deletions = await _plan_deletions(client, installation, kept)
            plans = replace(plans, plans=[*plans.plans, *deletions], kept=kept)
        yield plans


async def make_plans(client: PrefectClient, wanted: Sequence[Wanted]) -> Plans:
    """Compare deployments with what they should be; arguments and errors as of `open_plans`."""
    await _check_options(client, wanted)
    flows = await find_flows(client, [each.flow_name for each in wanted])
    _check_owners(wanted, flows)
    plans = [plan_deployment(each, flows.own.get(each.flow_name)) for each in wanted]
    _check_pools(plans)
    return Plans(client, plans, flows)


async def _plan_deletions(client: PrefectClient, installation: UUID, kept: Kept) -> list[Plan]:
    owned = await find_owned(client, make_ownership_tag(installation))
    # In this order: a deployment that is found was made for a workflow that was there before.
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
        UsageError: there is no such work pool or block, or Prefect can't load a flow from such a source.
        PrefectUnavailableError: the API does not answer.
        PrefectRefusedError: Prefect refuses the deployment.
    """
    plans = await make_plans(
        client, [describe_wanted(workflow, definition, source, options or Options(), installation)]
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

    Of that deployment, the pool's workers load the code from where it says: not from where this process was started.
    Arguments and errors as of `deploy`.
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
    """Refuse what only the workers of a work pool would use, where there is none.

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
