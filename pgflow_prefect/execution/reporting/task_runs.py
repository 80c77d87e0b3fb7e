"""Our task engine: executes a step as a task run of the current flow run, in place of Prefect's task engine.

Prefect's own engine spends 9 ms of a core on a task that does nothing. Most of that serves features that a step does
not use: persisted and cached results, parameters, assets, futures. A third goes to three threads that pass events
to each other. PostgreSQL already has the step's input, result and state. So three jobs are left: send events to the
server, be the task run that handlers find in their context, and try again.

Clients of Prefect 3 report their tasks to the server by `prefect.task-run.…` events. These events are not part of the
documented Python API. But a server has to understand the events of older and newer clients. Tests compare the server's
view of our events with its view of Prefect's own. A step's task run has an id of ours, so that a step stays one node of
the run graph over all retries of a flow run. Its edges are exactly those of the definition; Prefect would infer edges
from the identity of values.
"""

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from time import time
from typing import Any
from uuid import UUID

import anyio
from prefect import Task
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State, StateType, TaskRun, TaskRunPolicy, TaskRunResult
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import PrefectSignal
from prefect.states import AwaitingRetry, Retrying

from pgflow_prefect.errors import HandlerRaisedError
from pgflow_prefect.execution.reporting.failed_attempts import find_delay, log_failure, make_failed
from pgflow_prefect.execution.reporting.tag_limits import TagLimits, find_tag_limits, hold_slots
from pgflow_prefect.execution.reporting.task_run_events import (
    look_up_related,
    make_event,
    relate_to_tags,
    seconds_between,
    to_time,
)
from pgflow_prefect.execution.step_writer import clean_message
from pgflow_prefect.handlers.threads import is_in_thread
from pgflow_prefect.prefect_api.contexts import leave_flow_run
from pgflow_prefect.prefect_api.event_sender import HeldEvent, Related, Sender, find_outbox
from pgflow_prefect.prefect_api.internals import (
    AsyncTransaction,
    ConcurrencyContext,
    TagsContext,
    exception_to_crashed_state,
    task_run_logger,
)
from pgflow_prefect.prefect_api.states import DECIDED, date_decided

EDGES = "upstream"
"""The only parameter of a step's task, because the run graph shows a parent once for each parameter."""


class StepTask(Task[[None], Any]):
    """A step's task in Prefect; all edges lead to its only parameter."""

    @property
    def isasync(self) -> bool:
        """Whether Prefect's functions return coroutines; they don't in a sync handler."""
        return not is_in_thread()

    @isasync.setter
    def isasync(self, value: bool) -> None:
        """Accept Prefect's value: the function that it sees is always async."""


_NOTHING = nullcontext()

_logger = logging.getLogger(__name__)


