"""`serve`: a bridge, and the flow runs of one machine, each in its own process."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import anyio
from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.responses import DeploymentResponse

from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.deployment.deployments import Options, deploy
from pgflow_prefect.deployment.deployments.find import find_flows
from pgflow_prefect.errors import PgflowPrefectError, UsageError
from pgflow_prefect.prefect_api.ownership import find_foreign_tags
from pgflow_prefect.services.bridge import Bridge
from pgflow_prefect.services.flow_run_processes import FlowRunProcesses
from pgflow_prefect.workflow import Workflow, to_flow_name

REFRESH_INTERVAL = 5.0
"""Seconds between two looks at the deployments."""

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


@dataclass
class ServedDeployments:
    """The deployments of the served workflows. They are called `pgflow`.

    Attributes:
        store: the database.
        client: Prefect's API.
        served: the workflows.
        options: the options of the deployments.
        flows: the flows by the id of their deployment, as of the last look.
    """

    store: Store
    client: PrefectClient
    served: Sequence[Served]
    options: Options
    flows: dict[UUID, Flow[..., Any]] = field(default_factory=dict, init=False)

    async def deploy(self) -> None:
        """Create or update the deployment of each workflow, and enable those that were never enabled or disabled.

        Raises:
            UsageError: a deployment has a work pool, so only that pool's workers execute its flow runs.
            PrefectUnavailableError: Prefect does not answer.
            PrefectRefusedError: Prefect refuses a deployment.
        """
        await self._refuse_work_pools()
        known = await self.store.list_enabled()
        for each in self.served:
            await self._deploy(each)
            if each.workflow.slug not in known:
                await self.store.enable_workflow(each.workflow.slug)

    async def refresh(self) -> None:
        """Read the deployments, and create those again that are gone.

        Raises:
            PrefectUnavailableError: Prefect does not answer.
            PrefectRefusedError: Prefect refuses a deployment.
        """
        own = (await find_flows(self.client, self._names)).own
        installation = await self.store.read_installation()
        flows: dict[UUID, Flow[..., Any]] = {}
        for name, each in self._names.items():
            deployment = own.get(name)
            if deployment is not None and find_foreign_tags(deployment.tags, installation):
                if deployment.id in self.flows:
                    _logger.error("deployment %s: another installation has taken it over; it is left alone", name)
            elif deployment is not None and deployment.work_pool_name is None:
                flows[deployment.id] = each.workflow.given_flow
            elif deployment is not None and deployment.id in self.flows:
                taken = _name_pool(name, deployment)
                undo = f"pgflow-prefect deploy {each.workflow.slug} --no-work-pool"
                _logger.warning("deployment %s: it is left alone from now on; `%s` takes the pool away", taken, undo)
        self.flows.clear()
        self.flows.update(flows)
        for name, each in self._names.items():
            if name not in own:
                await self._deploy(each)

    @property
    def _names(self) -> dict[str, Served]:
        return {to_flow_name(each.workflow.slug): each for each in self.served}

    async def _refuse_work_pools(self) -> None:
        for name, deployment in (await find_flows(self.client, self._names)).own.items():
            if (pool := deployment.work_pool_name) is not None:
                raise UsageError(
                    f"deployment {_name_pool(name, deployment)}: "
                    f"start one with `prefect worker start --pool {pool}` and hand them runs with "
                    "`pgflow-prefect bridge`, or take the pool away with "
                    f"`pgflow-prefect deploy {self._names[name].workflow.slug} --no-work-pool`"
                )

    async def _deploy(self, each: Served) -> None:
        deployed = await deploy(
            self.client,
            each.workflow,
            each.definition,
            each.source,
            options=self.options,
            installation=await self.store.read_installation(),
            payloads=await self.store.list_schedules([each.workflow.slug]),
        )
        self.flows[deployed.id] = each.workflow.given_flow
        where = f": {deployed.url}" if deployed.url else ""
        _logger.info("%s deployment %s%s", deployed.outcome, deployed.name, where)


def _name_pool(flow_name: str, deployment: DeploymentResponse) -> str:
    pool = deployment.work_pool_name
    return f"{flow_name}/{deployment.name} has the work pool {pool!r}, whose workers execute its flow runs"


@dataclass
class Serving:
    """A bridge and the processes that execute its flow runs, as one service.

    Attributes:
        bridge: submits the runs that SQL starts to Prefect.
        deployments: the deployments, which are created again if they are gone.
        processes: execute the scheduled flow runs.
        grace: seconds that flow runs get to finish after `drain`.
    """

    bridge: Bridge
    deployments: ServedDeployments
    processes: FlowRunProcesses
    grace: float
    _draining: anyio.Event = field(default_factory=anyio.Event, init=False)
    _stopping: anyio.Event = field(default_factory=anyio.Event, init=False)

    async def run(self) -> None:
        """Serve until `drain`, and return when no process is left.

        Raises:
            ForeignInstallationError: another database has begun to use this one's id in Prefect.
        """
        async with anyio.create_task_group() as background:
            background.start_soon(self._limit_draining)
            background.start_soon(self._keep_deployed)
            async with anyio.create_task_group() as working:
                working.start_soon(self._hand_over)
                working.start_soon(self.processes.run)
            background.cancel_scope.cancel()
        if self.bridge.failure is not None:
            raise self.bridge.failure

    async def _hand_over(self) -> None:
        await self.bridge.run()
        if self.bridge.failure is not None:
            self.drain()

    def drain(self) -> None:
        """Take nothing more. Flow runs under way get some time to finish."""
        if not self._draining.is_set():
            _logger.info("draining: %d flow runs under way, for %g s at most", self.processes.busy, self.grace)
        self._draining.set()
        self.bridge.stop()
        self.processes.drain()

    def stop(self) -> None:
        """Also end the flow runs under way, and hand their runs back."""
        self.drain()
        self._stopping.set()

    async def _keep_deployed(self) -> None:
        while not self._draining.is_set():
            with anyio.move_on_after(REFRESH_INTERVAL):
                await self._draining.wait()
                return
            try:
                await self.deployments.refresh()
            except PgflowPrefectError as error:
                _logger.warning("can't read the deployments: %s", error)

    async def _limit_draining(self) -> None:
        await self._draining.wait()
        with anyio.move_on_after(self.grace):
            await self._stopping.wait()
        await self.processes.stop()
