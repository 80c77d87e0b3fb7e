"""Executes one run of a workflow as one flow run of Prefect."""

import logging
import math
from asyncio import get_running_loop
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

from anyio import CancelScope, current_effective_deadline, current_time, get_cancelled_exc_class, move_on_after
from prefect import Flow, get_run_logger
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectSignal, TerminationSignal
from prefect.states import Cancelled, Crashed
from pydantic import JsonValue
from pydantic_core import to_json

from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.graph import Graph, build_graph, find_leaves, find_problems
from pgflow_prefect.definitions.maps import find_map_problems
from pgflow_prefect.errors import (
    DatabaseUnavailableError,
    InvalidDefinitionError,
    PgflowPrefectError,
    RunFailedError,
    RunHeldError,
    SupersededError,
    TransientError,
    UsageError,
)
from pgflow_prefect.execution.flow_hooks import run_cancellation_hooks
from pgflow_prefect.execution.flow_names import find_naming, name_by_values, needs_payload, needs_values
from pgflow_prefect.execution.payloads import check_payload
from pgflow_prefect.execution.process.host import ActiveRun, Host, Stop
from pgflow_prefect.execution.process.prewarmed_host import open_host_for_run
from pgflow_prefect.execution.reporting.console_logs import clean_consoles
from pgflow_prefect.execution.reporting.display import Display
from pgflow_prefect.execution.reporting.events import RunEvents
from pgflow_prefect.execution.reporting.handler_logs import show_logs
from pgflow_prefect.execution.reporting.task_runs import make_task_runs
from pgflow_prefect.execution.reporting.tracebacks import trim_tracebacks
from pgflow_prefect.execution.run_executor import RunExecutor, find_submitted
from pgflow_prefect.execution.scheduled_payloads import find_schedule_id, read_scheduled
from pgflow_prefect.execution.scheduler import Schedule, run_in_order
from pgflow_prefect.execution.step_writer import StepWriter, persist
from pgflow_prefect.execution.task_runner import open_task_runner
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.models import RunEnd, Status
from pgflow_prefect.prefect_api.event_sender import find_outbox
from pgflow_prefect.prefect_api.ids import TaskRunIds, find_run_id
from pgflow_prefect.prefect_api.ownership import find_foreign_tags
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.prefect_api.schedules import find_due_before, find_logical_date
from pgflow_prefect.prefect_api.states import handed_back, is_cancelled, superseded
from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.settings import Settings
from pgflow_prefect.state_names import Observer, StateName

T = TypeVar("T")

_logger = logging.getLogger(__name__)


_RELEASE_TIMEOUT = 2.0  # seconds


@dataclass(frozen=True)
class _TimeOut:
    """The time-out of a flow run. Prefect's engine cancels the flow's function when it is over.

    Attributes:
        seconds: the flow's time-out; None for no time-out.
        deadline: by the event loop's clock.
    """

    seconds: float | None
    deadline: float

    @classmethod
    def find(cls, context: FlowRunContext) -> "_TimeOut":
        """Return the time-out of the flow run whose function begins now."""
        seconds = context.flow.timeout_seconds if context.flow is not None else None
        return cls(seconds, math.inf if seconds is None else current_effective_deadline())

    @property
    def is_over(self) -> bool:
        return current_time() >= self.deadline


