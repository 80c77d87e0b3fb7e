"""Creates the flow run that is to execute a run in this process."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.settings import get_current_settings
from prefect.states import Running

from pgflow_prefect.prefect_api.client import TAG
from pgflow_prefect.prefect_api.flow_run_names import name_flow_run
from pgflow_prefect.prefect_api.internals import url_for
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
    client: PrefectClient,
    flow: Flow[..., Any],
    workflow_slug: str,
    run_id: UUID,
    installation: UUID,
    *,
    parent_task_run_id: UUID | None = None,
) -> CreatedFlowRun:
    """Create the flow run that will execute a run of this installation.

    It gets the run's id only: the payload stays in PostgreSQL. Prefect shows the flow run of a child below the
    task run of its step.
    """
    created = await client.create_flow_run(
        flow,
        name=name_flow_run(workflow_slug, run_id),
        tags=[TAG, make_ownership_tag(installation)],
        parameters={"run_id": str(run_id)},
        state=Running(),
        parent_task_run_id=parent_task_run_id,
    )
    return CreatedFlowRun(created, url_for(created) if get_current_settings().api.url else None)
