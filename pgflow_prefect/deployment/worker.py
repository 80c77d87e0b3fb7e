"""A process that executes runs itself: those that SQL started, and those that Prefect wants done."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

import anyio
from anyio.abc import TaskGroup
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import Abort, ObjectNotFound
from prefect.states import Pending
from prefect.utilities.engine import propose_state

from pgflow_prefect.database.notifications import Bell, listen
from pgflow_prefect.deployment.cancellation import CancelWishes
from pgflow_prefect.deployment.deployments import Deployed, register
from pgflow_prefect.deployment.intake import Intake
from pgflow_prefect.deployment.submission import create_submission
from pgflow_prefect.deployment.upkeep import keep_reconciled
from pgflow_prefect.errors import (
    DatabaseUnavailableError,
    DeploymentGoneError,
    PgflowPrefectError,
    PrefectRefusedError,
    PrefectUnavailableError,
)
from pgflow_prefect.execution.flow import find_run_id
from pgflow_prefect.execution.host import Host
from pgflow_prefect.execution.in_process import execute_flow_run
from pgflow_prefect.execution.prefect_errors import translate_prefect_errors
from pgflow_prefect.models import CANCELLED, Held, TakenRun
from pgflow_prefect.workflow import AsyncFlow, Workflow

POLL_INTERVAL = 2.0
"""Seconds between two looks at what somebody pressed in Prefect's UI. Its events may get lost; this decides."""

_logger = logging.getLogger(__name__)


