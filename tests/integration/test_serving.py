"""What `serve` does with its deployments, and with flow runs whose process was ended, on a real Prefect server."""

from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, Pending, Running

from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.deployments import Options, deploy
from pgflow_prefect.deployment.deployments.schedules import parse_schedule
from pgflow_prefect.deployment.handler_files import load_workflow
from pgflow_prefect.errors import UsageError
from pgflow_prefect.models import Held
from pgflow_prefect.prefect_api.ids import find_run_id
from pgflow_prefect.services.flow_run_processes import ExecutorContext, hand_back
from pgflow_prefect.services.serve import Served, ServedDeployments
from tests.integration.conftest import Define, make_slug

pytestmark = pytest.mark.anyio

HANDLERS = """
from pgflow_prefect import Workflow

workflow = Workflow("{slug}")

@workflow.step
def first(payload: dict[str, int]) -> int:
    return payload["n"]
"""


@pytest.fixture
async def deployments(store: Store, client: PrefectClient, define: Define, tmp_path: Path) -> ServedDeployments:
    slug = make_slug()
    define(slug, ["first"])
    source = tmp_path / "handlers.py"
    source.write_text(HANDLERS.format(slug=slug), encoding="utf-8")
    served = Served(load_workflow(slug, str(source))[0], str(source), await store.load_definition(slug))
    schedule = parse_schedule("0 9 * * *", None, None, remove=False)
    return ServedDeployments(store, client, [served], Options(here=tmp_path, schedule=schedule))


@pytest.fixture
async def flow_run(client: PrefectClient, deployments: ServedDeployments) -> FlowRun:
    """What a user's Run has scheduled."""
    await deployments.deploy()
    [deployment_id] = deployments.flows
    return await client.create_flow_run_from_deployment(deployment_id, parameters={"payload": {"n": 1}})


async def make_pool(client: PrefectClient) -> str:
    pool = f"pool-{uuid4().hex[:8]}"
    await client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    return pool


async def test_a_deployment_that_a_user_deletes_is_made_again_with_its_schedule(
    client: PrefectClient, deployments: ServedDeployments
) -> None:
    await deployments.deploy()
    [former] = deployments.flows
    await client.delete_deployment(former)
    await deployments.refresh()
    [latter] = deployments.flows
    assert latter != former
    made = await client.read_deployment(latter)
    assert made.name == "pgflow"
    assert len(made.schedules) == 1


async def test_a_deployment_that_a_user_made_again_is_served_from_then_on(
    client: PrefectClient, deployments: ServedDeployments
) -> None:
    await deployments.deploy()
    flows = deployments.flows
    [former] = flows
    await client.delete_deployment(former)
    [served] = deployments.served
    made = await deploy(client, served.workflow, served.definition, served.source, options=deployments.options)
    await deployments.refresh()
    assert flows == {made.id: served.workflow.flow}, "those who have the mapping see it"


async def test_a_deployment_that_gets_a_work_pool_is_left_alone_from_then_on(
    client: PrefectClient, deployments: ServedDeployments
) -> None:
    await deployments.deploy()
    [deployment_id] = deployments.flows
    await client.update_deployment(deployment_id, DeploymentUpdate(work_pool_name=await make_pool(client)))
    await deployments.refresh()
    assert deployments.flows == {}


async def test_a_deployment_with_a_work_pool_is_left_to_its_workers(
    client: PrefectClient, deployments: ServedDeployments
) -> None:
    pool = await make_pool(client)
    [served] = deployments.served
    made = await deploy(
        client,
        served.workflow,
        served.definition,
        served.source,
        options=Options(work_pool=pool, here=deployments.options.here),
    )
    with pytest.raises(UsageError, match=f"deployment {made.name} has the work pool '{pool}'"):
        await deployments.deploy()
    assert (await client.read_deployment(made.id)).schedules == [], "nothing was changed"


async def test_a_users_deployment_with_a_work_pool_does_not_keep_ours_from_being_served(
    client: PrefectClient, deployments: ServedDeployments
) -> None:
    [served] = deployments.served
    flow_id = await client.create_flow_from_name(served.workflow.slug)
    nightly = await client.create_deployment(flow_id, "nightly", work_pool_name=await make_pool(client))
    await deployments.deploy()
    [own] = deployments.flows
    assert own != nightly


