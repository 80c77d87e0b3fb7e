"""Executes the scheduled flow runs of some deployments, each in its own process."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self
from uuid import UUID

import anyio
from anyio.abc import TaskGroup
from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import Abort, ObjectNotFound
from prefect.states import Pending, Scheduled

from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import PgflowPrefectError, UnknownRunError, UsageError
from pgflow_prefect.models import Ending, Held, Status
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.ids import find_run_id, read_run_id
from pgflow_prefect.prefect_api.internals import propose_state
from pgflow_prefect.prefect_api.ownership import find_foreign_tags
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.prefect_api.runner_internals import (
    FlowRunExecutorContext,
    make_starter,
    read_exit_code,
    relinquish,
)
from pgflow_prefect.prefect_api.states import handed_back, is_cancelled

QUERY_INTERVAL = 1.0
"""Seconds between two looks at the scheduled flow runs."""

_ENGINE = "pgflow_prefect.services.flow_run_engine"

_PAUSE = 0.1  # seconds between two looks at the remaining processes

_KILL_AFTER = 1.0  # seconds that a process gets to end. A second signal ends this process after three

_logger = logging.getLogger(__name__)


class ExecutorContext(FlowRunExecutorContext):
    """Prefect's context, changed so that an error while cancelling one flow run does not end the others."""

    async def __aenter__(self) -> Self:
        """Enter the context, and replace the function that cancels a flow run."""
        await super().__aenter__()
        cancel = self._cancellation_manager.cancel_by_id

        # Prefect calls it in the task group around all flow runs. An exception would cancel all of them.
        async def cancel_if_possible(flow_run_id: UUID) -> None:
            while True:
                try:
                    await cancel(flow_run_id)
                except Exception as error:  # noqa: BLE001  whatever Prefect's client raises
                    _logger.warning("flow run %s could not be cancelled: %s", flow_run_id, describe_error(error))
                    # Prefect's observer reports each flow run only once, so this must try again.
                    if isinstance(error, ObjectNotFound) or self.process_manager.get(flow_run_id) is None:
                        return
                    await anyio.sleep(QUERY_INTERVAL)
                else:
                    return

        self._cancellation_manager.cancel_by_id = cancel_if_possible  # type: ignore[method-assign]
        return self


