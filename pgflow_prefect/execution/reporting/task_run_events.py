"""The events by which Prefect hears of task runs, and what they are related to."""

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext
from prefect.events import Event, RelatedResource, Resource
from prefect.settings import get_current_settings
from prefect.types import DateTime

from pgflow_prefect.prefect_api.client import TAG
from pgflow_prefect.prefect_api.event_sender import Related, Sender
from pgflow_prefect.prefect_api.internals import related_resources_from_run_context
from pgflow_prefect.prefect_api.ownership import OWNERSHIP_PREFIX

_SHOWN_ELSEWHERE = {"id", "created", "updated", "flow_run_id", "state_id", "state_type", "state_name", "state"}
_COMPUTED_BY_SERVER = {"estimated_start_time_delta", "estimated_run_time"}

_TIGHT = 300.0  # seconds after which an event no longer follows another one, as in Prefect

_MOST_TAGS = 20  # of a step, in an event


def make_event(
    run: TaskRun,
    state: State[Any],
    before: State[Any] | None,
    related: Iterable[RelatedResource] = (),
    *,
    is_told_of_before: bool = True,
) -> Event:
    """Return the event for a task run that has entered a state.

    Args:
        run: the task run, in this state.
        state: the state.
        before: the state before that, if there was one.
        related: resources that the events of other task runs are not related to.
        is_told_of_before: an event told the server of that state. If none did, the server must not wait for it.
    """
    # No validation is needed, for which Prefect's models would look up their settings each time.
    return Event.model_construct(
        id=state.id,
        occurred=to_time(state),
        event=f"prefect.task-run.{state.name}",
        follows=before.id if before and is_told_of_before and seconds_between(before, state) < _TIGHT else None,
        resource=Resource.model_construct(
            {
                "prefect.resource.id": f"prefect.task-run.{run.id}",
                "prefect.resource.name": run.name,
                "prefect.run-count": str(run.run_count),
                "prefect.state-message": state.message or "",
                "prefect.state-name": state.name or "",
                "prefect.state-timestamp": state.timestamp.isoformat(),
                "prefect.state-type": state.type.value,
                "prefect.orchestration": "client",
            }
        ),
        related=[*related],  # the sender adds those of the flow run
        payload={
            "intended": {"from": before.type.value if before else None, "to": state.type.value},
            "initial_state": _describe(before) if before else None,
            "validated_state": {**_describe(state), "data": None},
            "task_run": run.model_dump(mode="json", exclude_none=True, exclude=_SHOWN_ELSEWHERE | _COMPUTED_BY_SERVER),
        },
    )


def seconds_between(before: State[Any] | None, state: State[Any]) -> float:
    """Return the time between two states; 0 if there is none before."""
    return state.timestamp.timestamp() - before.timestamp.timestamp() if before is not None else 0.0


def _describe(state: State[Any]) -> dict[str, Any]:
    return {
        "type": state.type.value,
        "name": state.name,
        "message": state.message,
        "state_details": state.state_details.model_dump(
            mode="json", exclude_none=True, exclude_unset=True, exclude={"flow_run_id", "task_run_id"}
        ),
    }


def to_time(state: State[Any]) -> DateTime:
    """Return the time of a state in Prefect's type."""
    return cast("DateTime", state.timestamp)  # it is one; Prefect's types don't say so


def look_up_related(context: FlowRunContext, event_sender: Sender) -> Related:
    """Return what the events of a flow run's task runs are related to, once Prefect has told it."""
    return event_sender.look_up(partial(_find_related, context), [_relate_to_flow_run(context)])


async def _find_related(context: FlowRunContext, client: PrefectClient) -> list[RelatedResource]:
    """Return the related resources of events, as for other tasks: flow run, flow, deployment and so on."""
    with context.model_copy():
        found = [each for each in await related_resources_from_run_context(client) if not _is_own_tag(each)]
    # The first ones stay, such as the flow run.
    return found[: _find_room()[0]]


def _find_room() -> tuple[int, int]:
    """Return how many related resources an event may have: those of its flow run, and the tags of its step.

    A server closes the connection if an event has more.
    """
    most = get_current_settings().server.events.maximum_related_resources
    of_step = min(_MOST_TAGS, most // 4)
    return most - of_step, of_step


def _is_own_tag(related: RelatedResource) -> bool:
    """Tell whether all our flow runs have this tag: it would cost a row for each event, and no automation needs it."""
    name = related.id.removeprefix("prefect.tag.")
    return name != related.id and (name == TAG or name.startswith(OWNERSHIP_PREFIX))


def _relate_to_flow_run(context: FlowRunContext) -> RelatedResource:
    assert context.flow_run is not None
    return RelatedResource(
        {
            "prefect.resource.id": f"prefect.flow-run.{context.flow_run.id}",
            "prefect.resource.role": "flow-run",
            "prefect.resource.name": context.flow_run.name,
        }
    )


def relate_to_tags(tags: Iterable[str]) -> list[RelatedResource]:
    """Return what the events of a step with these tags of its own are related to, beside its flow run."""
    related = [
        RelatedResource.model_construct({"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"})
        for tag in sorted(tags)
    ]
    return related[: _find_room()[1]]