@pytest.mark.parametrize("state", [Pending(), Running(), Crashed()], ids=lambda state: state.name)
async def test_a_flow_run_that_had_not_begun_its_run_is_scheduled_again(
    store: Store, client: PrefectClient, deployments: ServedDeployments, flow_run: FlowRun, state: State[None]
) -> None:
    await client.set_flow_run_state(flow_run.id, state, force=True)
    await hand_back(store, client, flow_run)
    found = await client.get_scheduled_flow_runs_for_deployments([*deployments.flows])
    assert flow_run.id in [each.id for each in found], "for the next process that serves"


async def test_a_flow_run_that_had_not_taken_the_run_it_was_submitted_for_is_scheduled_again(
    store: Store, client: PrefectClient, deployments: ServedDeployments
) -> None:
    await deployments.deploy()
    [deployment_id], [served] = deployments.flows, deployments.served
    run_id = uuid4()
    epoch = await store.create_run(served.workflow.slug, "{}", run_id)
    assert epoch is not None
    flow_run = await client.create_flow_run_from_deployment(deployment_id, parameters={"run_id": str(run_id)})
    await store.link_flow_run(run_id, epoch, flow_run.id, queued=True)
    await client.set_flow_run_state(flow_run.id, Crashed(), force=True)
    await hand_back(store, client, flow_run)
    assert (await read_state(client, flow_run.id)).is_scheduled()
    assert (await store.read_run(run_id)).held is Held.QUEUED


async def test_a_run_that_was_under_way_is_handed_back(
    store: Store, client: PrefectClient, deployments: ServedDeployments, flow_run: FlowRun
) -> None:
    run_id = await begin(store, deployments, flow_run)
    await client.set_flow_run_state(flow_run.id, Crashed(), force=True)
    await hand_back(store, client, flow_run)
    assert (await read_state(client, flow_run.id)).name == "HandedBack"
    assert (await store.read_run(run_id)).held is Held.RELEASED


@pytest.mark.parametrize("state", [Completed(), Failed()], ids=lambda state: state.name)
async def test_the_end_of_a_flow_run_stays_though_its_process_was_told_to_end(
    store: Store, client: PrefectClient, deployments: ServedDeployments, flow_run: FlowRun, state: State[None]
) -> None:
    run_id = await begin(store, deployments, flow_run)
    await store.cancel_run(run_id, "it has failed")
    await client.set_flow_run_state(flow_run.id, state, force=True)
    await hand_back(store, client, flow_run)
    assert (await read_state(client, flow_run.id)).name == state.name


@pytest.mark.parametrize("state", [Cancelling(), Cancelled()], ids=lambda state: state.name)
async def test_a_wish_to_cancel_outlives_the_process(
    store: Store, client: PrefectClient, deployments: ServedDeployments, flow_run: FlowRun, state: State[None]
) -> None:
    await begin(store, deployments, flow_run)
    await client.set_flow_run_state(flow_run.id, state, force=True)
    await hand_back(store, client, flow_run)
    assert (await read_state(client, flow_run.id)).name == state.name


async def test_a_flow_run_that_can_t_be_cancelled_leaves_the_others_alone(
    prefect_api: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with ExecutorContext() as context:
        context._observer.on_cancelling(uuid4())  # a user has deleted it
    assert "could not be cancelled" in caplog.text


async def begin(store: Store, deployments: ServedDeployments, flow_run: FlowRun) -> UUID:
    """Create the run of a flow run, as its process does."""
    [served] = deployments.served
    run_id = find_run_id(flow_run.id)
    await store.create_run(served.workflow.slug, '{"n": 1}', run_id, flow_run.id)
    await deployments.client.set_flow_run_state(flow_run.id, Running(), force=True)
    return run_id


async def read_state(client: PrefectClient, flow_run_id: UUID) -> State[None]:
    state = (await client.read_flow_run(flow_run_id)).state
    assert state is not None
    return state
