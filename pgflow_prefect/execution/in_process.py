"""Executing a run in this process, as a flow run that Prefect's API knows."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import get_current_settings
from prefect.states import Running

from pgflow_prefect.prefect_api.client import TAG
from pgflow_prefect.prefect_api.flow_run_names import name_flow_run
from pgflow_prefect.prefect_api.internals import run_flow_async, url_for
from pgflow_prefect.prefect_api.ownership import make_ownership_tag


@dataclass(frozen=True)
class CreatedFlowRun:
    """A flow run that is about to execute.

    Attributes:
        flow_run: Prefect's object.
        url: its page in Prefect's UI, if there is one that outlives this process.
    """

    flow_run: FlowRun
    url: str | None


async def create_flow_run(
    client: PrefectClient, flow: Flow[..., Any], workflow_slug: str, run_id: UUID, installation: UUID
) -> CreatedFlowRun:
    """Create the flow run that will execute a run of this installation.

    It gets the run's id only: the payload stays in PostgreSQL.
    """
    created = await client.create_flow_run(
        flow,
        name=name_flow_run(workflow_slug, run_id),
        tags=[TAG, make_ownership_tag(installation)],
        parameters={"run_id": str(run_id)},
        state=Running(),
    )
    return CreatedFlowRun(created, url_for(created) if get_current_settings().api.url else None)


async def execute_flow_run(flow: Flow[..., Any], flow_run: FlowRun) -> State[Any]:
    """Execute a flow run in this process and return its final state."""
    # For a flow run of a deployment, Prefect's engine starts a thread that watches whether a user suspends it. Our
    # event loop would wait for that thread: at the start until the API answers, at the end for 0.2 s. In an outage, one
    # flow run would stop all others of this process. A flow run of ours can't be suspended, so no thread is needed.
    unwatched = flow_run.model_copy(update={"deployment_id": None})
    state = await run_flow_async(flow, flow_run=unwatched, parameters=flow_run.parameters, return_type="state")
    assert isinstance(state, State)
    return state