@dataclass
class Worker:
    """Executes runs of some workflows, so many at a time.

    Attributes:
        host: this process.
        client: Prefect's API.
        workflows: what it has handlers for, by slug, and where each was found.
        concurrency: runs at the same time.
        adopt: take pending runs that are older than their workflow's enabling, too.
    """

    host: Host
    client: PrefectClient
    workflows: Mapping[str, tuple[Workflow, str]]
    concurrency: int
    adopt: bool
    deployments: dict[str, Deployed] = field(default_factory=dict, init=False)
    _executing: dict[UUID, UUID] = field(default_factory=dict, init=False)  # runs by flow run
    _flows: dict[str, AsyncFlow] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        settings = self.host.settings
        self.intake = Intake(
            store=self.host.store,
            handle=self._execute_taken,
            slots=self.concurrency,
            sweep_interval=settings.sweep_interval,
            adopt=self.adopt,
            workflow_slugs=[*self.workflows],
            bell=Bell(),
        )
        self._wishes = CancelWishes(self.host.store, self.client)
        self._reconcile_bell = Bell()
        self._flows = {
            slug: workflow.make_flow(settings, host=self.host) for slug, (workflow, _) in self.workflows.items()
        }

    async def register(self) -> None:
        """Create or update the deployment of each workflow, and enable those that were never enabled or disabled.

        Raises:
            UnknownWorkflowError: the database does not define one of them.
            PrefectUnavailableError: Prefect does not answer.
        """
        known = await self.host.store.list_enabled()
        for slug in self.workflows:
            await self._deploy(slug)
            if slug not in known:
                await self.host.store.enable_workflow(slug)

    async def run(self) -> None:
        """Work until `drain`, and return when what was under way has come to its end."""
        settings = self.host.settings
        async with anyio.create_task_group() as background:
            background.start_soon(self._listen)
            background.start_soon(self._watch_prefect, background)
            background.start_soon(self._reconcile, settings.reconcile_interval)
            async with anyio.create_task_group() as executing:
                await self.intake.run(executing)
                _logger.info("draining: %d runs under way", self.intake.busy)
            background.cancel_scope.cancel()

    def drain(self) -> None:
        """Take nothing more, let the steps that are under way finish, and hand their runs back."""
        self.intake.stop()
        self.host.drain()

    def stop(self) -> None:
        """Stop what is under way, too, and hand its runs back."""
        self.drain()
        self.host.stop()

    # What runs all the time

    async def _listen(self) -> None:
        await listen(self.host.dsn, self.intake.bell, connect_timeout=self.host.settings.connect_timeout)

    async def _reconcile(self, interval: float) -> None:
        await keep_reconciled(self.host.store, self.client, self._reconcile_bell, interval)

    async def _watch_prefect(self, group: TaskGroup) -> None:
        while True:
            try:
                deployments = [each.id for each in self.deployments.values()]
                for flow_run in await self._wishes.find(deployments, [*self._executing]):
                    if (run_id := self._executing.get(flow_run.id)) is None:
                        await self._wishes.fulfil(flow_run)
                    else:
                        await self._cancel(run_id)
                if self.intake.free and not self.intake.stopped:
                    await self._take_scheduled(group)
            except (PrefectUnavailableError, PrefectRefusedError, DatabaseUnavailableError) as error:
                _logger.warning("not watching Prefect: %s", error)
            await anyio.sleep(POLL_INTERVAL)

    async def _take_scheduled(self, group: TaskGroup) -> None:
        """Execute what Prefect has scheduled, a Run, a Retry or a schedule, unless a work pool is to do it."""
        ours = {each.id: slug for slug, each in self.deployments.items() if each.work_pool is None}
        if not ours:
            return
        with translate_prefect_errors():
            scheduled = await self.client.get_scheduled_flow_runs_for_deployments(
                [*ours], scheduled_before=datetime.now(UTC), limit=self.intake.free
            )
        for flow_run in scheduled:
            if flow_run.id not in self._executing and await self._claim(flow_run):
                assert flow_run.deployment_id is not None
                group.start_soon(self._execute_scheduled, ours[flow_run.deployment_id], flow_run)

    async def _claim(self, flow_run: FlowRun) -> bool:
        """Move a flow run to Pending, which only one worker can."""
        with translate_prefect_errors():
            try:
                state = await propose_state(self.client, Pending(), flow_run_id=flow_run.id)
            except (Abort, ObjectNotFound):
                return False
        return state.is_pending()

    # One run

    async def _execute_taken(self, taken: TakenRun) -> None:
        store = self.host.store
        try:
            if await self._wishes.was_cancelled(taken.former_flow_run_id):
                await store.cancel_run(taken.run_id, f"{CANCELLED} in Prefect")
                return
            deployment = self.deployments[taken.workflow_slug]
            flow_run = await create_submission(self.client, deployment.id, taken, Pending())
        except PrefectRefusedError as error:
            await store.cancel_run(taken.run_id, str(error))
            return
        except DeploymentGoneError:
            await store.release_run(taken.run_id, taken.epoch)
            await self._deploy(taken.workflow_slug)
            return
        except PrefectUnavailableError:
            await store.release_run(taken.run_id, taken.epoch)
            raise
        if await store.link_flow_run(taken.run_id, taken.epoch, flow_run.id, queued=False):
            _logger.info("run %s of %r, flow run %s", taken.run_id, taken.workflow_slug, flow_run.name)
            if taken.former_flow_run_id is not None:
                self._reconcile_bell.ring()  # it may still be shown as running
            await self._execute(taken.workflow_slug, flow_run, taken.run_id)

    async def _execute_scheduled(self, slug: str, flow_run: FlowRun) -> None:
        with self.intake.slot():
            given = flow_run.parameters.get("run_id")
            run_id = UUID(str(given)) if given else find_run_id(flow_run.id)
            _logger.info("run %s of %r, flow run %s, scheduled by Prefect", run_id, slug, flow_run.name)
            await self._execute(slug, flow_run, run_id)

    async def _execute(self, slug: str, flow_run: FlowRun, run_id: UUID) -> None:
        self._executing[flow_run.id] = run_id
        try:
            state = await execute_flow_run(self._flows[slug], flow_run)
            _logger.info("run %s of %r: %s", run_id, slug, state.name)
        except Exception as error:  # noqa: BLE001  Prefect's own: the run is as far as PostgreSQL says
            _logger.warning("flow run %s of run %s broke off: %s", flow_run.id, run_id, _describe(error))
            self._reconcile_bell.ring()
            await self._release(run_id, flow_run.id)
        finally:
            del self._executing[flow_run.id]

    async def _release(self, run_id: UUID, flow_run_id: UUID) -> None:
        """Hand a run back that nobody executes here any more."""
        try:
            run = await self.host.store.read_run(run_id)
            if run.flow_run_id == flow_run_id and run.held is Held.LEASED:
                await self.host.store.release_run(run_id, run.epoch)
        except PgflowPrefectError as error:
            _logger.warning("run %s could not be handed back: %s", run_id, error)  # its lease runs out

    async def _cancel(self, run_id: UUID) -> None:
        await self.host.store.cancel_run(run_id, f"{CANCELLED} in Prefect")
        self.host.end(run_id)

    async def _deploy(self, slug: str) -> None:
        workflow, source = self.workflows[slug]
        definition = await self.host.store.load_definition(slug)
        self.deployments[slug] = await register(self.client, workflow, definition, source)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
