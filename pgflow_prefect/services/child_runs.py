"""Executes the children of the runs that this process executes, for `run`, which is no worker."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID

import anyio
from anyio.abc import TaskGroup
from prefect.client.orchestration import PrefectClient

from pgflow_prefect.database.notifications import listen
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError
from pgflow_prefect.execution.in_process import create_flow_run
from pgflow_prefect.execution.process.host import Host
from pgflow_prefect.models import TakenRun
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.services.cancellation import execute_until_cancelled
from pgflow_prefect.services.nesting import find_parent_task_run
from pgflow_prefect.waiting import Pauses, Wakeup
from pgflow_prefect.workflow import Workflow

MOST_TAKEN = 100
"""The most children that it takes at once."""

_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 0.2, 2.0  # seconds between two looks without a notification

_logger = logging.getLogger(__name__)


@asynccontextmanager
async def execute_children(host: Host, client: PrefectClient, workflows: Mapping[str, Workflow]) -> AsyncIterator[None]:
    """Execute the children of the runs that this process executes, until the block ends; see `ChildRuns`.

    A run that has failed by one step may have left children of others under way. The block ends after those.
    """
    if not workflows:
        yield
        return
    failure: Exception | None = None
    children = ChildRuns(host, client, workflows)
    async with anyio.create_task_group() as group:
        group.start_soon(children.run)
        try:
            yield
            await children.finish()
        except Exception as error:  # noqa: BLE001  raised below: here, the group would wrap it
            failure = error
        finally:
            group.cancel_scope.cancel()
    if failure is not None:
        raise failure


@dataclass
class ChildRuns:
    """Takes the pending children of all runs that this process executes, and executes them beside those.

    Attributes:
        host: this process.
        client: Prefect's API.
        workflows: the workflows that children may be runs of here, by slug. Workers have to execute the others.
    """

    host: Host
    client: PrefectClient
    workflows: Mapping[str, Workflow]
    _wakeup: Wakeup = field(default_factory=Wakeup, init=False)
    _next_sweep: float = field(default=0, init=False)
    _parents: set[UUID] = field(default_factory=set, init=False)
    """The runs that are or were executed here, without children that have completed: nothing below those is pending."""
    _under_way: int = field(default=0, init=False)
    _is_last: bool = field(default=False, init=False)
    _finished: anyio.Event = field(default_factory=anyio.Event, init=False)

    async def run(self) -> None:
        """Execute children until it is cancelled."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._listen)
            pauses = Pauses(_SHORTEST_INTERVAL, _LONGEST_INTERVAL, factor=1.5)
            while not self._finished.is_set():
                is_last = self._is_last  # read before the look, which sees what the parent's end has left
                if await self._take(group):
                    pauses.reset()
                elif is_last and (not self._under_way or self.host.draining.is_set()):
                    self._finished.set()
                    break
                await self._wakeup.wait(pauses.draw())

    async def finish(self) -> None:
        """Wait for the children that are under way when their parent has ended, as it has failed by another step.

        Without this, they would stay pending where no worker takes them.
        """
        self._is_last = True
        self._next_sweep = 0  # also for requests that a lock held up a moment ago
        self._wakeup.wake()
        await self._finished.wait()

    async def _listen(self) -> None:
        await listen(self.host.dsn, self._wakeup, connect_timeout=self.host.settings.connect_timeout)

    async def _take(self, group: TaskGroup) -> bool:
        """Take children, and return whether there were any."""
        executing = self.host.executing
        self._parents |= executing
        if self.host.draining.is_set() or not self._parents:
            return False
        try:
            if anyio.current_time() >= self._next_sweep:  # once in a while, not after each notification
                await self.host.store.expire_dead_holders()
                await self.host.store.move_children(MOST_TAKEN)
                self._next_sweep = anyio.current_time() + min(self.host.settings.sweep_interval, _LONGEST_INTERVAL)
            taken = await self.host.store.take_children(self._parents, self.workflows, MOST_TAKEN, besides=executing)
        except PgflowPrefectError as error:
            _logger.warning("no children taken: %s", error)
            if isinstance(error, DatabaseUnavailableError):
                await self.host.store.drop_broken_connections()
            return False
        for each in taken:
            self._under_way += 1
            group.start_soon(self._execute, each)
        return bool(taken)

    async def _execute(self, taken: TakenRun) -> None:
        try:
            if await self._execute_flow(taken):
                self._parents.discard(taken.run_id)
        finally:
            self._under_way -= 1
            self._wakeup.wake()

    async def _execute_flow(self, taken: TakenRun) -> bool:
        """Execute a child as a flow run, and return whether it has completed."""
        workflow = self.workflows[taken.workflow_slug]
        flow = workflow.make_flow(self.host.settings, host=self.host)
        with self.host.reserve(taken.run_id, taken.epoch):
            try:
                parent = await find_parent_task_run(self.client, taken)
                created = await create_flow_run(
                    self.client,
                    flow,
                    workflow.slug,
                    taken.run_id,
                    self.host.installation.id,
                    parent_task_run_id=parent,
                )
                if await self.host.link(taken, created.flow_run.id):
                    state = await execute_until_cancelled(self.host, self.client, flow, created.flow_run, taken.run_id)
                    return state.is_completed()
            except PgflowPrefectError as error:
                _logger.warning("child run %s of workflow %r: %s", taken.run_id, taken.workflow_slug, error)
                await self._put_off(taken, str(error))
            except Exception as error:
                _logger.warning("child run %s broke off: %s", taken.run_id, describe_error(error))
                _logger.debug("child run %s", taken.run_id, exc_info=error)
        return False

    async def _put_off(self, taken: TakenRun, reason: str) -> None:
        """Hand back a run that could not begin here, to be taken again after a while."""
        try:
            await self.host.store.put_off_run(taken.run_id, taken.epoch, reason)
        except PgflowPrefectError as error:
            _logger.warning("run %s: %s", taken.run_id, error)  # its lease runs out
