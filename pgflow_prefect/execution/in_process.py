"""Executing a run in this process, as a flow run that Prefect's API knows."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import AsyncClientContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.flow_engine import run_flow_async
from prefect.settings import get_current_settings
from prefect.states import Pending
from prefect.utilities.urls import url_for

from pgflow_prefect.errors import PrefectUnavailableError
from pgflow_prefect.prefect_api.errors import refuse, unavailable
from pgflow_prefect.prefect_api.flow_run_names import name_flow_run
from pgflow_prefect.prefect_api.ownership import make_ownership_tag
from pgflow_prefect.prefect_api.redaction import describe_error

TAG = "pgflow"
"""What everything of ours is tagged with in Prefect."""


@dataclass(frozen=True)
class CreatedFlowRun:
    """A flow run that is about to execute.

    Attributes:
        flow_run: Prefect's object.
        url: its page in Prefect's UI, if there is one that outlives this process.
    """

    flow_run: FlowRun
    url: str | None


def has_server() -> bool:
    """Tell whether Prefect is set to use a server; else it starts a temporary one, which takes a while."""
    return bool(get_current_settings().api.url)  # an empty variable says nothing


@asynccontextmanager
async def connect_to_prefect() -> AsyncIterator[PrefectClient]:
    """Open a client of Prefect's API; where none is configured, Prefect starts a temporary server for it.

    Raises:
        PrefectUnavailableError: the API does not answer, or the server does not start.
    """
    url = get_current_settings().api.url
    try:
        async with get_client() as client:
            await client.hello()
        # The flow runs that this event loop executes find this client and share it. Each would make its own: loading
        # the certificates for that is a quarter of what a small run costs.
        async with AsyncClientContext() as context:
            yield context.client
    except PrefectHTTPStatusError as error:
        raise refuse(error) from error
    except httpx.TransportError as error:
        raise unavailable(describe_error(error)) from error
    except RuntimeError as error:
        if url is not None or "ephemeral" not in str(error):
            raise
        raise PrefectUnavailableError(
            f"Prefect's temporary server did not start: {error} Set PREFECT_API_URL to a server that runs, or try "
            "pip install 'pgflow-prefect[embedded]', which has versions that are known to work together"
        ) from error


async def create_flow_run(
    client: PrefectClient, flow: Flow[..., Any], workflow_slug: str, run_id: UUID, installation: UUID
) -> CreatedFlowRun:
    """Create the flow run that is to execute a run of this installation.

    It gets the run's id only: the payload stays in PostgreSQL.
    """
    created = await client.create_flow_run(
        flow,
        name=name_flow_run(workflow_slug, run_id),
        tags=[TAG, make_ownership_tag(installation)],
        parameters={"run_id": str(run_id)},
        state=Pending(),
    )
    return CreatedFlowRun(created, url_for(created) if get_current_settings().api.url else None)


async def execute_flow_run(flow: Flow[..., Any], flow_run: FlowRun) -> State[Any]:
    """Execute a flow run in this process and return its final state, whatever it is."""
    # Of a flow run of a deployment, Prefect's engine watches in a thread and an event loop of its own whether somebody
    # suspends it, and has our event loop wait for that thread: at its start until the API answers, so that in an
    # outage one flow run would stop all others of this process; at its end 0.2 s. Nothing here can be suspended.
    unwatched = flow_run.model_copy(update={"deployment_id": None})
    state = await run_flow_async(flow, flow_run=unwatched, parameters=flow_run.parameters, return_type="state")
    assert isinstance(state, State)
    return state
