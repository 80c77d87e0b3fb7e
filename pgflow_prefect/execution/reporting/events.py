"""Sends Prefect events of a run and its steps, for automations."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, cast
from uuid import UUID

from prefect.client.schemas.objects import FlowRun
from prefect.events import Event, RelatedResource, Resource
from prefect.types import DateTime

from pgflow_prefect.prefect_api.event_sender import Sender
from pgflow_prefect.settings import Events
from pgflow_prefect.state_names import DONE, StateName
from pgflow_prefect.wording import clean, clean_lines

_LONGEST_MESSAGE = 1000  # characters

_ENDS = DONE | {StateName.NOT_RUN, StateName.FAILED, StateName.TIMED_OUT, StateName.CANCELLED, StateName.CRASHED}


@dataclass
class RunEvents:
    """Emits the events of one run that the settings select.

    An event is called `pgflow.run.…` or `pgflow.step.…`, followed by Prefect's name of the state, in lower case with
    dashes: `pgflow.run.completed`, `pgflow.step.awaiting-retry`. Its resource is `pgflow.run.<run id>` or
    `pgflow.step.<run id>.<step slug>`. The resource has the labels `pgflow.workflow`, `pgflow.run` and `pgflow.step`.
    The flow run is a related resource. So is the task run of a step that did not complete.

    Attributes:
        run_id: the run.
        workflow_slug: its workflow.
        flow_run: the flow run that executes it.
        find_task_run_id: returns a step's task run.
        wanted: the selected events.
        event_sender: sends them.
    """

    run_id: UUID
    workflow_slug: str
    flow_run: FlowRun
    find_task_run_id: Callable[[str], UUID]
    wanted: Events
    event_sender: Sender

    def tell_of_run(self, what: str, occurred: datetime | None = None, message: str | None = None) -> None:
        """Tell what happened to the run.

        Args:
            what: a state's name.
            occurred: when it entered the state, if not now.
            message: why it has failed.
        """
        if self.wanted is not Events.NONE:
            make = partial(self._make_event_of_run, what, occurred or datetime.now(UTC), message)
            self.event_sender.send(make)

    def tell_of_step(self, step_slug: str, what: str) -> None:
        """Tell what happened to a step: a state's name."""
        if self.wanted is Events.ALL or (self.wanted is Events.ENDS and what in _ENDS):
            self.event_sender.send(
                partial(self._make_event_of_step, step_slug, self.find_task_run_id(step_slug), what, datetime.now(UTC))
            )

    def _make_event_of_run(self, what: str, occurred: datetime, message: str | None) -> Event:
        told = {"message": clean_lines(message)[:_LONGEST_MESSAGE]} if message else {}
        return _make_event(
            occurred,
            event=f"pgflow.run.{_to_words(what)}",
            resource={
                "prefect.resource.id": f"pgflow.run.{self.run_id}",
                "prefect.resource.name": self.flow_run.name,
                **self._labels,
            },
            related=[self._related_flow_run],
            payload={"state": what, **told},
        )

    def _make_event_of_step(self, step_slug: str, task_run_id: UUID, what: str, occurred: datetime) -> Event:
        name = clean(step_slug)
        return _make_event(
            occurred,
            event=f"pgflow.step.{_to_words(what)}",
            resource={
                "prefect.resource.id": f"pgflow.step.{self.run_id}.{name}",
                "prefect.resource.name": name,
                "pgflow.step": name,
                **self._labels,
            },
            # Each related resource is a row on the server. For a step that completed, the flow run is enough.
            related=[self._related_flow_run] if what in DONE else [self._related_flow_run, _relate(task_run_id)],
            payload={"state": what},
        )

    @property
    def _labels(self) -> dict[str, str]:
        return {"pgflow.workflow": clean(self.workflow_slug), "pgflow.run": str(self.run_id)}

    @property
    def _related_flow_run(self) -> dict[str, str]:
        return {
            "prefect.resource.id": f"prefect.flow-run.{self.flow_run.id}",
            "prefect.resource.role": "flow-run",
            "prefect.resource.name": self.flow_run.name,
        }


def _relate(task_run_id: UUID) -> dict[str, str]:
    return {"prefect.resource.id": f"prefect.task-run.{task_run_id}", "prefect.resource.role": "task-run"}


def _make_event(
    occurred: datetime, event: str, resource: dict[str, str], related: list[dict[str, str]], payload: dict[str, Any]
) -> Event:
    # Prefect's models would look up the allowed number of labels in its settings for each event.
    return Event.model_construct(
        occurred=cast("DateTime", occurred),  # Prefect's types don't know that it is one
        event=event,
        resource=Resource.model_construct(resource),
        related=[RelatedResource.model_construct(each) for each in related],
        payload=payload,
    )


def _to_words(state_name: str) -> str:
    """Return a state's name as events write it: `AwaitingRetry` is `awaiting-retry`."""
    if state_name == StateName.NOT_RUN:
        return "not-run"  # Prefect's name for it says less
    return "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in state_name).lstrip("-")