class TaskRuns:
    """The task runs of the current flow run, and their common data."""

    def __init__(self, context: FlowRunContext, limits: TagLimits, event_sender: Sender, related: Related) -> None:
        """Take the data that `make_task_runs` has found."""
        assert context.flow_run is not None
        self.context = context
        self.flow_run = context.flow_run
        self.tags = sorted(TagsContext.get().current_tags)
        self._limits = limits
        self.related = related
        self.event_sender = event_sender
        # The common part of all task runs: a copy is faster than a validation for each of them.
        self._task_run = TaskRun(
            flow_run_id=self.flow_run.id,
            flow_run_run_count=self.flow_run.run_count,
            task_key="",
            dynamic_key="",
            tags=self.tags,
        )
        self._task_run_context: TaskRunContext | None = None
        self._open: set[StepTaskRun] = set()  # of a run that begins unshown: those that have not ended
        self._shown: set[UUID] = set()  # of such a run: those that Prefect hears of from here
        self._begins_shown = event_sender.is_shown

    @property
    def shown(self) -> frozenset[UUID]:
        """The task runs that Prefect hears of from here, of a run that began unshown."""
        return frozenset(self._shown)

    def begin_to_show(self) -> None:
        """Show a run that began unshown, from now on: the flow run in the context has its id in Prefect now."""
        self.related = look_up_related(self.context, self.event_sender)
        for each in self._open:
            self._shown.add(each.task_run_id)
            each.show_again()

    def enter(self, step: "StepTaskRun") -> AbstractContextManager[None]:
        """Be in the flow run, as far as there is one, while a step is performed."""
        return _NOTHING if self._begins_shown else self._enter_unshown(step)

    @contextmanager
    def _enter_unshown(self, step: "StepTaskRun") -> Iterator[None]:
        # A flow or task that the handler calls would name a flow run that Prefect does not have: Prefect refuses that.
        with nullcontext() if self.event_sender.is_shown else leave_flow_run():
            self._open.add(step)
            if self.event_sender.is_shown:
                self._shown.add(step.task_run_id)
            try:
                yield
            finally:
                self._open.discard(step)

    def find_limits(self, tags: Collection[str]) -> list[str]:
        """Return the limits of the task runs of a step with these tags of its own."""
        return self._limits.find(tags) if self._limits else []

    def prepare(self, task: StepTask, task_run_id: UUID, upstream: Iterable[UUID]) -> "StepTaskRun":
        """Return the task run of a step; Prefect hears of it once it is performed.

        Args:
            task: made by `make_task`.
            task_run_id: the id of its task run.
            upstream: the task runs from which an edge leads to it.
        """
        policy = _make_policy(task.retries, tuple(_get_delays(task)), task.retry_jitter_factor)
        task_run = self._task_run.model_copy(
            update={
                "id": task_run_id,
                "name": task.name,
                "task_key": task.task_key,
                "dynamic_key": str(task_run_id),
                "task_version": task.version,
                "tags": sorted({*self.tags, *task.tags}) if task.tags else self.tags,
                "empirical_policy": policy,
                "task_inputs": {EDGES: [TaskRunResult(id=each) for each in upstream]},
            }
        )
        return StepTaskRun(self, task, task_run)

    def make_context(self, task: StepTask, task_run: TaskRun) -> TaskRunContext:
        """Return the context in which a handler finds the current task run."""
        if self._task_run_context is None:
            self._task_run_context = TaskRunContext(
                task=task,
                log_prints=self.context.log_prints,
                task_run=task_run,
                parameters={EDGES: None},
                result_store=self.context.result_store,
                client=self.context.client,
                persist_result=False,
            )
        its_own = {"task": task, "task_run": task_run, "start_time": datetime.now(UTC)}
        return self._task_run_context.model_copy(update=its_own)


async def make_task_runs(sender: Sender | None = None, tags: Collection[str] = ()) -> TaskRuns:
    """Prepare for task runs in the current flow run.

    Args:
        sender: where events go; by default, to Prefect's server.
        tags: those of its steps.
    """
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    event_sender = sender or find_outbox()
    related = look_up_related(context, event_sender)
    # A run that is recorded later has no tags of its own in Prefect, but its steps may have some.
    of_flow_run = TagsContext.get().current_tags if event_sender.is_shown else ()
    limits = TagLimits()
    if of_flow_run or tags:
        limits = await find_tag_limits(_get_client(context), of_flow_run, tags)
    return TaskRuns(context, limits, event_sender, related)