@dataclass(frozen=True)
class Execution:
    """Executes runs of one workflow.

    Attributes:
        workflow_slug: the workflow.
        handlers: the handlers that may do the work, by step slug; a step without one is external.
        settings: the database, and the limits.
        observe: called with every state that a step enters.
        host: the process, if it executes several runs; otherwise this run opens a host of its own.
    """

    workflow_slug: str
    handlers: Mapping[str, StepHandlers]
    settings: Settings
    observe: Observer
    host: Host | None = None

    async def execute(
        self, payload: JsonValue, run_id: UUID | None, schedule_id: UUID | None = None
    ) -> dict[str, JsonValue] | State[Any]:
        """Execute a run in the current flow run: a new one with this payload, or the one with this id.

        Args:
            payload: of a new run.
            run_id: of a run that exists.
            schedule_id: of the row with the payload of a new run, which counts before `payload`.

        Returns:
            The results of the leaf steps by slug, or another state for the flow run to end in.

        Raises:
            RunFailedError: the run has failed.
            UsageError: there is no such workflow or run, or the run can't be executed.
        """
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        flow_run = context.flow_run
        trim_tracebacks()
        clean_consoles()
        limit = _TimeOut.find(context)
        if run_id is None:  # else it is a parameter of the flow run
            what = (find_run_id(flow_run.id), self.workflow_slug)
            # A log line takes half as long as opening the database. So it is written during that.
            get_running_loop().call_soon(partial(get_run_logger().info, "Run %s of workflow %r", *what))
        show_logs(each.function.function for each in self.handlers.values() if each.function)
        try:
            async with self._open_host() as host:
                _check_installation(flow_run, host.installation.id)
                begun = host.begin(run_id, flow_run.id) if run_id is not None else None
                epoch, linked = begun or (None, None)
                if epoch is None:
                    epoch = await self._take(host.store, payload, run_id, schedule_id, flow_run)
                run_id = run_id or find_run_id(flow_run.id)
                if epoch is None:
                    return await self._read_ended(host.store, run_id)
                with host.execute(run_id, epoch, flow_run.id, linked) as run:
                    return await self._execute_in_time(host, run, flow_run, limit)
        except (SupersededError, RunHeldError) as error:
            get_run_logger().warning("%s", error)
            return superseded(str(error))
        except DatabaseUnavailableError as error:
            # The run stays pending for its next owner, as if this process had died.
            return Crashed(message=str(error))

    async def _execute_in_time(
        self, host: Host, run: ActiveRun, flow_run: FlowRun, limit: "_TimeOut"
    ) -> dict[str, JsonValue] | State[Any]:
        try:
            end = await self._execute(host, run, flow_run)
        except get_cancelled_exc_class():
            if limit.is_over and run.stopped is None:
                reason = f"the flow took longer than {limit.seconds:g} s"
                if await _end_late(host.store, run, reason):
                    self._tell_of_failure(host, run.run_id, flow_run, reason)
            raise
        if isinstance(end, State) and is_cancelled(end):
            await run_cancellation_hooks(end)
        return end

    @asynccontextmanager
    async def _open_host(self) -> AsyncIterator[Host]:
        if self.host is not None:
            yield self.host
            return
        async with open_host_for_run(self.settings) as host:
            yield host

    async def _name(self, host: Host, run_id: UUID, flow_run: FlowRun) -> None:
        """Name the flow run after its run's payload, if the user's flow says so."""
        naming = find_naming(_find_flow())
        if naming is None or not needs_values(naming) or run_id in host.unshown:
            return
        values = {"run_id": RawJson.of(str(run_id))}
        if needs_payload(naming):
            run = await self._persist(host.store, lambda: host.store.read_run(run_id, with_payload=True))
            values["payload"] = run.payload or RawJson("null")
        await name_by_values(naming, flow_run, self.handlers.values(), values, find_outbox())

    def _tell_of_failure(self, host: Host, run_id: UUID, flow_run: FlowRun, message: str | None) -> None:
        """Send the event of a failed run of which there is no other display."""
        if _is_tried_again(flow_run) or run_id in host.unshown:
            return
        find = TaskRunIds(flow_run.id).find
        events = RunEvents(run_id, self.workflow_slug, flow_run, find, host.settings.events, find_outbox())
        events.tell_of_run(StateName.FAILED, message=message)

    async def _persist(self, store: Store, statement: Callable[[], Awaitable[T]]) -> T:
        return await persist(store, self.settings.report_timeout, statement, f"workflow {self.workflow_slug}")

    async def _take(
        self, store: Store, payload: JsonValue, run_id: UUID | None, schedule_id: UUID | None, flow_run: FlowRun
    ) -> int | None:
        """Become the run's owner, and return the epoch; None if the run has ended. Without an id, create the run."""
        if run_id is None:
            raw, run_id = RawJson(to_json(payload).decode()), find_run_id(flow_run.id)
            if schedule_id is None and flow_run.deployment_id is not None:
                patience = self.settings.report_timeout
                find = partial(find_schedule_id, store, _get_client(), flow_run, self.workflow_slug, patience)
                schedule_id = await self._persist(store, find)
            if schedule_id is not None:
                read = partial(read_scheduled, store, self.workflow_slug, schedule_id, run_id)
                raw = await self._persist(store, read)
            await self._persist(store, lambda: check_payload(store, self.workflow_slug, self.handlers, raw))
            logical_date = find_logical_date(flow_run)
            create = partial(
                store.create_run,
                self.workflow_slug,
                raw.text,
                run_id,
                flow_run.id,
                logical_date=logical_date,
                interval_start=None if logical_date is None else await _find_interval_start(flow_run),
            )
            epoch = await self._persist(store, create)
        else:
            given = run_id
            run = await self._persist(store, lambda: store.read_run(given))
            if run.workflow_slug != self.workflow_slug:
                raise UsageError(f"run {run_id} is one of workflow {run.workflow_slug!r}, not {self.workflow_slug!r}")
            if self._is_requested(flow_run):
                await self._check_request(store, given, flow_run.id)
            _tell_of_past(run.steps, run.remaining)
            epoch = await self._persist(store, lambda: store.take_run(given, flow_run.id))
        if epoch is None and flow_run.run_count > 1:  # the flow run failed before, and Prefect tries it again
            epoch = await self._persist(store, lambda: self._reopen(store, run_id, flow_run.id))
        return epoch

    def _is_requested(self, flow_run: FlowRun) -> bool:
        """Tell whether a user of Prefect asks for the run, and not this process with its rights in the database."""
        return flow_run.deployment_id is not None if self.host is None else flow_run.id in self.host.requested

    async def _check_request(self, store: Store, run_id: UUID, flow_run_id: UUID) -> None:
        """Refuse a run that a user of Prefect named if this flow run was not made for it.

        Raises:
            UsageError: it was taken before, or its workflow is not enabled.
        """
        if not await self._persist(store, lambda: store.is_made_for(run_id, flow_run_id)):
            raise UsageError(
                f"this flow run was not made for run {run_id}: the run was taken before, or its workflow is not "
                f"enabled. Go on with `pgflow-prefect retry {run_id}`"
            )

    async def _reopen(self, store: Store, run_id: UUID, flow_run_id: UUID) -> int | None:
        run = await store.read_run(run_id)
        if run.status is Status.COMPLETED:
            return None
        if run.is_cancelled:
            get_run_logger().warning(
                "Run %s was cancelled, and Retry does not reopen it: `pgflow-prefect retry %s` does", run_id, run_id
            )
            return None
        await store.reopen_run(run_id)
        return await store.take_run(run_id, flow_run_id)

    async def _execute(self, host: Host, run: ActiveRun, flow_run: FlowRun) -> dict[str, JsonValue] | State[Any]:
        store = host.store
        try:
            await self._name(host, run.run_id, flow_run)
            graph, display = await self._run_steps(host, run, flow_run)
            end = await self._persist(store, lambda: host.read_end(run, find_leaves(graph)))
            if end.status is Status.PENDING and end.epoch == run.epoch:
                await self._leave(store, run)
            if display is not None:
                host.finish(display.show_end(end, is_tried_again=_is_tried_again(flow_run)))
            elif end.status is Status.FAILED and not end.is_cancelled and end.epoch == run.epoch:
                self._tell_of_failure(host, run.run_id, flow_run, end.error_message)
            return _conclude(end, run)
        except (get_cancelled_exc_class(), TerminationSignal, PrefectSignal):
            await _release(store, run)
            raise

    async def _leave(self, store: Store, run: ActiveRun) -> None:
        """Hand back a pending run: now, or to be taken again after a while if PostgreSQL refuses to note something."""
        if run.refusal is not None:
            await self._persist(store, lambda: _put_off(store, run))
        elif run.drained:
            await self._persist(store, lambda: store.release_run(run.run_id, run.epoch))

    async def _run_steps(self, host: Host, run: ActiveRun, flow_run: FlowRun) -> tuple[Graph, Display | None]:
        """Execute the rest of the run, and return its graph and its display.

        If the handlers do not fit the run, it fails and has no display.
        """
        store, run_id = host.store, run.run_id
        plan = await self._persist(store, lambda: host.load_plan(run))
        definition, graph = plan.definition, plan.graph
        if run.linked is not None:
            _tell_of_past(len(definition.steps), run.linked.remaining)
        arguments = {slug: each.function.required for slug, each in self.handlers.items() if each.function}
        problems = find_problems(definition, arguments)
        is_map = {slug: each.function.is_map for slug, each in self.handlers.items() if each.function}
        problems += find_map_problems(definition, is_map)
        if problems:
            reason = str(InvalidDefinitionError(self.workflow_slug, problems))
            await self._persist(store, lambda: _fail(store, run, reason))
            return graph, None
        async with (
            open_task_runner() as task_runner,
            host.batch.open(run_id, run.epoch) as batch,
        ):
            submitted: frozenset[str] = frozenset()
            if task_runner is not None:
                submitted = await self._persist(store, lambda: find_submitted(host, self.workflow_slug, self.handlers))
            unshown = host.unshown.get(run_id)
            tags = {tag for each in self.handlers.values() for tag in each.task_options.tags}
            task_runs = await make_task_runs(unshown.sender if unshown is not None else None, tags)
            task_run_ids = TaskRunIds(flow_run.id)
            display = Display(
                settings=host.settings,
                store=store,
                installation=host.installation.id,
                run_id=run_id,
                epoch=run.epoch,
                workflow_slug=self.workflow_slug,
                flow_run=flow_run,
                graph=graph,
                task_run_ids=task_run_ids,
                event_sender=task_runs.event_sender,
                observer=self.observe,
                is_named=find_naming(_find_flow()) is not None,
            )
            steps = RunExecutor(
                handlers=self.handlers,
                workflow_slug=self.workflow_slug,
                schedule=Schedule(graph, run.turns, continues=definition.continues),
                host=host,
                run=run,
                flow_run=flow_run,
                writer=StepWriter(store, run_id, run.epoch, self.settings.report_timeout, batch),
                observe=display.observe,
                task_runs=task_runs,
                task_run_ids=task_run_ids,
                submitted=submitted,
                task_runner=task_runner,
                maps=definition.maps,
                notice=display.notice_map,
            )
            if unshown is not None:
                unshown.begin(task_runs)
            if definition.uses_rules:
                steps.follow_rules()
            with display.show():
                await run_in_order(steps.schedule, steps.perform)
            run.result_sizes = batch.sizes
        return graph, display

    async def _read_ended(self, store: Store, run_id: UUID) -> dict[str, JsonValue] | State[Any]:
        """Return the end of a flow run that began after its run had ended."""
        end = await self._persist(store, lambda: store.read_end(run_id, []))
        if end.status is Status.COMPLETED:
            graph = build_graph(await self._persist(store, lambda: store.load_run_definition(run_id)))
            end = await self._persist(store, lambda: store.read_end(run_id, find_leaves(graph)))
        return _conclude(end)


