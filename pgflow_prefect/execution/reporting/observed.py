"""Makes the events of steps that another program executes, while it does, from their rows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import State, StateType, TaskRun
from prefect.events import Event
from prefect.states import AwaitingRetry

from pgflow_prefect.execution.reporting.recorded import StepEvents
from pgflow_prefect.models import Status, StepState, TaskKey
from pgflow_prefect.prefect_api.ids import find_task_run_id
from pgflow_prefect.prefect_api.states import not_run, skipped
from pgflow_prefect.state_names import StateName

_TICK = timedelta(microseconds=1)


@dataclass
class _Shown:
    """What Prefect was told of a step.

    Attributes:
        run: its task run.
        said: what each of its states has told.
    """

    run: TaskRun
    said: set[tuple[object, ...]] = field(default_factory=set)


@dataclass
class ObservedSteps:
    """The steps of one run, from the first look at them to its end.

    Attributes:
        events: makes the events of the run.
        shown_as: the ids of its task runs are made from this one.
    """

    events: StepEvents
    shown_as: UUID
    _shown: dict[TaskKey, _Shown] = field(default_factory=dict, init=False)

    def make_events(
        self,
        steps: Iterable[StepState],
        tasks: Iterable[tuple[TaskKey, StepState]],
        now: datetime,
        *,
        has_ended: bool,
    ) -> Iterator[Event]:
        """Yield the events of what is new since the last call.

        Args:
            steps: all steps that have started, as they stand.
            tasks: those of maps that are shown each as a task run, likewise.
            now: a moment before they were read, by the database's clock.
            has_ended: the run has, so a step that is under way is executed no further.
        """
        for step in steps:
            yield from self._make_events_of(TaskKey(step.step_slug), step.step_slug, step, now, has_ended)
        for task, state in tasks:
            # The first task of the step is the step's own.
            key, name = TaskKey(task.step_slug, task.index + 1), f"{task.step_slug}[{task.index}]"
            yield from self._make_events_of(key, name, state, now, has_ended)

    def find_task_run_id(self, task: TaskKey) -> UUID:
        """Return the id of a task's task run."""
        return find_task_run_id(self.shown_as, task)

    def _make_events_of(
        self, task: TaskKey, name: str, step: StepState, now: datetime, has_ended: bool
    ) -> Iterator[Event]:
        shown = self._shown.get(task)
        for said, state in _find_states(step, now, has_ended):
            if shown is None:
                shown = self._shown[task] = _Shown(self._make_task_run(task, name, step.attempts))
            before = shown.run.state
            if said in shown.said or (before is not None and before.is_final() and not _goes_on(step, shown.run)):
                continue
            shown.said.add(said)
            shown.run.run_count = step.attempts
            if before is not None and state.timestamp <= before.timestamp:
                state.timestamp = before.timestamp + _TICK  # the server orders states by their times
            yield self.events.enter(shown.run, state, before)

    def _make_task_run(self, task: TaskKey, name: str, attempts: int) -> TaskRun:
        upstream = [self.find_task_run_id(TaskKey(slug)) for slug in self.events.graph.predecessors(task.step_slug)]
        return self.events.make_task_run(self.find_task_run_id(task), name, attempts, upstream)


def _goes_on(step: StepState, shown: TaskRun) -> bool:
    """Tell whether a step whose end was shown is executed again, as after a clear in Airflow."""
    return step.attempts > shown.run_count


def _find_states(step: StepState, now: datetime, has_ended: bool) -> Iterator[tuple[tuple[object, ...], State[Any]]]:
    """Yield the states that a step's row tells, in their order, each with what it says, so that none is told twice."""
    began_at = step.started_at
    if began_at is not None:
        yield ("attempt", step.attempts, began_at), State(type=StateType.RUNNING, timestamp=began_at)
    if step.status is Status.PENDING and not has_ended:
        yield from _find_pending(step, now)
    elif step.status is not Status.PENDING or step.attempts:
        ended_at = step.finished_at or now
        if began_at is not None:
            ended_at = max(ended_at, began_at + _TICK)
        yield ("end", step.attempts), _find_end(step, ended_at)


def _find_pending(step: StepState, now: datetime) -> Iterator[tuple[tuple[object, ...], State[Any]]]:
    if step.task_state == StateName.AWAITING_RETRY:
        waiting: State[Any] = AwaitingRetry(scheduled_time=now, message=step.error_message)
        waiting.timestamp = now
        yield ("retry", step.attempts), waiting
    elif step.started_at is not None and step.tasks is not None and step.tasks_completed:
        # A moment that no later look, and no other process, tells otherwise; long before the end of the step.
        moment = step.started_at + step.tasks_completed * _TICK
        message = f"{step.tasks_completed} of {_count(step.tasks)} completed"
        yield ("tasks", step.tasks_completed), State(type=StateType.RUNNING, timestamp=moment, message=message)


def _find_end(step: StepState, ended_at: datetime) -> State[Any]:
    state: State[Any]
    if step.is_skipped:
        state = skipped(step.skip_message or step.skip_reason)
    elif step.is_not_run:
        state = not_run(step.skip_message)
    elif step.status is Status.COMPLETED:
        state = State(type=StateType.COMPLETED, message=None if step.tasks is None else _count(step.tasks))
    elif step.status is Status.FAILED:
        state = State(type=StateType.FAILED, message=step.error_message)
    else:
        state = State(type=StateType.CANCELLED, message="the run has ended")
    state.timestamp = ended_at
    return state


def _count(tasks: int) -> str:
    return f"{tasks} task{'s'[: tasks != 1]}"
