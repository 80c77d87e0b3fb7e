"""The bridge: submits runs that SQL started to Prefect, whose own workers execute them."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from uuid import UUID

import anyio
from anyio import CancelScope
from prefect.client.orchestration import PrefectClient

from pgflow_prefect.database.notifications import listen
from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.deployments import find_deployments
from pgflow_prefect.deployment.reconciliation.failures import make_teller
from pgflow_prefect.errors import (
    DeploymentGoneError,
    ForeignInstallationError,
    PgflowPrefectError,
    PrefectRefusedError,
)
from pgflow_prefect.execution.process.slots import Slot
from pgflow_prefect.models import CANCELLED, TakenRun
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from pgflow_prefect.prefect_api.ownership import find_foreign_tags
from pgflow_prefect.services.airflow import keep_following
from pgflow_prefect.services.backfills import keep_backfilling
from pgflow_prefect.services.cancellation import CancellationRequests
from pgflow_prefect.services.heartbeat import Heartbeat
from pgflow_prefect.services.maintenance import keep_reconciled, name_older_runs
from pgflow_prefect.services.run_fetcher import RunFetcher
from pgflow_prefect.services.submission import create_submission
from pgflow_prefect.settings import Settings
from pgflow_prefect.waiting import Wakeup
from pgflow_prefect.workflow import to_flow_name

IN_FLIGHT = 8
"""How many flow runs are created at the same time. More would not be faster."""

POLL_INTERVAL = 5.0
"""Seconds between two looks at the deployments and at cancelled flow runs."""

_logger = logging.getLogger(__name__)


@dataclass
class Bridge:
    """Creates one flow run of its workflow's deployment for each pending run.

    Attributes:
        store: the database.
        client: Prefect's API.
        settings: its intervals.
        dsn: the database, to listen to.
        adopt: take pending runs that are older than their workflow's enabling, too.
        only: these workflows, or None for all.
        deployments: the deployment of each workflow.
        failure: the reason why it has stopped by itself.
    """

    store: Store
    client: PrefectClient
    settings: Settings
    dsn: str
    adopt: bool
    only: Collection[str] | None = None
    deployments: Mapping[str, UUID] = field(default_factory=dict, init=False)  # by workflow
    failure: ForeignInstallationError | None = field(default=None, init=False)
    _warned: set[tuple[str, str]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.fetcher = RunFetcher(
            store=self.store,
            handle=self._submit,
            slots=IN_FLIGHT,
            sweep_interval=self.settings.sweep_interval,
            adopt=self.adopt,
            workflow_slugs=[],
            wakeup=Wakeup(),
        )
        self._reconcile_wakeup = Wakeup()
        self._heartbeat = Heartbeat(self.store, self.client)
        self._writer = FlowRunWriter(self.client)

    async def register(self) -> None:
        """Register this installation in Prefect.

        Raises:
            ForeignInstallationError: the database is a copy of another one that has been used with Prefect.
            PrefectUnavailableError: Prefect does not answer.
        """
        await self._heartbeat.register()

    async def run(self) -> None:
        """Submit runs until `stop`, and return when the last submission is linked.

        `failure` says why it stopped by itself.
        """
        async with anyio.create_task_group() as background:
            background.start_soon(self._heartbeat.keep, self._give_up)
            background.start_soon(self._listen)
            background.start_soon(self._watch_prefect)
            background.start_soon(self._reconcile)
            background.start_soon(keep_backfilling, self.store, self.settings.sweep_interval)
            background.start_soon(keep_following, self.store, self.client, self.settings)
            async with anyio.create_task_group() as submitting:
                await self.fetcher.run(submitting)
            background.cancel_scope.cancel()

    def stop(self) -> None:
        """Take nothing more."""
        self.fetcher.stop()

    async def refresh(self) -> None:
        """Read which workflows have a deployment. Warn of those with pending runs and without a deployment."""
        enabled = [
            slug for slug, each in (await self.store.list_enabled()).items() if each.enabled and self._is_ours(slug)
        ]
        waiting = {slug: each for slug, each in (await self.store.list_waiting_runs()).items() if self._is_ours(slug)}
        names = {slug: to_flow_name(slug) for slug in [*enabled, *waiting]}
        found = await find_deployments(self.client, names.values())
        installation = await self.store.read_installation()
        owners = {name: find_foreign_tags(each.tags, installation) for name, each in found.chosen.items()}
        chosen = {name: each.id for name, each in found.chosen.items() if not owners[name]}
        newly = [slug for slug in enabled if names[slug] in chosen and slug not in self.deployments]
        self.deployments = {slug: chosen[name] for slug, name in names.items() if name in chosen}
        self.fetcher.workflow_slugs = [slug for slug in enabled if slug in self.deployments]
        self.fetcher.wakeup.wake()
        for slug, (count, first) in waiting.items():
            if several := found.ambiguous.get(names[slug]):
                self._warn(slug, f"has the deployments {', '.join(several)}, and none is called pgflow", count, first)
            elif foreign := owners.get(names[slug]):
                self._warn(slug, f"has a deployment of another installation ({', '.join(foreign)})", count, first)
            elif slug not in self.deployments:
                self._warn(slug, f"has no deployment (`pgflow-prefect deploy {slug}` makes one)", count, first)
            elif slug not in enabled:
                self._warn(slug, f"is not enabled (`pgflow-prefect enable {slug}`)", count, first)
        if newly and not self.adopt:
            await name_older_runs(self.store, newly)

    def _is_ours(self, workflow_slug: str) -> bool:
        return self.only is None or workflow_slug in self.only

    def _warn(self, slug: str, problem: str, count: int, first: UUID) -> None:
        if (slug, problem) not in self._warned:
            self._warned.add((slug, problem))
            _logger.warning("workflow %r %s: %d pending runs are left alone (%s, …)", slug, problem, count, first)

    # Background tasks

    async def _listen(self) -> None:
        await listen(self.dsn, self.fetcher.wakeup, connect_timeout=self.settings.connect_timeout)

    async def _reconcile(self) -> None:
        with CancelScope() as self._reconciling:
            await keep_reconciled(
                self.store,
                self.client,
                self._reconcile_wakeup,
                self.settings.reconcile_interval,
                tell=make_teller(self.settings.events),
            )

    def _give_up(self, error: ForeignInstallationError) -> None:
        self.failure = error
        self._reconciling.cancel()
        self.stop()

    async def _watch_prefect(self) -> None:
        wishes = CancellationRequests(self.store, self.client)
        while True:
            try:
                await self.refresh()
                slugs = {deployment: slug for slug, deployment in self.deployments.items()}
                for flow_run in await wishes.find([*slugs], []):
                    slug = slugs.get(flow_run.deployment_id) if flow_run.deployment_id else None
                    await wishes.fulfil(flow_run, slug)
            except PgflowPrefectError as error:
                _logger.warning("can't look at Prefect: %s", error)
            await anyio.sleep(POLL_INTERVAL)

    # One run

    async def _submit(self, taken: TakenRun, slot: Slot) -> None:
        run_id, epoch = taken.run_id, taken.epoch
        try:
            if await CancellationRequests(self.store, self.client).was_cancelled(taken.former_flow_run_id):
                await self.store.cancel_run(run_id, f"{CANCELLED} in Prefect")
                return
            flow_run = await create_submission(
                self._writer,
                self.client,
                self.deployments[taken.workflow_slug],
                taken,
                installation=await self.store.read_installation(),
            )
        except PrefectRefusedError as error:
            _logger.error("run %s of %r fails: %s", run_id, taken.workflow_slug, error)  # noqa: TRY400  no traceback
            await self.store.fail_run(run_id, epoch, str(error))
        except (DeploymentGoneError, KeyError):
            self.deployments = {slug: each for slug, each in self.deployments.items() if slug != taken.workflow_slug}
            self.fetcher.workflow_slugs = [*self.deployments]
            await self.store.release_reservation(run_id, epoch)
        except PgflowPrefectError:
            await self.store.release_reservation(run_id, epoch)
            raise
        else:
            await self.store.link_flow_run(run_id, epoch, flow_run.id, queued=True)
            _logger.info("run %s of %r: submitted as flow run %s", run_id, taken.workflow_slug, flow_run.name)
            if taken.former_flow_run_id is not None:
                self._reconcile_wakeup.wake()  # it may still be shown as running
