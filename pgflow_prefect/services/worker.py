"""A process that executes runs: those that SQL started, and those that Prefect scheduled."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

import anyio
from anyio import CancelScope
from anyio.abc import TaskGroup
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import Abort, ObjectNotFound, PrefectSignal
from prefect.states import Pending, Running

from pgflow_prefect.database.notifications import listen
from pgflow_prefect.deployment.deployments import Deployed, register
from pgflow_prefect.deployment.deployments.find import find_flows
from pgflow_prefect.deployment.reconciliation.failures import make_teller
from pgflow_prefect.deployment.reconciliation.reconcile import GRACE
from pgflow_prefect.errors import (
    DeploymentGoneError,
    ForeignDeploymentError,
    ForeignInstallationError,
    PgflowPrefectError,
    PrefectRefusedError,
    PrefectUnavailableError,
)
from pgflow_prefect.execution.process.host import Host
from pgflow_prefect.execution.process.slots import Slot
from pgflow_prefect.execution.reporting.flow_runs import FlowRunEngine
from pgflow_prefect.execution.workflow_flow import AsyncFlow
from pgflow_prefect.models import CANCELLED, Held, TakenRun
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from pgflow_prefect.prefect_api.ids import find_run_id, read_run_id
from pgflow_prefect.prefect_api.internals import propose_state
from pgflow_prefect.prefect_api.ownership import find_foreign_tags
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.services.airflow import keep_following
from pgflow_prefect.services.airflow_shadows import AirflowShadows
from pgflow_prefect.services.backfills import keep_backfilling
from pgflow_prefect.services.cancellation import POLL_INTERVAL, CancellationRequests
from pgflow_prefect.services.heartbeat import Heartbeat
from pgflow_prefect.services.maintenance import keep_reconciled
from pgflow_prefect.services.recorder import Recorder
from pgflow_prefect.services.recording import RunRecorder
from pgflow_prefect.services.run_fetcher import RunFetcher
from pgflow_prefect.services.submission import create_submission
from pgflow_prefect.services.unshown_runs import UnshownRuns
from pgflow_prefect.waiting import Wakeup
from pgflow_prefect.workflow import Workflow, to_flow_name

_OWNERS_INTERVAL = 15.0  # seconds between two checks that the deployments still belong to this installation

_logger = logging.getLogger(__name__)


@dataclass
class Worker:
    """Executes runs of some workflows.

    Attributes:
        host: this process.
        client: Prefect's API.
        workflows: each workflow by slug, with the file or module of its handlers.
        concurrency: the most runs at the same time.
        adopt: also take pending runs that began before their workflow was enabled.
    """

    host: Host
    client: PrefectClient
    workflows: Mapping[str, tuple[Workflow, str]]
    concurrency: int
    adopt: bool
    deployments: dict[str, Deployed] = field(default_factory=dict, init=False)
    _executing: dict[UUID, UUID] = field(default_factory=dict, init=False)  # runs by flow run
    _flows: dict[str, AsyncFlow] = field(default_factory=dict, init=False)
    _foreign: set[UUID] = field(default_factory=set, init=False)  # scheduled flow runs of another installation
    _failure: ForeignInstallationError | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        settings = self.host.settings
        self.fetcher = RunFetcher(
            store=self.host.store,
            handle=self._execute_taken,
            slots=self.concurrency,
            sweep_interval=settings.sweep_interval,
            adopt=self.adopt,
            workflow_slugs=[*self.workflows],
            wakeup=Wakeup(),
            executing=self._list_executing,
        )
        self._cancellation_requests = CancellationRequests(self.host.store, self.client)
        self._heartbeat = Heartbeat(self.host.store, self.client)
        self._reconcile_wakeup = Wakeup()
        self._writer = FlowRunWriter(self.client)
        self._flows = {
            slug: workflow.make_flow(settings, host=self.host) for slug, (workflow, _) in self.workflows.items()
        }
        self._unshown_runs = self._make_unshown_runs()
        self._engines = {
            slug: FlowRunEngine(flow, self._writer, self.client, self.host.draining)
            for slug, flow in self._flows.items()
        }

    async def register(self) -> None:
        """Create or update the deployment of each workflow, and enable those that were never enabled or disabled.

        Raises:
            UnknownWorkflowError: the database does not define one of them.
            ForeignInstallationError: the database is a copy of another one that has been used with Prefect.
            ForeignDeploymentError: a deployment belongs to another installation.
            PrefectUnavailableError: Prefect does not answer.
        """
        await self._heartbeat.register()
        known = await self.host.store.list_enabled()
        for slug in self.workflows:
            await self._deploy(slug)
            if slug not in known:
                await self.host.store.enable_workflow(slug)

    async def run(self) -> None:
        """Work until `drain`, and return when the last run has ended here.

        Raises:
            ForeignInstallationError: another database has begun to use this one's id in Prefect.
        """
        settings = self.host.settings
        async with anyio.create_task_group() as background:
            background.start_soon(self._heartbeat.keep, self._give_up)
            background.start_soon(self._watch_owners)
            background.start_soon(self._listen)
            background.start_soon(self._watch_cancellations)
            background.start_soon(self._reconcile, settings.reconcile_interval)
            background.start_soon(keep_backfilling, self.host.store, settings.sweep_interval)
            background.start_soon(keep_following, self.host.store, self.client, settings)
            background.start_soon(self._make_shadows().run)
            background.start_soon(self._unshown_runs.recorder.run)
            async with anyio.create_task_group() as executing:
                executing.start_soon(self._watch_schedule, executing)
                await self.fetcher.run(executing)
                _logger.info("draining: %d runs under way", self.fetcher.busy)
            background.cancel_scope.cancel()
        await self._unshown_runs.recorder.close()
        if self._failure is not None:
            raise self._failure

    def drain(self) -> None:
        """Take no more runs, let working steps finish, and hand their runs back."""
        self.fetcher.stop()
        self.host.drain()

    def stop(self) -> None:
        """Take no more runs, stop the working steps, and hand their runs back."""
        self.drain()
        self.host.stop()

    def _make_shadows(self) -> AirflowShadows:
        return AirflowShadows(self.host, self.client, {slug: each for slug, (each, _) in self.workflows.items()})

    def _make_unshown_runs(self) -> UnshownRuns:
        def find_deployment(slug: str) -> UUID | None:
            return deployment.id if (deployment := self.deployments.get(slug)) is not None else None

        settings, host = self.host.settings, self.host
        recorded = {slug: workflow.record for slug, (workflow, _) in self.workflows.items()} | settings.recordings
        policies = {slug: each for slug, each in recorded.items() if each is not None and slug in self.workflows}
        if policies and not host.store.implementation.executes:
            _logger.warning("runs of the released pgflow are shown from their beginning: %s", ", ".join(policies))
            policies = {}
        runs = RunRecorder(host.store, self.client, self._writer, host.installation.id, settings, find_deployment)
        recorder = Recorder(
            runs,
            policies,
            list_slugs=lambda: [*self.deployments],
            executing=self._list_executing,
            restore=self._restore,
            interval=settings.reconcile_interval,
            grace=GRACE,
        )
        return UnshownRuns(host, self._flows, recorder, self._executing)

    # Background work

    async def _listen(self) -> None:
        await listen(self.host.dsn, self.fetcher.wakeup, connect_timeout=self.host.settings.connect_timeout)

    async def _reconcile(self, interval: float) -> None:
        with CancelScope() as self._reconciling:
            await keep_reconciled(
                self.host.store,
                self.client,
                self._reconcile_wakeup,
                interval,
                executing=self._list_executing,
                tell=make_teller(self.host.settings.events),
            )

    def _list_executing(self) -> set[UUID]:
        return {*self.host.executing, *self._executing.values()}

    def _give_up(self, error: ForeignInstallationError) -> None:
        self._failure = error
        self._reconciling.cancel()
        self.drain()

    async def _watch_owners(self) -> None:
        while True:
            await anyio.sleep(_OWNERS_INTERVAL)
            try:
                await self._look_for_owners()
            except PgflowPrefectError as error:
                _logger.warning("can't look at the deployments: %s", error)

    async def _look_for_owners(self) -> None:
        """Leave deployments that another installation has taken over. Deploy again those that it has given back."""
        names = {to_flow_name(slug): slug for slug in self.workflows}
        for name, deployment in (await find_flows(self.client, names)).own.items():
            slug = names[name]
            if find_foreign_tags(deployment.tags, self.host.installation.id):
                self._leave(slug)
            elif slug not in self.deployments:
                await self._deploy(slug)

    def _leave(self, slug: str) -> None:
        if self.deployments.pop(slug, None) is not None:
            _logger.error(
                "workflow %r: another installation has taken its deployment over, so its runs are not taken", slug
            )
        self.fetcher.workflow_slugs = [*self.deployments]

    async def _watch_cancellations(self) -> None:
        while True:
            try:
                deployments = [each.id for each in self.deployments.values()]
                for flow_run in await self._cancellation_requests.find(deployments, [*self._executing]):
                    if (run_id := self._executing.get(flow_run.id)) is None:
                        await self._cancellation_requests.fulfil(flow_run, self._find_slug(flow_run))
                    else:
                        await self._cancellation_requests.stop(self.host, run_id, flow_run)
            except PgflowPrefectError as error:
                _logger.warning("can't look for cancelled flow runs: %s", error)
            await anyio.sleep(POLL_INTERVAL)

    def _find_slug(self, flow_run: FlowRun) -> str | None:
        return next((slug for slug, each in self.deployments.items() if each.id == flow_run.deployment_id), None)

    async def _watch_schedule(self, group: TaskGroup) -> None:
        while not self.fetcher.stopped:
            try:
                await self._take_scheduled(group)
            except PgflowPrefectError as error:
                _logger.warning("can't look at Prefect's schedule: %s", error)
            with anyio.move_on_after(POLL_INTERVAL):
                await self.fetcher.stopping.wait()

    async def _take_scheduled(self, group: TaskGroup) -> None:
        """Execute the flow runs that Prefect scheduled: by Run, by Retry, by a schedule. Leave those of work pools."""
        ours = {each.id: slug for slug, each in self.deployments.items() if each.work_pool is None}
        if not ours or not self.fetcher.free:
            return
        with ask_prefect("a look at scheduled flow runs"):
            scheduled = await self.client.get_scheduled_flow_runs_for_deployments(
                [*ours], scheduled_before=datetime.now(UTC), limit=self.fetcher.free + len(self._foreign)
            )
        self._foreign = {each.id for each in scheduled if self._is_foreign(each)}
        for flow_run in scheduled:
            if self.fetcher.stopped or not self.fetcher.free:
                return
            if flow_run.id in self._foreign:
                continue
            if flow_run.id not in self._executing and await self._claim(flow_run):
                assert flow_run.deployment_id is not None
                group.start_soon(self._execute_scheduled, ours[flow_run.deployment_id], flow_run)

    def _is_foreign(self, flow_run: FlowRun) -> bool:
        return bool(find_foreign_tags(flow_run.tags, self.host.installation.id))

    async def _claim(self, flow_run: FlowRun) -> bool:
        """Move a flow run to Pending. Prefect lets only one worker do this."""
        with ask_prefect(f"flow run {flow_run.id}"):
            try:
                state = await propose_state(self.client, Pending(), flow_run_id=flow_run.id)
            except (Abort, ObjectNotFound):
                return False
        return state.is_pending()

    # One run

    async def _execute_taken(self, taken: TakenRun, slot: Slot) -> None:
        # Prefect may need longer than a lease to create a flow run and to let it begin.
        with self.host.reserve(taken.run_id, taken.epoch):
            if await self._unshown_runs.execute(taken, slot):
                return
            flow_run = await self._submit(taken)
            # If PostgreSQL was away for longer than a lease, this process may have taken the run twice.
            if flow_run is not None and flow_run.id not in self._executing:
                await self._execute(taken.workflow_slug, flow_run, taken.run_id, slot)

    async def _submit(self, taken: TakenRun) -> FlowRun | None:
        """Create the flow run of a run, and link it. Return None if there is nothing to execute."""
        store = self.host.store
        try:
            if await self._cancellation_requests.was_cancelled(taken.former_flow_run_id):
                await store.cancel_run(taken.run_id, f"{CANCELLED} in Prefect")
                return None
            deployment = self.deployments.get(taken.workflow_slug)
            if deployment is None:  # another installation has taken it over
                await store.release_reservation(taken.run_id, taken.epoch)
                return None
            flow = self._flows[taken.workflow_slug]
            flow_run = await create_submission(
                self._writer,
                self.client,
                deployment.id,
                taken,
                Running(),  # only this worker holds the run, so no other process can take the flow run
                installation=self.host.installation.id,
                policy={"retries": flow.retries, "retry_delay": flow.retry_delay_seconds},
            )
        except PrefectRefusedError as error:
            await store.fail_run(taken.run_id, taken.epoch, str(error))
            return None
        except DeploymentGoneError:
            await store.release_reservation(taken.run_id, taken.epoch)
            await self._deploy(taken.workflow_slug)
            return None
        except PrefectUnavailableError:
            await store.release_reservation(taken.run_id, taken.epoch)
            raise
        if not await self.host.link(taken, flow_run.id):
            return None
        _logger.info("run %s of %r, flow run %s", taken.run_id, taken.workflow_slug, flow_run.name)
        if taken.former_flow_run_id is not None:
            self._reconcile_wakeup.wake()  # Prefect may still show the former flow run as running
        return flow_run

    async def _execute_scheduled(self, slug: str, flow_run: FlowRun) -> None:
        async with self.fetcher.slot() as slot:
            run_id = read_run_id(flow_run) or find_run_id(flow_run.id)
            _logger.info("run %s of %r, flow run %s, scheduled by Prefect", run_id, slug, flow_run.name)
            self.host.requested.add(flow_run.id)
            try:
                await self._execute(slug, flow_run, run_id, slot)
            finally:
                self.host.requested.discard(flow_run.id)

    async def _execute(self, slug: str, flow_run: FlowRun, run_id: UUID, slot: Slot) -> None:
        if flow_run.id in self._executing:
            return  # its creation took longer than the lease, and this worker has taken the run again
        self._executing[flow_run.id] = run_id
        self.host.places[flow_run.id] = slot
        try:
            state = await self._engines[slug].execute(flow_run)
            reason = f", {state.message}" if state.message and not state.is_completed() else ""
            level = logging.ERROR if state.is_failed() or state.is_crashed() else logging.INFO
            _logger.log(level, "run %s of %r: %s%s", run_id, slug, state.name, reason)
        except (Exception, PrefectSignal) as error:  # noqa: BLE001  an error of Prefect: PostgreSQL knows the run's state
            _logger.warning("flow run %s of run %s broke off: %s", flow_run.id, run_id, _describe(error))
            self._reconcile_wakeup.wake()
            await self._release(run_id, flow_run.id)
        finally:
            self._executing.pop(flow_run.id, None)
            self.host.places.pop(flow_run.id, None)

    async def _release(self, run_id: UUID, flow_run_id: UUID) -> None:
        """Hand back a run that this process no longer executes."""
        try:
            run = await self.host.store.read_run(run_id)
            if run.flow_run_id == flow_run_id and run.held is Held.LEASED:
                await self.host.store.release_run(run_id, run.epoch)
        except PgflowPrefectError as error:
            _logger.warning("run %s could not be handed back: %s", run_id, error)  # its lease will expire

    async def _restore(self, slug: str) -> None:
        """Create a workflow's deployment again, unless it is another installation's now."""
        if slug in self.deployments:
            try:
                await self._deploy(slug)
            except PgflowPrefectError as error:
                _logger.warning("workflow %r has no deployment: %s", slug, error)

    async def _deploy(self, slug: str) -> None:
        workflow, source = self.workflows[slug]
        definition = await self.host.store.load_definition(slug)
        try:
            self.deployments[slug] = await register(
                self.client, workflow, definition, source, installation=self.host.installation.id
            )
        except ForeignDeploymentError:
            self._leave(slug)
            raise
        self.fetcher.workflow_slugs = [*self.deployments]


def _describe(error: BaseException) -> str:
    # Prefect's own errors have the whole URL.
    return f"{type(error).__name__}: {describe_error(error)}" if str(error) else type(error).__name__
