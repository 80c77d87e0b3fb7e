"""Makes the events of steps that ended before Prefect was told of their run, from their rows."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast
from uuid import UUID, uuid5

from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun, TaskRunResult
from prefect.events import Event, RelatedResource
from prefect.states import Cancelled, Completed, Failed
from prefect.types import DateTime

from pgflow_prefect.database.recording import UnrecordedRun, UnrecordedStep
from pgflow_prefect.definitions.graph import Graph
from pgflow_prefect.execution.reporting.task_run_events import make_event
from pgflow_prefect.execution.reporting.task_runs import EDGES
from pgflow_prefect.models import Ending, Status, TaskKey
from pgflow_prefect.prefect_api.ids import find_task_run_id
from pgflow_prefect.prefect_api.states import DECIDED, date_decided, not_run, skipped
from pgflow_prefect.state_names import StateName
from pgflow_prefect.wording import clean

_TICK = timedelta(microseconds=1)


def make_final_state(run: UnrecordedRun) -> State[Any]:
    """Return the state in which Prefect shows an ended run."""
    if run.status is Status.COMPLETED:
        return Completed()
    if run.is_cancelled:
        return Cancelled(message=run.error_message)
    return Failed(message=run.error_message)


@dataclass(frozen=True)
class StepEvents:
    """Makes the events of a run's steps from their rows.

    Attributes:
        flow_run: Prefect's flow run that shows the run.
        graph: the run's steps.
    """

    flow_run: FlowRun
    graph: Graph

    def make_task_run(self, task_run_id: UUID, name: str, attempts: int, upstream: Iterable[UUID]) -> TaskRun:
        """Return the task run of a step, to which edges lead from these ones."""
        name = clean(name)
        return TaskRun(
            id=task_run_id,
            flow_run_id=self.flow_run.id,
            flow_run_run_count=self.flow_run.run_count,
            name=name,
            task_key=name,
            dynamic_key=str(task_run_id),
            run_count=attempts,
            task_inputs={EDGES: [TaskRunResult(id=each) for each in upstream]},
        )

    def enter(self, run: TaskRun, state: State[Any], before: State[Any] | None) -> Event:
        """Set a task run's state, and return the event; the same again for the same name and time."""
        state.id = uuid5(run.id, f"{state.name} {state.timestamp.isoformat()}")
        state.state_details.task_run_id, state.state_details.flow_run_id = run.id, run.flow_run_id
        run.state, run.state_id, run.state_type, run.state_name = state, state.id, state.type, state.name
        if state.is_running():
            run.start_time = run.expected_start_time = run.start_time or cast("DateTime", state.timestamp)
        elif state.name in DECIDED:
            date_decided(run, state)
        if state.is_final() and before is not None:
            run.end_time = cast("DateTime", state.timestamp)
        if before is not None and before.is_running():
            run.total_run_time += state.timestamp - before.timestamp
        event = make_event(run, state, before)
        event.related += self._relate()
        return event

    def _relate(self) -> list[RelatedResource]:
        """Return the related resources that automations look for. Each is a row on the server."""
        found = {"flow-run": self.flow_run.id, "flow": self.flow_run.flow_id, "deployment": self.flow_run.deployment_id}
        return [
            RelatedResource.model_construct(
                {"prefect.resource.id": f"prefect.{role}.{each}", "prefect.resource.role": role}
            )
            for role, each in found.items()
            if each is not None
        ]


@dataclass(frozen=True)
class RecordedSteps(StepEvents):
    """The steps of one run that were claimed, skipped or not run, to be shown in Prefect.

    Attributes:
        steps: in the order of their first claims.
    """

    steps: tuple[UnrecordedStep, ...]

    def make_events(self, besides: frozenset[UUID] = frozenset()) -> Iterator[Event]:
        """Yield the events of the steps' task runs, with the times of the rows.

        A second call makes the same events, with the same ids: Prefect's server recognises them.

        Args:
            besides: task runs to leave out.
        """
        task_run_ids = {each.step_slug: self._find_task_run_id(each) for each in self.steps}
        for step in self.steps:
            if task_run_ids[step.step_slug] not in besides:
                yield from self._make_events_of(step, task_run_ids)

    def _find_task_run_id(self, step: UnrecordedStep) -> UUID:
        """Return the task run that claimed a step; of a step that was decided without a claim, one of its own."""
        return step.task_run_id or find_task_run_id(self.flow_run.id, TaskKey(step.step_slug, step.task_index))

    def _make_events_of(self, step: UnrecordedStep, task_run_ids: Mapping[str, UUID]) -> Iterator[Event]:
        # The first claim is noted a moment after it; the start is that of the latest attempt.
        claims = [each for each in (step.first_claimed_at, step.started_at) if each is not None]
        if (began_at := min(claims, default=step.created_at)) is None:
            return
        upstream = [task_run_ids[slug] for slug in self.graph.predecessors(step.step_slug) if slug in task_run_ids]
        run = self.make_task_run(task_run_ids[step.step_slug], step.step_slug, step.attempts, upstream)
        before: State[Any] | None = None
        for state in _find_states(step, began_at):
            yield self.enter(run, state, before)
            before = state


def _find_states(step: UnrecordedStep, began_at: datetime) -> Iterator[State[Any]]:
    """Yield the states of a step that its row tells."""
    if step.started_at is None and (step.is_skipped or step.is_not_run):
        decided = skipped(step.skip_message) if step.is_skipped else not_run(step.skip_message)
        yield decided.model_copy(update={"timestamp": step.finished_at or began_at})
        return
    yield State(type=StateType.RUNNING, timestamp=began_at)
    ended_at = max(step.finished_at or began_at, began_at + _TICK)  # the server orders states by their times
    if step.is_skipped:
        yield skipped(step.skip_message).model_copy(update={"timestamp": ended_at})
    elif step.status is Status.COMPLETED:
        yield State(type=StateType.COMPLETED, timestamp=ended_at)
    elif step.ended_as is Ending.CANCELLED:
        yield State(type=StateType.CANCELLED, timestamp=ended_at, message=step.error_message)
    elif step.status is Status.FAILED:
        name = StateName.TIMED_OUT if step.task_state == StateName.TIMED_OUT else StateName.FAILED
        yield State(type=StateType.FAILED, name=name, timestamp=ended_at, message=step.error_message)
    elif step.finished_at is None:
        yield State(type=StateType.CANCELLED, timestamp=ended_at, message="the run has ended")