def _find_flow() -> Flow[..., Any] | None:
    """Return the flow of the current flow run."""
    context = FlowRunContext.get()
    return context.flow if context is not None else None


def _is_tried_again(flow_run: FlowRun) -> bool:
    """Tell whether Prefect tries the flow run again if it fails now."""
    flow = _find_flow()
    return flow is not None and flow_run.run_count <= (flow.retries or 0)


def _get_client() -> PrefectClient:
    context = FlowRunContext.get()
    assert context is not None
    assert isinstance(context.client, PrefectClient)  # its flow is async
    return context.client


def _check_installation(flow_run: FlowRun, installation: UUID) -> None:
    """Refuse a flow run of another database.

    Raises:
        UsageError: its tags name another installation.
    """
    if foreign := find_foreign_tags(flow_run.tags, installation):
        raise UsageError(
            f"flow run {flow_run.name!r} belongs to another installation ({', '.join(foreign)}), and not to the "
            "database of this process: check PGFLOW_DSN and PGFLOW_BLOCK"
        )


def _tell_of_past(steps: int | None, remaining: int | None) -> None:
    """Log how many steps of a run were completed before."""
    if steps is not None and remaining is not None and remaining < steps:
        done = steps - remaining
        get_run_logger().info("%d of %d steps were completed before and are not executed again", done, steps)


