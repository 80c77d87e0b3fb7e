"""The one place that does what Prefect's task engine does: a step as a task run of the current flow run.

Prefect's own engine spends 9 ms of a core on a task that does nothing. Most of that serves what a step does not have:
results that are persisted and cached, parameters, assets, futures; a third is three threads that hand each other
events. PostgreSQL has the step's input, its result and its state already. What is left to do is to tell the
server, to be the task run that handlers find in their context, and to try again.

What the server is told, `prefect.task-run.…` events, is how clients of Prefect 3 say what their tasks do. It is not
part of the documented Python API, but of what a server has to understand of clients older and newer than itself; tests
compare what it makes of them with what it makes of Prefect's own. A step's task run has an id of our own, so that a
step stays one node of the run graph over all retries of a flow run, and edges that are exactly the definition's, where
Prefect would infer them from the identity of values.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from time import time
from traceback import format_exception
from typing import Any, cast
from uuid import UUID

import anyio
from prefect import Task
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import (
    ConcurrencyLeaseHolder,
    State,
    StateType,
    TaskRun,
    TaskRunPolicy,
    TaskRunResult,
)
from prefect.concurrency.asyncio import concurrency
from prefect.concurrency.context import ConcurrencyContext
from prefect.context import FlowRunContext, TagsContext, TaskRunContext
from prefect.events import Event, RelatedResource, Resource
from prefect.events.related import related_resources_from_run_context
from prefect.exceptions import ObjectNotFound, PrefectSignal
from prefect.logging.loggers import task_run_logger
from prefect.settings import get_current_settings
from prefect.states import (
    AwaitingRetry,
    Failed,
    Retrying,
    exception_to_crashed_state,
)
from prefect.transactions import AsyncTransaction
from prefect.types import DateTime
from prefect.utilities.math import clamped_poisson_interval

from pgflow_prefect.database.step_transaction import Logger
from pgflow_prefect.errors import HandlerRaisedError, ReturnedStateError
from pgflow_prefect.execution.step_writer import clean_message
from pgflow_prefect.execution.tracebacks import trim
from pgflow_prefect.handlers.raised import describe
from pgflow_prefect.handlers.threads import is_in_thread
from pgflow_prefect.prefect_api.client import TAG
from pgflow_prefect.prefect_api.event_sender import EventSender, Related, find_outbox
from pgflow_prefect.prefect_api.ownership import OWNERSHIP_PREFIX
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.state_names import StateName

EDGES = "upstream"
"""The only parameter of a step's task: the run graph repeats a parent once for each parameter that leads to it."""


class StepTask(Task[[None], Any]):
    """A step as Prefect knows it: its only parameter is where edges lead to."""

    @property
    def isasync(self) -> bool:
        """Whether Prefect's functions are to return coroutines: not where a sync handler calls them."""
        return not is_in_thread()

    @isasync.setter
    def isasync(self, value: bool) -> None:
        """Take what Prefect found: what it executes is always async."""


_SHOWN_ELSEWHERE = {"id", "created", "updated", "flow_run_id", "state_id", "state_type", "state_name", "state"}
_COMPUTED_BY_SERVER = {"estimated_start_time_delta", "estimated_run_time"}

_TIGHT = 300.0  # seconds after which an event does not follow another one any more, as Prefect has it

_PATIENCE = 5.0  # seconds that a run waits for what Prefect's API knows of it

_logger = logging.getLogger(__name__)


