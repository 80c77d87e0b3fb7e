"""Executes the plan of one deployment, even if a user changes it in Prefect's UI meanwhile."""

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings

from pgflow_prefect.deployment.deployments.plan import Outcome, Plan
from pgflow_prefect.deployment.deployments.schedule_plan import SentSchedule
from pgflow_prefect.deployment.deployments.wanted import DEPLOYMENT
from pgflow_prefect.errors import PrefectRefusedError
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.internals import url_for

_NOT_FOUND = 404


@dataclass(frozen=True)
class Deployed:
    """A deployment of ours after `deploy`.

    Attributes:
        workflow_slug: its workflow.
        id: Prefect's id of it.
        name: in Prefect's commands, `flow/deployment`.
        outcome: created, updated and so on.
        work_pool: the pool whose workers execute its flow runs; without one, only `pgflow-prefect worker` does.
        url: its page in Prefect's UI, if there is one that outlives this process.
    """

    workflow_slug: str
    id: UUID
    name: str
    outcome: Outcome
    work_pool: str | None
    url: str | None


async def write(client: PrefectClient, plan: Plan, flow_ids: Mapping[str, UUID]) -> Deployed:
    """Execute a plan.

    Args:
        client: of Prefect's API.
        plan: of one deployment.
        flow_ids: Prefect's ids of the flows that exist, by name.

    Raises:
        PrefectUnavailableError: the API does not answer.
        PrefectRefusedError: Prefect refuses the deployment, or it was deleted meanwhile.
    """
    what = f"the deployment of workflow {plan.workflow_slug!r}"
    if plan.outcome is Outcome.CREATED:
        with ask_prefect(what):
            flow_id = flow_ids.get(plan.flow_name) or await client.create_flow_from_name(plan.flow_name)
            schedules = _make_schedules(plan)
            deployment_id = await client.create_deployment(flow_id, DEPLOYMENT, schedules=schedules, **plan.fields)
        return describe(plan, deployment_id)
    assert plan.id is not None
    with ask_prefect(what):
        if plan.outcome is Outcome.DELETED:
            await _delete(client, plan.id)
        else:
            await _update(client, plan, plan.id)
    return describe(plan, plan.id)


def describe(plan: Plan, deployment_id: UUID) -> Deployed:
    """Return the deployment of a plan."""
    url = url_for("deployment", obj_id=deployment_id) if get_current_settings().api.url else None
    return Deployed(plan.workflow_slug, deployment_id, plan.name, plan.outcome, plan.work_pool, url)


async def _delete(client: PrefectClient, deployment_id: UUID) -> None:
    try:
        await client.delete_deployment(deployment_id)
    except ObjectNotFound:
        return  # another process was faster


async def _update(client: PrefectClient, plan: Plan, deployment_id: UUID) -> None:
    try:
        if plan.fields:
            # By PATCH, because a second creation would delete its schedules and settings.
            await client.update_deployment(deployment_id, DeploymentUpdate(**plan.fields))
            await _check_pool_is_gone(client, plan, deployment_id)
        for each in plan.schedules.sent:
            await _change_schedule(client, each, deployment_id)
    except PrefectHTTPStatusError as error:
        # Prefect says the same of a work pool that is gone.
        if error.response.status_code == _NOT_FOUND and await _is_gone(client, deployment_id):
            raise PrefectRefusedError(
                f"the deployment of workflow {plan.workflow_slug!r} was deleted in Prefect just now: deploy it again"
            ) from error
        raise


async def _check_pool_is_gone(client: PrefectClient, plan: Plan, deployment_id: UUID) -> None:
    """Check that a work pool is gone: older servers of Prefect accept the request, but leave the pool.

    Raises:
        PrefectRefusedError: the deployment still has it.
    """
    if plan.fields.get("work_pool_name", plan) is not None:
        return
    if (pool := (await client.read_deployment(deployment_id)).work_pool_name) is not None:
        raise PrefectRefusedError(
            f"this Prefect server does not take the work pool {pool!r} from deployment {plan.name}: upgrade it, or "
            f"delete the deployment with `prefect deployment delete {plan.name}` and deploy it again"
        )


async def _is_gone(client: PrefectClient, deployment_id: UUID) -> bool:
    try:
        await client.read_deployment(deployment_id)
    except ObjectNotFound:
        return True
    return False


def _make_schedules(plan: Plan) -> list[DeploymentScheduleCreate]:
    return [_make_schedule(each) for each in plan.schedules.sent if each.schedule is not None]


def _make_schedule(sent: SentSchedule) -> DeploymentScheduleCreate:
    assert sent.schedule is not None
    parameters = {**sent.parameters}
    return DeploymentScheduleCreate(schedule=sent.schedule, active=True, slug=sent.slug, parameters=parameters)


async def _change_schedule(client: PrefectClient, sent: SentSchedule, deployment_id: UUID) -> None:
    """Change only this schedule, but not whether it is active, because a user may have paused it in the UI."""
    if sent.id is not None:
        try:
            if sent.schedule is not None:
                await client.update_deployment_schedule(
                    deployment_id, sent.id, schedule=sent.schedule, slug=sent.slug, parameters={**sent.parameters}
                )
            else:
                await client.delete_deployment_schedule(deployment_id, sent.id)
        except ObjectNotFound:
            pass  # a user deleted it meanwhile: make it again, or do nothing
        else:
            return
    if sent.schedule is not None:
        await client.create_deployment_schedules(deployment_id, [_make_schedule(sent)])