async def _find_interval_start(flow_run: FlowRun) -> datetime | None:
    """Return when the schedule of a flow run was due before; None where Prefect can't tell."""
    try:
        return await find_due_before(_get_client(), flow_run)
    except Exception as error:  # noqa: BLE001  the run begins with its date alone
        get_run_logger().warning("The data interval of the run is not known: %s", describe_error(error))
        return None


async def _fail(store: Store, run: ActiveRun, reason: str) -> None:
    """Fail a run, or note that PostgreSQL refuses that for good."""
    try:
        await store.fail_run(run.run_id, run.epoch, reason)
    except (TransientError, SupersededError):
        raise
    except PgflowPrefectError as error:
        run.refuse(None, f"PostgreSQL refuses to note that the run has failed: {error}")


async def _put_off(store: Store, run: ActiveRun) -> None:
    """Set a run aside, of which PostgreSQL refuses to note something."""
    refusal = run.refusal
    assert refusal is not None
    _logger.error("run %s is set aside: %s", run.run_id, refusal.reason)
    try:
        await store.put_off_held_run(run.run_id, run.epoch, refusal.step_slug, refusal.reason)
    except TransientError:
        raise
    except PgflowPrefectError as error:
        _logger.warning("run %s is kept until its lease runs out: %s", run.run_id, error)