class TaskRuns:
    """The task runs of the current flow run, and what they have in common."""

    def __init__(
        self, context: FlowRunContext, limits: Iterable[str], event_sender: EventSender, related: Related
    ) -> None:
        """Take what `make_task_runs` has found out."""
        assert context.flow_run is not None
        self.context = context
        self.flow_run = context.flow_run
        self.tags = sorted(TagsContext.get().current_tags)
        self.limits = [*limits]
        self.related = related
        self.event_sender = event_sender
        # What those of all steps have in common: to validate that for each of them takes longer than a copy.
        self._task_run = TaskRun(
            flow_run_id=self.flow_run.id,
            flow_run_run_count=self.flow_run.run_count,
            task_key="",
            dynamic_key="",
            tags=self.tags,
        )
        self._task_run_context: TaskRunContext | None = None

    def prepare(self, task: StepTask, task_run_id: UUID, upstream: Iterable[UUID]) -> "StepTaskRun":
        """Return the task run of a step; Prefect hears of it once it is performed.

        Args:
            task: made by `make_task`.
            task_run_id: what its task run is to be called.
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
                "empirical_policy": policy,
                "task_inputs": {EDGES: [TaskRunResult(id=each) for each in upstream]},
            }
        )
        return StepTaskRun(self, task, task_run)

    def make_context(self, task: StepTask, task_run: TaskRun) -> TaskRunContext:
        """Return what a handler finds as the current task run."""
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

    def hold_slots(
        self, task_run_id: UUID, waiting: AbstractAsyncContextManager[None]
    ) -> AbstractAsyncContextManager[None]:
        """Hold a slot of each limit for as long as the block takes; where Prefect can't say, go on without.

        Args:
            task_run_id: the task run whose slots they are.
            waiting: entered for as long as it has to wait for them.
        """
        return self._hold_slots(task_run_id, waiting) if self.limits else nullcontext()

    @asynccontextmanager
    async def _hold_slots(self, task_run_id: UUID, waiting: AbstractAsyncContextManager[None]) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            async with waiting:
                await self._take_slots(stack, task_run_id)
            yield

    async def _take_slots(self, stack: AsyncExitStack, task_run_id: UUID) -> None:
        holder = ConcurrencyLeaseHolder(type="task_run", id=task_run_id)
        slots = concurrency(self.limits, lease_duration=60, strict=False, holder=holder)
        try:
            await slots.__aenter__()
        except Exception as error:  # noqa: BLE001  whatever it is, the run goes on
            _logger.warning("a task goes on without a slot of %s: %s", self.limits, describe_error(error))
            return

        async def give_back(*raised: Any) -> bool | None:  # noqa: ANN401  as of any context manager
            try:
                return await slots.__aexit__(*raised)
            except Exception as error:
                if error is raised[1]:
                    raise
                _logger.warning("a slot of %s is free once its lease ends: %s", self.limits, describe_error(error))
                return None

        stack.push_async_exit(give_back)


async def make_task_runs() -> TaskRuns:
    """Prepare for task runs in the current flow run."""
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    event_sender = find_outbox()
    related = event_sender.look_up(partial(_find_related, context), [_relate_to_flow_run(context)])
    return TaskRuns(context, await _find_limits(context), event_sender, related)


async def _find_related(context: FlowRunContext, client: PrefectClient) -> list[RelatedResource]:
    """Return what events are related to, as those of other tasks are: flow run, flow, deployment and so on."""
    with context.model_copy():
        found = [each for each in await related_resources_from_run_context(client) if not _is_own_tag(each)]
    # A server closes the connection over an event that has more: the flow run, and what else comes first, is kept.
    return found[: get_current_settings().server.events.maximum_related_resources]


def _is_own_tag(related: RelatedResource) -> bool:
    """Tell whether it is a tag that everything of ours has: a row for each event, for which no automation asks."""
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


async def _find_limits(context: FlowRunContext) -> list[str]:
    """Return those of the flow run's tags for which Prefect limits how many tasks run at the same time.

    Once, and not before each task: a request is more than all the rest of what a small step costs.
    """
    found: list[str] = []
    names = [f"tag:{tag}" for tag in sorted(TagsContext.get().current_tags)]

    async def look(name: str) -> None:
        try:
            await _get_client(context).read_global_concurrency_limit_by_name(name)
            found.append(name)
        except ObjectNotFound:
            pass
        except Exception as error:  # noqa: BLE001  the run does not wait for Prefect
            _logger.warning("whether tasks are limited by %s is not known: %s", name, describe_error(error))

    with anyio.move_on_after(_PATIENCE) as scope:
        async with anyio.create_task_group() as group:
            for name in names:
                group.start_soon(look, name)
    if scope.cancelled_caught:
        _logger.warning("whether tasks are limited by %s is not known: Prefect does not answer", ", ".join(names))
    return sorted(found)


class StepTaskRun:
    """One task run, from its first attempt to its end.

    Attributes:
        logger: its messages show under the task run.
    """

    def __init__(self, runs: TaskRuns, task: StepTask, task_run: TaskRun) -> None:
        """Take what `TaskRuns.prepare` has made."""
        self._runs = runs
        self._task = task
        self._task_run = task_run
        context = runs.context
        self._context = runs.make_context(task, task_run)
        self._slots = ConcurrencyContext()
        self._transaction = self._make_transaction()
        # Made before they are entered, like all that can be: a step that is ready waits for none of it.
        self._running, self._completed = _make_state(StateType.RUNNING), _make_state(StateType.COMPLETED)
        self.logger = task_run_logger(task_run, task, runs.flow_run, context.flow)

    def _make_transaction(self) -> AsyncTransaction:
        # `atransaction` does this and, for results that are persisted, more: it costs as much as two states.
        return AsyncTransaction(store=self._runs.context.result_store, write_on_commit=False, logger=_logger)

    async def perform(self, conclude: Callable[[State[Any]], Awaitable[None]]) -> State[Any]:
        """Run the step's task, all its attempts, and return the final state.

        Args:
            conclude: called with that state, as soon as Prefect is told of it.
        """
        with self._context, self._slots:
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
            # A thousand lines that say that each step is completed help no reader: a quarter of what a step costs.
            if not state.is_completed():
                self.logger.error("Finished in state %s", state)
        return state

    async def _attempt(self, running: State[Any], conclude: Callable[[State[Any]], Awaitable[None]]) -> State[Any]:
        """Make an attempt and enter the state that it leads to: a final one, or one that is scheduled."""
        self._enter(running)
        try:
            # What its handler does in tasks of its own is rolled back where it raises; where it does not, Prefect is
            # told before that is committed, as by its own engine, and who waits for the step need not wait for that.
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
        """Return the state after an attempt that has raised."""
        task, retries = self._task, self._task_run.run_count - 1
        failed = _make_failed(error)
        if retries >= task.retries or not await _may_be_retried(task, self._task_run, failed):
            exhausted = " - Retries are exhausted" if task.retries and retries >= task.retries else ""
            _log_failure(self.logger, error, exhausted)
            return failed
        delay = _find_delay(task, retries)
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

    def _enter(self, state: State[Any]) -> None:
        """Have the task run be in a state, and tell the server."""
        run, before = self._task_run, self._task_run.state
        if state.message:
            state.message = clean_message(state.message)
        state.timestamp = datetime.now(UTC)
        if before is not None and before.timestamp >= state.timestamp:
            state.timestamp = before.timestamp + timedelta(microseconds=1)  # states are put in order by it
        state.state_details.task_run_id = run.id
        state.state_details.flow_run_id = run.flow_run_id
        run.state, run.state_id, run.state_type, run.state_name = state, state.id, state.type, state.name
        if before is not None and before.is_running():
            run.total_run_time += timedelta(seconds=_seconds_between(before, state))
        if state.is_running():
            run.run_count += 1
            run.start_time = run.start_time or _to_time(state)
            run.expected_start_time = run.expected_start_time or _to_time(state)
        if state.is_final():
            run.end_time = run.end_time or _to_time(state)
        told = run if state.is_final() else run.model_copy()  # as it is now, for that is told later
        self._runs.event_sender.send(partial(_make_event, told, state, before), self._runs.related)


def _make_event(run: TaskRun, state: State[Any], before: State[Any] | None) -> Event:
    """Return what the server is told of a task run that has entered a state."""
    # Nothing here wants to be validated, and for that, Prefect's models would look up settings of theirs each time.
    return Event.model_construct(
        id=state.id,
        occurred=_to_time(state),
        event=f"prefect.task-run.{state.name}",
        follows=before.id if before is not None and _seconds_between(before, state) < _TIGHT else None,
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
        related=[],
        payload={
            "intended": {"from": before.type.value if before else None, "to": state.type.value},
            "initial_state": _describe(before) if before else None,
            "validated_state": {**_describe(state), "data": None},
            "task_run": run.model_dump(mode="json", exclude_none=True, exclude=_SHOWN_ELSEWHERE | _COMPUTED_BY_SERVER),
        },
    )


def _make_state(kind: StateType) -> State[Any]:
    return State(type=kind, timestamp=datetime.now(UTC))  # its own clock takes as long as all the rest of it


def _seconds_between(before: State[Any] | None, state: State[Any]) -> float:
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


def _log_failure(logger: Logger, error: Exception, exhausted: str) -> None:
    message = "Task run failed with exception: %s%s"
    what = str(error) if isinstance(error, HandlerRaisedError) else repr(error)
    shown = trim(error)
    trace = "".join(format_exception(*shown)) if shown else ""
    printable = trace.encode("utf-8", "backslashreplace").decode()
    if trace == printable:
        logger.error(message, what, exhausted, exc_info=shown)
    else:
        # Half a character: Prefect's handler can't send it, prints that it can't, and `print` is a log here, for ever.
        logger.error(f"{message}\n%s", what, exhausted, printable)


def _make_failed(error: Exception) -> State[Any]:
    if isinstance(error, TimeoutError):
        return Failed(name=StateName.TIMED_OUT, data=error, message=f"Task run failed due to timeout: {error!r}")
    if isinstance(error, ReturnedStateError):
        return Failed(name=error.state_name, data=error, message=error.reason)
    state: State[Any] = Failed(data=error, message=f"Task run encountered an exception {describe(error)}")
    state.state_details.retriable = False  # as Prefect has it: what is tried again, we decide
    return state


async def _may_be_retried(task: StepTask, task_run: TaskRun, state: State[Any]) -> bool:
    condition: Any = task.retry_condition_fn
    return condition is None or bool(await condition(task, task_run, state))


def _find_delay(task: StepTask, retries: int) -> float:
    """Return the seconds before the next attempt, after so many retries."""
    delays = _get_delays(task)
    delay = delays[min(retries, len(delays) - 1)] if delays else 0
    if task.retry_jitter_factor and delay > 0:
        return clamped_poisson_interval(delay, clamping_factor=task.retry_jitter_factor)
    return delay


def _get_delays(task: StepTask) -> list[Any]:
    assert isinstance(task.retry_delay_seconds, list)  # as `set_policy` has it
    return task.retry_delay_seconds


@lru_cache
def _make_policy(retries: int, delays: tuple[Any, ...], jitter_factor: float | None) -> TaskRunPolicy:
    return TaskRunPolicy(retries=retries, retry_delay=[*delays], retry_jitter_factor=jitter_factor)


def _get_client(context: FlowRunContext) -> PrefectClient:
    assert isinstance(context.client, PrefectClient)  # its flow is async
    return context.client


def _to_time(state: State[Any]) -> DateTime:
    return cast("DateTime", state.timestamp)  # it is one: Prefect's types say less
