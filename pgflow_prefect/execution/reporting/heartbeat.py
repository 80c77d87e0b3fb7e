"""Tells Prefect's server at intervals that a long flow run is alive."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, cast

import prefect
from prefect import Flow
from prefect.client.schemas.objects import FlowRun
from prefect.events import Event, RelatedResource, Resource
from prefect.settings import get_current_settings
from prefect.types import DateTime

from pgflow_prefect.prefect_api.event_sender import find_outbox

SHORTEST_HEARTBEAT = 30.0
"""The least number of seconds between two signs of life, as in Prefect."""


def start_heartbeat(flow: Flow[..., Any], flow_run: FlowRun) -> Callable[[], None]:
    """Tell the server at intervals that a long flow run is alive. The returned function ends that.

    Prefect's engine starts a thread for each flow run. Here, the thread that sends all events does it.
    """
    seconds = get_current_settings().flows.heartbeat_frequency
    if seconds is None:
        return lambda: None
    resource = {
        "prefect.resource.id": f"prefect.flow-run.{flow_run.id}",
        "prefect.resource.name": flow_run.name,
        "prefect.version": prefect.__version__,
    }
    related: list[Mapping[str, str]] = [
        {
            "prefect.resource.id": f"prefect.flow.{flow_run.flow_id}",
            "prefect.resource.role": "flow",
            "prefect.resource.name": flow.name,
        },
        *(
            {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}
            for tag in sorted(flow_run.tags)
        ),
    ]
    if flow_run.deployment_id is not None:
        deployment = f"prefect.deployment.{flow_run.deployment_id}"
        related.insert(1, {"prefect.resource.id": deployment, "prefect.resource.role": "deployment"})

    def make_event() -> Event:
        return Event.model_construct(
            occurred=cast("DateTime", datetime.now(UTC)),
            event="prefect.flow-run.heartbeat",
            resource=Resource.model_construct(resource),
            related=[RelatedResource.model_construct(dict(each)) for each in related],
            payload={},
        )

    return find_outbox().repeat(make_event, max(float(seconds), SHORTEST_HEARTBEAT))