class StepTaskRun:
    """One task run, from its first attempt to its end.

    Attributes:
        logger: its messages show under the task run.
    """

    def __init__(self, runs: TaskRuns, task: StepTask, task_run: TaskRun) -> None:
        """Take the parts that `TaskRuns.prepare` has made."""
        self._runs = runs
        self._task = task
        self._task_run = task_run
        context = runs.context
        self._context = runs.make_context(task, task_run)
        self._slots = ConcurrencyContext()
        self._transaction = self._make_transaction()
        # Made before they are entered, so that a ready step does not wait for them.
        self._running, self._completed = _make_state(StateType.RUNNING), _make_state(StateType.COMPLETED)
        self._beginning: HeldEvent | None = None
        self.logger = task_run_logger(task_run, task, runs.flow_run, context.flow)
        self.limits = runs.find_limits(task.tags)
        self._tags = relate_to_tags({*task.tags} - {*runs.tags})

    @property
    def task_run_id(self) -> UUID:
        """The id of the task run."""
        return self._task_run.id

    def hold_slots(self, waiting: AbstractAsyncContextManager[None]) -> AbstractAsyncContextManager[None]:
        """Hold a slot of each limit until the block ends; `waiting` is entered while the step waits for them."""
        return hold_slots(self.limits, self.task_run_id, waiting)

    def rename(self, name: str) -> None:
        """Give the task run another name, and show it if the task run is running."""
        self._task_run.name = name
        if isinstance(self.logger, logging.LoggerAdapter):
            self.logger.extra = {**(self.logger.extra or {}), "task_run_name": name}
        state = self._task_run.state
        if state is None or not state.is_running():
            return
        if self._beginning is not None and self._beginning.take():
            self._send(self._task_run.model_copy(), state, None)  # Prefect has not heard of the former name
        else:
            self._enter(State(type=state.type, name=state.name), is_attempt=False)

    def show_again(self) -> None:
        """Send the current state once more: of a run that was not shown until now."""
        run = self._task_run
        if run.state is not None:
            run.flow_run_id = run.state.state_details.flow_run_id = self._runs.flow_run.id
            self._send(run.model_copy(), run.state, None)

    def _send(self, run: TaskRun, state: State[Any], before: State[Any] | None) -> None:
        sender = self._runs.event_sender
        make = partial(make_event, run, state, before, self._tags)
        if before is None and state.is_running():
            # Of a task that ends soon, Prefect gets the end only. That event has all that this one has.
            self._beginning = sender.hold(make, self._runs.related)
            return
        untold = self._beginning.take() if self._beginning else None
        if untold and not state.is_final():
            sender.send(*untold)
        is_told_of_before = not (untold and state.is_final())
        sender.send(partial(make, is_told_of_before=is_told_of_before), self._runs.related)

    def _make_transaction(self) -> AsyncTransaction:
        # `atransaction` does this, and more for persisted results: it costs as much as two states.
        return AsyncTransaction(store=self._runs.context.result_store, write_on_commit=False, logger=_logger)

    async def perform(self, conclude: Callable[[State[Any]], Awaitable[None]]) -> State[Any]:
        """Run the step's task, all its attempts, and return the final state.

        Args:
            conclude: called with that state, as soon as Prefect is told of it.
        """
        with self._context, self._slots, self._runs.enter(self):
            try:
                state = await self._attempt(self._running, conclude)
                while state.is_scheduled():
                    await self._wait_until(state)
                    self._transaction, self._completed = self._make_transaction(), _make_state(StateType.COMPLETED)
                    state = await self._attempt(Retrying(), conclude)
            except PrefectSignal:
                raise
            except BaseException as error:
                state = await exception_to_crashed_state(error)
                self.logger.error("Crash detected! %s", state.message)  # noqa: TRY400  as Prefect has it
                self._enter(state)
                raise
            # No line for each completed step: a thousand such lines help no reader, and cost a quarter of a step.
            if not state.is_completed():
                self.logger.error("Finished in state %s", state)
        return state

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be the current task run of a handler that another function executes."""
        with self._context, self._slots, self._runs.enter(self):
            yield

    def log_failure(self, error: Exception) -> None:
        """Log the error of the last attempt, as Prefect does."""
        log_failure(self.logger, error, "")

    def show(self, state: State[Any]) -> None:
        """Show the task run in this state, without an attempt: its step was not executed."""
        with self._context:
            self._enter(state)

    async def _attempt(self, running: State[Any], conclude: Callable[[State[Any]], Awaitable[None]]) -> State[Any]:
        """Make an attempt and enter the state that follows: a final one, or a scheduled one."""
        self._enter(running)
        try:
            # If the handler raises, the transactions of its own tasks are rolled back. If it does not, Prefect gets
            # the state before they commit, as in its own engine, so that later steps don't wait for the commit.
            async with self._transaction:
                result = await self._task.fn(None)
                state = result if isinstance(result, State) else self._completed
                self._enter(state)
                await conclude(state)
                return state
        except Exception as error:  # noqa: BLE001  whatever a handler raises
            state = await self._find_next(error)
        self._enter(state)
        if state.is_final():
            await conclude(state)
        return state

    async def _find_next(self, error: Exception) -> State[Any]:
        """Return the state that follows an attempt with an error."""
        task, retries = self._task, self._task_run.run_count - 1
        failed = make_failed(error)
        if retries >= task.retries or not await _may_be_retried(task, self._task_run, failed):
            exhausted = " - Retries are exhausted" if task.retries and retries >= task.retries else ""
            log_failure(self.logger, error, exhausted)
            return failed
        delay = find_delay(task.retry_delay_seconds, task.retry_jitter_factor, retries)
        self.logger.info(
            "Task run failed with exception: %s - Retry %s/%s will start %s",
            str(error) if isinstance(error, HandlerRaisedError) else repr(error),
            retries + 1,
            task.retries,
            f"{delay} second(s) from now" if delay else "immediately",
        )
        return AwaitingRetry(scheduled_time=datetime.now(UTC) + timedelta(seconds=delay))

    async def _wait_until(self, state: State[Any]) -> None:
        scheduled = state.state_details.scheduled_time
        assert scheduled is not None
        await anyio.sleep(max(0.0, scheduled.timestamp() - time()))

    def _enter(self, state: State[Any], *, is_attempt: bool = True) -> None:
        """Set the task run's state, and send it to the server.

        Args:
            state: the state.
            is_attempt: a running state begins an attempt, and does not only show another name.
        """
        run, before = self._task_run, self._task_run.state
        run.flow_run_id = self._runs.flow_run.id  # a placeholder, as long as Prefect is not told of the run
        if state.message:
            state.message = clean_message(state.message)
        state.timestamp = datetime.now(UTC)
        if before is not None and before.timestamp >= state.timestamp:
            state.timestamp = before.timestamp + timedelta(microseconds=1)  # the server orders states by it
        state.state_details.task_run_id = run.id
        state.state_details.flow_run_id = run.flow_run_id
        run.state, run.state_id, run.state_type, run.state_name = state, state.id, state.type, state.name
        if before is not None and before.is_running():
            run.total_run_time += timedelta(seconds=seconds_between(before, state))
        if state.is_running() and is_attempt:
            run.run_count += 1
            run.start_time = run.start_time or to_time(state)
            run.expected_start_time = run.expected_start_time or to_time(state)
        elif state.name in DECIDED:
            date_decided(run, state)
        if state.is_final():
            run.end_time = run.end_time or to_time(state)
        if not self._runs.event_sender.is_shown:
            return
        told = run if state.is_final() else run.model_copy()  # a copy of now, because it is sent later
        self._send(told, state, before)


async def _may_be_retried(task: StepTask, task_run: TaskRun, state: State[Any]) -> bool:
    condition: Any = task.retry_condition_fn
    return condition is None or bool(await condition(task, task_run, state))


def _get_delays(task: StepTask) -> list[Any]:
    assert isinstance(task.retry_delay_seconds, list)  # as `set_policy` sets it
    return task.retry_delay_seconds


@lru_cache
def _make_policy(retries: int, delays: tuple[Any, ...], jitter_factor: float | None) -> TaskRunPolicy:
    return TaskRunPolicy(retries=retries, retry_delay=[*delays], retry_jitter_factor=jitter_factor)


def _get_client(context: FlowRunContext) -> PrefectClient:
    assert isinstance(context.client, PrefectClient)  # its flow is async
    return context.client


def _make_state(kind: StateType) -> State[Any]:
    return State(type=kind, timestamp=datetime.now(UTC))  # its own clock takes as long as the rest of the event