@dataclass
class FlowRunProcesses:
    """Executes the scheduled flow runs of some deployments, each in its own process.

    Attributes:
        store: the database.
        flows: the flows by the id of their deployment. The mapping may change.
        limit: how many processes run at the same time.
        environment: variables that a process gets in addition, or None for one that it does not inherit.
    """

    store: Store
    flows: Mapping[UUID, Flow[..., Any]]
    limit: int
    environment: Mapping[str, str | None] = field(default_factory=dict)
    _draining: anyio.Event = field(default_factory=anyio.Event, init=False)
    _executing: dict[UUID, Flow[..., Any]] = field(default_factory=dict, init=False)  # by flow run
    _stopped: bool = field(default=False, init=False)
    _foreign: set[UUID] = field(default_factory=set, init=False)  # scheduled, and of another installation

    @property
    def busy(self) -> int:
        """The number of processes now."""
        return len(self._executing)

    async def run(self) -> None:
        """Execute flow runs until `drain`, and return when the last one has ended."""
        async with ExecutorContext() as self._context, anyio.create_task_group() as group:
            while not self._draining.is_set():
                try:
                    await self._take_scheduled(group)
                except PgflowPrefectError as error:
                    _logger.warning("can't read Prefect's schedule: %s", error)
                with anyio.move_on_after(QUERY_INTERVAL):
                    await self._draining.wait()

    def drain(self) -> None:
        """Begin no further flow run."""
        self._draining.set()

    async def stop(self) -> None:
        """End all processes, and return when none is left. A process that does not end in time is killed."""
        self.drain()
        self._stopped = True
        while self.busy:  # some may be about to start
            async with anyio.create_task_group() as group:
                for flow_run_id in self._context.process_manager.flow_run_ids():
                    group.start_soon(self._end, flow_run_id)
            await anyio.sleep(_PAUSE)

    async def _end(self, flow_run_id: UUID) -> None:
        # after this, Prefect's engine leaves the flow run's state to us
        await relinquish(self._context.control_channel, flow_run_id)
        await self._context.process_manager.kill(flow_run_id, _KILL_AFTER)

    async def _take_scheduled(self, group: TaskGroup) -> None:
        flows, free = dict(self.flows), self.limit - self.busy
        if not flows or free <= 0:
            return
        with ask_prefect("a look at scheduled flow runs"):
            scheduled = await self._context.client.get_scheduled_flow_runs_for_deployments(
                [*flows], scheduled_before=datetime.now(UTC), limit=free + len(self._foreign)
            )
        installation = await self.store.read_installation()
        self._foreign = {each.id for each in scheduled if find_foreign_tags(each.tags, installation)}
        for flow_run in scheduled:
            if self._draining.is_set() or self.busy >= self.limit:
                return
            if flow_run.id in self._executing or flow_run.id in self._foreign or flow_run.deployment_id is None:
                continue
            self._executing[flow_run.id] = flows[flow_run.deployment_id]  # from here on, `stop` waits for it
            claimed = False
            try:
                claimed = await self._claim(flow_run)
            finally:
                if not claimed:
                    del self._executing[flow_run.id]
            if claimed:
                group.start_soon(self._execute, flow_run)

    async def _claim(self, flow_run: FlowRun) -> bool:
        """Move a flow run to Pending. Only one process succeeds."""
        with ask_prefect(f"flow run {flow_run.name}"):
            try:
                state = await propose_state(self._context.client, Pending(), flow_run_id=flow_run.id)
            except (Abort, ObjectNotFound):
                return False
        return state.is_pending()

    async def _execute(self, flow_run: FlowRun) -> None:
        run_id, flow_name = read_run_id(flow_run) or find_run_id(flow_run.id), self._executing[flow_run.id].name
        try:
            if not self._stopped:
                _logger.info("run %s of flow %r, flow run %s", run_id, flow_name, flow_run.name)
                code = await self._await_process(flow_run)
                level, outcome = await self._describe_outcome(flow_run.id, run_id)
                ended = f" (its process has ended with code {code})" if code else ""
                _logger.log(level, "run %s of flow %r: %s%s", run_id, flow_name, outcome, ended)
            if self._stopped:
                await hand_back(self.store, self._context.client, flow_run)
        except Exception as error:  # noqa: BLE001  Prefect's own: the run is as far as PostgreSQL says
            what = f"{type(error).__name__}: {describe_error(error)}"
            _logger.warning("flow run %s of run %s: %s", flow_run.id, run_id, what)
        finally:
            del self._executing[flow_run.id]

    async def _await_process(self, flow_run: FlowRun) -> int | None:
        """Start a flow run's process, and return its exit code when it has ended."""
        starter = make_starter(_ENGINE, self._context.control_channel, self.environment)
        executor = self._context.create_executor(
            flow_run, starter, resolve_flow=self._find_flow, propose_submitting=False
        )
        return read_exit_code(await executor.submit())

    async def _describe_outcome(self, flow_run_id: UUID, run_id: UUID) -> tuple[int, str]:
        """Return the log level and the outcome of a flow run, from PostgreSQL if possible, else from Prefect."""
        try:
            run = await self.store.read_run(run_id)
        except UnknownRunError:  # the process failed before it created the run
            run = None
        if run is not None and run.ended_as is not None:
            level, shown = logging.INFO, run.ended_as.capitalize()
            if run.ended_as is Ending.FAILED:
                level = logging.ERROR
            return level, shown if run.ended_as is Ending.COMPLETED else f"{shown}, {run.error_message}"
        with ask_prefect(f"flow run {flow_run_id}"):
            state = (await self._context.client.read_flow_run(flow_run_id)).state
        if state is None:
            return logging.INFO, "it is left as it is"
        level = logging.ERROR if state.is_failed() or state.is_crashed() else logging.INFO
        return level, f"{state.name}, {state.message}" if state.message else str(state.name)

    async def _find_flow(self, flow_run: FlowRun) -> Flow[..., Any]:
        # Look it up by id. To run the hooks of a cancelled flow run, Prefect asks for its flow later, when its process
        # may be gone.
        known = self._executing.get(flow_run.id)
        if known is None and flow_run.deployment_id is not None:
            known = self.flows.get(flow_run.deployment_id)
        if known is None:
            raise UsageError(f"flow run {flow_run.name} belongs to a deployment that is not served here")
        return known


async def hand_back(store: Store, client: PrefectClient, flow_run: FlowRun) -> None:
    """Hand back the run of a flow run whose process was stopped, unless the process did so itself or had finished.

    A flow run that had not begun its run is scheduled again, because no other process would know of it.

    Raises:
        DatabaseUnavailableError: PostgreSQL does not answer; the run's lease runs out.
        PrefectUnavailableError: Prefect does not answer.
        PrefectRefusedError: Prefect refuses it.
    """
    run_id = read_run_id(flow_run) or find_run_id(flow_run.id)
    state: State[Any] = handed_back(f"run {run_id} was handed back: the process ends")
    try:
        run = await store.read_run(run_id)
    except UnknownRunError:
        state = Scheduled(message="its process was ended before it had begun")
    else:
        if run.status is not Status.PENDING:
            return
        if run.flow_run_id == flow_run.id and run.held is Held.LEASED:
            await store.release_run(run_id, run.epoch)
        elif run.flow_run_id == flow_run.id and run.held is Held.QUEUED:
            state = Scheduled(message="its process was ended before it had begun")
    with ask_prefect(f"flow run {flow_run.name}"):
        try:
            present = (await client.read_flow_run(flow_run.id)).state
            if present is None or _is_decided(present):
                return
            await propose_state(client, state, flow_run_id=flow_run.id)
        except (Abort, ObjectNotFound):
            return  # it has ended, or a user has deleted it


def _is_decided(state: State[Any]) -> bool:
    """Tell whether a flow run has ended by itself, or was cancelled by a user."""
    return is_cancelled(state) or (state.is_final() and not state.is_crashed())