async def _end_late(store: Store, run: ActiveRun, reason: str) -> bool:
    """Fail a run whose flow has timed out, and tell whether it has failed now.

    Prefect's engine shows the flow run as TimedOut.
    """
    with CancelScope(shield=True), move_on_after(_RELEASE_TIMEOUT):
        try:
            await _fail(store, run, reason)
            if run.refusal is not None:
                await _put_off(store, run)
            return (await store.read_run(run.run_id)).error_message == reason
        except Exception as error:  # noqa: BLE001  the flow must end with the error that ended the run
            _logger.warning("run %s is still pending after its time-out: %s", run.run_id, describe_error(error))
    return False


async def _release(store: Store, run: ActiveRun) -> None:
    """Release a run at once, so that its next owner need not wait for the lease to expire."""
    with CancelScope(shield=True), move_on_after(_RELEASE_TIMEOUT):
        try:
            await store.release_run(run.run_id, run.epoch)
        except Exception as error:  # noqa: BLE001  the flow must end with the error that ended the run
            _logger.warning("run %s is kept until its lease runs out: %s", run.run_id, describe_error(error))


def _conclude(end: RunEnd, active: ActiveRun | None = None) -> dict[str, JsonValue] | State[Any]:
    """Return the end of the flow run. PostgreSQL decides it, not what this process has seen.

    Args:
        end: the run's end in PostgreSQL.
        active: the run, if this process executed it.

    Raises:
        RunFailedError: the run has failed.
        SupersededError: another owner has it.
    """
    if active is not None and end.epoch != active.epoch:
        raise SupersededError(end.id)
    if end.status is Status.COMPLETED:
        return end.results
    if end.is_cancelled:
        return Cancelled(message=end.error_message)
    if end.status is Status.FAILED:
        # Raise it: Prefect would not retry a flow that returns a failed state.
        raise RunFailedError(end.id, end.error_message or "no reason given")
    if active is not None and active.refusal is not None:
        return Crashed(message=f"run {end.id} is set aside: {active.refusal.reason}")
    if active is not None and active.drained:
        return handed_back(f"run {end.id} was handed back: {Stop.SHUTDOWN}")
    return Crashed(message=f"run {end.id} is still pending: a step of it could not be claimed or reported")
