"""One process for one machine: a bridge, and Prefect's flow runs, each in a process of its own."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import anyio
from anyio.abc import TaskGroup
from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import Abort, ObjectNotFound

# Not public, and what Prefect's own process worker is made of: the one place where pgflow-prefect uses it.
from prefect.runner._flow_run_executor import FlowRunExecutorContext
from prefect.runner._starter_engine import EngineCommandStarter
from prefect.states import Pending
from prefect.utilities.engine import propose_state

from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.bridge import Bridge
from pgflow_prefect.deployment.deployments import Deployed, Options, deploy, find_deployments
from pgflow_prefect.deployment.deployments.find import ask_prefect
from pgflow_prefect.errors import PgflowPrefectError, UsageError
from pgflow_prefect.execution.flow import find_run_id, read_run_id
from pgflow_prefect.execution.states import handed_back
from pgflow_prefect.models import Held, WorkflowDefinition
from pgflow_prefect.workflow import Workflow, to_flow_name

QUERY_INTERVAL = 1.0
"""Seconds between two looks at what Prefect has scheduled."""

_PAUSE = 0.1  # seconds between two looks whether a process is left

_KILL_AFTER = 1.0  # seconds that a process gets once it is told to end; a second signal ends this one after three

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """A workflow that is served.

    Attributes:
        workflow: the handlers.
        source: the file or module that they were loaded from.
        definition: the workflow as the database defines it.
    """

    workflow: Workflow
    source: str
    definition: WorkflowDefinition


async def deploy_served(
    store: Store, client: PrefectClient, served: Sequence[Served], options: Options
) -> dict[UUID, Flow[..., Any]]:
    """Create or update the deployment of each workflow, and enable those that were never enabled or disabled.

    Returns:
        The flows, by the id of their deployment.

    Raises:
        UsageError: a deployment has a work pool: that pool's workers execute its flow runs, and nobody else is to.
        PrefectUnavailableError: Prefect does not answer.
        PrefectRefusedError: Prefect refuses a deployment.
    """
    await _refuse_work_pools(client, served)
    installation = await store.read_installation()
    known = await store.list_enabled()
    flows: dict[UUID, Flow[..., Any]] = {}
    for each in served:
        deployed = await deploy(
            client, each.workflow, each.definition, each.source, options=options, installation=installation
        )
        flows[deployed.id] = each.workflow.flow
        _log_deployed(deployed)
        if deployed.workflow_slug not in known:
            await store.enable_workflow(deployed.workflow_slug)
    return flows


async def _refuse_work_pools(client: PrefectClient, served: Sequence[Served]) -> None:
    names = [to_flow_name(each.workflow.slug) for each in served]
    chosen = (await find_deployments(client, names)).chosen
    for name, deployment in chosen.items():
        if (pool := deployment.work_pool_name) is not None:
            raise UsageError(
                f"deployment {name}/{deployment.name} has the work pool {pool!r}, whose workers execute its flow runs: "
                f"start one with `prefect worker start --pool {pool}` and hand them runs with `pgflow-prefect bridge`, "
                "or take the pool from the deployment in Prefect"
            )


def _log_deployed(deployed: Deployed) -> None:
    where = f": {deployed.url}" if deployed.url else ""
    _logger.info("%s deployment %s%s", deployed.outcome, deployed.name, where)


@dataclass
class FlowRunProcesses:
    """Executes what Prefect has scheduled for some deployments: each flow run in a process of its own.

    Attributes:
        store: the database.
        flows: by the id of their deployment.
        limit: processes at the same time.
    """

    store: Store
    flows: Mapping[UUID, Flow[..., Any]]
    limit: int
    _draining: anyio.Event = field(default_factory=anyio.Event, init=False)
    _executing: set[UUID] = field(default_factory=set, init=False)
    _stopped: bool = field(default=False, init=False)

    @property
    def busy(self) -> int:
        """How many there are now."""
        return len(self._executing)

    async def run(self) -> None:
        """Execute flow runs until `drain`, and return when the last one has ended."""
        async with FlowRunExecutorContext() as self._context, anyio.create_task_group() as group:
            while not self._draining.is_set():
                try:
                    await self._take_scheduled(group)
                except PgflowPrefectError as error:
                    _logger.warning("not watching Prefect's schedule: %s", error)
                with anyio.move_on_after(QUERY_INTERVAL):
                    await self._draining.wait()

    def drain(self) -> None:
        """Begin no further flow run."""
        self._draining.set()

    async def stop(self) -> None:
        """End all processes, and return when there are none: those that do not end when they are told are killed."""
        self.drain()
        self._stopped = True
        while self.busy:  # some may be about to start
            async with anyio.create_task_group() as group:
                for flow_run_id in self._context.process_manager.flow_run_ids():
                    group.start_soon(self._end, flow_run_id)
            await anyio.sleep(_PAUSE)

    async def _end(self, flow_run_id: UUID) -> None:
        # Prefect's engine leaves the flow run's state to us then.
        await self._context.control_channel.signal(flow_run_id, "relinquish")
        await self._context.process_manager.kill(flow_run_id, _KILL_AFTER)

    async def _take_scheduled(self, group: TaskGroup) -> None:
        free = self.limit - self.busy
        if free <= 0:
            return
        with ask_prefect("a look at what is scheduled"):
            scheduled = await self._context.client.get_scheduled_flow_runs_for_deployments(
                [*self.flows], scheduled_before=datetime.now(UTC), limit=free
            )
        for flow_run in scheduled:
            if self._draining.is_set():
                return
            if flow_run.id not in self._executing and await self._claim(flow_run):
                self._executing.add(flow_run.id)
                group.start_soon(self._execute, flow_run)

    async def _claim(self, flow_run: FlowRun) -> bool:
        """Move a flow run to Pending, which only one process can."""
        with ask_prefect(f"flow run {flow_run.name}"):
            try:
                state = await propose_state(self._context.client, Pending(), flow_run_id=flow_run.id)
            except (Abort, ObjectNotFound):
                return False
        return state.is_pending()

    async def _execute(self, flow_run: FlowRun) -> None:
        assert flow_run.deployment_id is not None
        flow = self.flows[flow_run.deployment_id]

        async def find_flow(_: FlowRun) -> Flow[..., Any]:
            return flow

        # A group of its own: Ctrl-C is for us, and what works goes on to its end.
        starter = EngineCommandStarter(control_channel=self._context.control_channel, isolate_process_group=True)
        executor = self._context.create_executor(flow_run, starter, resolve_flow=find_flow, propose_submitting=False)
        run_id = read_run_id(flow_run) or find_run_id(flow_run.id)
        _logger.info("run %s of flow %r, flow run %s", run_id, flow.name, flow_run.name)
        try:
            result = await executor.submit()
            _logger.info(
                "run %s of flow %r: its process has ended, code %s", run_id, flow.name, result and result.status_code
            )
            if self._stopped:
                await self._hand_back(flow_run, run_id)
        except Exception as error:  # noqa: BLE001  Prefect's own: the run is as far as PostgreSQL says
            _logger.warning("flow run %s of run %s: %s: %s", flow_run.id, run_id, type(error).__name__, error)
        finally:
            self._executing.discard(flow_run.id)

    async def _hand_back(self, flow_run: FlowRun, run_id: UUID) -> None:
        """Hand back a run whose process was ended, unless it had done so, or was through."""
        run = await self.store.read_run(run_id)
        if run.flow_run_id == flow_run.id and run.held is Held.LEASED:
            await self.store.release_run(run_id, run.epoch)
        state = handed_back(f"run {run_id} was handed back: the process ends")
        with ask_prefect(f"flow run {flow_run.name}"):
            try:
                await propose_state(self._context.client, state, flow_run_id=flow_run.id)
            except Abort:
                return  # it had come to its end


@dataclass
class Serving:
    """A bridge and the processes that do what it submits, as one service.

    Attributes:
        bridge: hands the runs that SQL starts to Prefect.
        processes: execute what Prefect has scheduled.
        grace: seconds that flow runs get to come to their end, once it drains.
    """

    bridge: Bridge
    processes: FlowRunProcesses
    grace: float
    _draining: anyio.Event = field(default_factory=anyio.Event, init=False)
    _stopping: anyio.Event = field(default_factory=anyio.Event, init=False)

    async def run(self) -> None:
        """Serve until `drain`, and return when no process is left."""
        async with anyio.create_task_group() as background:
            background.start_soon(self._limit_draining)
            async with anyio.create_task_group() as working:
                working.start_soon(self.bridge.run)
                working.start_soon(self.processes.run)
            background.cancel_scope.cancel()

    def drain(self) -> None:
        """Take nothing more; flow runs that are under way get some time to come to their end."""
        if not self._draining.is_set():
            _logger.info("draining: %d flow runs under way, for %g s at most", self.processes.busy, self.grace)
        self._draining.set()
        self.bridge.stop()
        self.processes.drain()

    def stop(self) -> None:
        """End the flow runs that are under way, too, and hand their runs back."""
        self.drain()
        self._stopping.set()

    async def _limit_draining(self) -> None:
        await self._draining.wait()
        with anyio.move_on_after(self.grace):
            await self._stopping.wait()
        await self.processes.stop()
