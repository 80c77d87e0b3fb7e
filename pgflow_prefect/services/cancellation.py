"""Handles Cancel for flow runs that no process is executing."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import anyio
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, Running

from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.reconciliation.prefect_view import show_flow_runs
from pgflow_prefect.errors import PgflowPrefectError, UnknownRunError
from pgflow_prefect.execution.process.host import Host
from pgflow_prefect.execution.reporting.flow_runs import FlowRunEngine
from pgflow_prefect.execution.workflow_flow import AsyncFlow
from pgflow_prefect.models import CANCELLED, Held, Run, Status
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from pgflow_prefect.prefect_api.ids import find_run_id, is_placeholder, read_run_id
from pgflow_prefect.prefect_api.states import is_cancelled

POLL_INTERVAL = 2.0
"""Seconds between two looks at cancelled flow runs. Prefect's events may get lost, so these looks decide."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CancellationRequests:
    """Finds and handles the flow runs that a user cancelled in Prefect.

    Attributes:
        store: the database.
        client: Prefect's API.
    """

    store: Store
    client: PrefectClient

    async def find(self, deployments: Sequence[UUID], executing: Sequence[UUID]) -> list[FlowRun]:
        """Return the flow runs of these deployments that are Cancelling, and those of `executing` that are Cancelled.

        Prefect sets a forced Cancelled without waiting for the process that executes the flow run.
        """
        found: dict[UUID, FlowRun] = {}
        with ask_prefect("a look at cancelled flow runs"):
            if deployments:
                for flow_run in await self.client.read_flow_runs(
                    flow_run_filter=_in_state(StateType.CANCELLING),
                    deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[*deployments])),
                ):
                    found[flow_run.id] = flow_run
            if executing:
                chosen = _in_state(StateType.CANCELLING, StateType.CANCELLED)
                chosen.id = FlowRunFilterId(any_=[*executing])
                for flow_run in await self.client.read_flow_runs(flow_run_filter=chosen):
                    if flow_run.state is not None and is_cancelled(flow_run.state):
                        found[flow_run.id] = flow_run
        return [*found.values()]

    async def was_cancelled(self, flow_run_id: UUID | None) -> bool:
        """Tell whether a user cancelled the flow run whose lease has expired."""
        if flow_run_id is None or is_placeholder(flow_run_id) or not self.store.implementation.can_cancel:
            return False
        with ask_prefect(f"flow run {flow_run_id}"):
            try:
                former = await self.client.read_flow_run(flow_run_id)
            except ObjectNotFound:
                return False
        return former.state is not None and is_cancelled(former.state)

    async def stop(self, host: Host, run_id: UUID, flow_run: FlowRun) -> None:
        """Cancel a run that this process executes. Its flow run sets its own state when it has stopped."""
        if not self.store.implementation.can_cancel:
            await self.refuse(flow_run)
            return
        await self.store.cancel_run(run_id, f"{CANCELLED} in Prefect")
        host.end(run_id)

    async def refuse(self, flow_run: FlowRun) -> None:
        """Show that a run goes on that this process executes, for its database has no function that cancels it."""
        message = "pgflow has no function that cancels a run: it goes on"
        _logger.warning("flow run %r: %s", flow_run.name, message)
        with ask_prefect(f"flow run {flow_run.id}"):
            await self.client.set_flow_run_state(flow_run.id, Running(message=message), force=True)

    async def watch(self, host: Host, flow_run_id: UUID, run_id: UUID) -> None:
        """Watch for ever whether a user cancels the run that this process executes, and stop it then."""
        while True:
            await anyio.sleep(POLL_INTERVAL)
            try:
                for flow_run in await self.find([], [flow_run_id]):
                    await self.stop(host, run_id, flow_run)
            except PgflowPrefectError as error:
                _logger.info("can't look for cancelled flow runs: %s", error)

    async def fulfil(self, flow_run: FlowRun, workflow_slug: str | None) -> None:
        """Cancel the run of a flow run that no process executes, and show that in Prefect.

        Args:
            flow_run: a flow run of one of this installation's deployments.
            workflow_slug: that deployment's workflow. A run of another workflow stays as it is.
        """
        run_id = read_run_id(flow_run) or find_run_id(flow_run.id)
        try:
            run = await self.store.read_run(run_id)
        except UnknownRunError:
            pass
        else:
            if run.flow_run_id == flow_run.id and run.held is Held.LEASED and run.status is Status.PENDING:
                return  # its process is alive, and will see the cancellation
            is_its_run = run.flow_run_id in (flow_run.id, None) and run.workflow_slug == workflow_slug
            if is_its_run and self.store.implementation.can_cancel:
                await self.store.cancel_run(run_id, f"{CANCELLED} in Prefect")
        with ask_prefect(f"flow run {flow_run.id}"):
            await self.client.set_flow_run_state(
                flow_run.id, Cancelled(message="no process was executing it"), force=True
            )
        _logger.info("run %s: cancelled in Prefect", run_id)


async def execute_until_cancelled(
    host: Host, client: PrefectClient, flow: AsyncFlow, flow_run: FlowRun, run_id: UUID
) -> State[Any]:
    """Execute a flow run in this process, stop it when a user cancels it, and return its final state."""
    async with anyio.create_task_group() as group:
        group.start_soon(CancellationRequests(host.store, client).watch, host, flow_run.id, run_id)
        try:
            return await FlowRunEngine(flow, FlowRunWriter(client), client).execute(flow_run)
        except Exception as error:  # noqa: BLE001  raised below: here, the group would wrap it
            failure = error
        finally:
            group.cancel_scope.cancel()
    raise failure


async def show_cancelled(client: PrefectClient, run: Run, installation: UUID) -> None:
    """Show a cancelled run as cancelled in Prefect, if its flow run belongs to this installation.

    Raises:
        PrefectUnavailableError: Prefect does not answer.
    """
    assert run.flow_run_id is not None
    with ask_prefect(f"flow run {run.flow_run_id}"):
        try:
            flow_run = await client.read_flow_run(run.flow_run_id)
            if flow_run.state is not None and flow_run.state.is_final():
                return
            [shown] = await show_flow_runs(client, [flow_run], installation)
            if not shown.is_of(run.id):
                return  # the rows name this flow run, but that alone does not make it this installation's
            # A process that executes the run sets Cancelled when it has stopped. Without one, this sets it.
            lives = run.held is Held.LEASED
            state: State[Any] = Cancelling() if lives else Cancelled(message=run.error_message)
            await client.set_flow_run_state(flow_run.id, state, force=not lives)
        except ObjectNotFound:
            pass  # a user has deleted the flow run


def _in_state(*types: StateType) -> FlowRunFilter:
    return FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[*types])))
