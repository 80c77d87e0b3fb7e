"""Executes a worker's unshown runs, and shows a run in Prefect once it takes long."""

import asyncio
import logging
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

import anyio
from prefect.exceptions import PrefectSignal

from pgflow_prefect.database.recording import RecordLink
from pgflow_prefect.errors import DeploymentGoneError, PgflowPrefectError
from pgflow_prefect.execution.process.host import Host
from pgflow_prefect.execution.process.slots import Slot
from pgflow_prefect.execution.reporting.held_logs import HELD, send_lines
from pgflow_prefect.execution.reporting.unshown import UnshownFlowRun
from pgflow_prefect.execution.workflow_flow import AsyncFlow
from pgflow_prefect.models import Status, TakenRun
from pgflow_prefect.prefect_api.ids import is_placeholder
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.services.recorder import Recorder
from pgflow_prefect.waiting import Pauses

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds between two tries to show a run that takes long

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnshownRuns:
    """Executes runs of workflows that are recorded later.

    Attributes:
        host: this process.
        flows: of the workflows, by slug.
        recorder: decides which ended runs are shown, and knows which workflows are recorded later.
        executing: the runs that this process executes, by flow run, for Prefect's Cancel. A run joins them when it is
            shown.
    """

    host: Host
    flows: Mapping[str, AsyncFlow]
    recorder: Recorder
    executing: MutableMapping[UUID, UUID]

    async def execute(self, taken: TakenRun, slot: Slot) -> bool:
        """Execute a reserved run without telling Prefect yet.

        Returns:
            False if the run must be shown from its beginning. Then nothing was done.
        """
        former = taken.former_flow_run_id
        if taken.workflow_slug not in self.recorder.policies or (former is not None and not is_placeholder(former)):
            return False
        unshown = UnshownFlowRun(
            self.flows[taken.workflow_slug],
            taken.workflow_slug,
            taken.run_id,
            taken.epoch,
            installation=self.host.installation.id,
            client=self.recorder.runs.client,
        )
        try:
            begun = await self.host.begin_unshown(taken, unshown.placeholder)
            if begun.linked and begun.status is Status.PENDING:
                await self._execute(taken, slot, unshown)
        finally:
            HELD.end(unshown.placeholder)
        return not begun.shown

    async def _execute(self, taken: TakenRun, slot: Slot, unshown: UnshownFlowRun) -> None:
        began_at, completed = monotonic(), False
        showing = asyncio.create_task(self._show_once_long(taken, unshown))
        with self._register(taken, slot, unshown):
            try:
                state = await unshown.execute()
            except (Exception, PrefectSignal) as error:  # noqa: BLE001  an error of Prefect: PostgreSQL knows the run's state
                _logger.warning("run %s of %r broke off: %s", taken.run_id, taken.workflow_slug, describe_error(error))
                await self._release(taken)
            else:
                completed = state.is_completed()
                level = logging.DEBUG if completed else logging.ERROR if state.is_failed() else logging.INFO
                _logger.log(level, "run %s of %r: %s", taken.run_id, taken.workflow_slug, state.name)
            finally:
                if unshown.is_shown:
                    self.host.finish(_await(showing))
                else:
                    showing.cancel()
        HELD.end(unshown.placeholder)  # a thread may go on writing lines after the run
        if not unshown.is_shown:
            self.recorder.note_end(
                taken.workflow_slug,
                taken.run_id,
                taken.epoch,
                completed=completed,
                seconds=monotonic() - began_at,
                lines=unshown.lines,
            )

    @contextmanager
    def _register(self, taken: TakenRun, slot: Slot, unshown: UnshownFlowRun) -> Iterator[None]:
        self.host.places[unshown.placeholder] = slot
        self.host.unshown[taken.run_id] = unshown
        try:
            yield
        finally:
            self.host.places.pop(unshown.placeholder, None)
            self.host.unshown.pop(taken.run_id, None)
            self.executing.pop(unshown.flow_run.id, None)

    async def _show_once_long(self, taken: TakenRun, unshown: UnshownFlowRun) -> None:
        """Show a run that takes long. If Prefect is away, try again until it is back."""
        await anyio.sleep(self.recorder.policies[taken.workflow_slug].longer_than)
        await unshown.wait_until_begun()
        pauses = Pauses(_SHORTEST_PAUSE, _LONGEST_PAUSE)
        while not await self._try_to_show(taken, unshown):  # noqa: ASYNC110  Prefect can only be asked
            await anyio.sleep(pauses.draw())
        if not unshown.is_shown:
            return
        try:
            runs = self.recorder.runs
            await runs.show_steps(taken.run_id, unshown.flow_run, unshown.find_shown_task_runs)
            await send_lines(runs.client, unshown.lines.release(unshown.flow_run.id))
        except Exception as error:  # noqa: BLE001  after any error, reconciling shows the steps
            _logger.warning("run %s: what it has done is not shown yet: %s", taken.run_id, describe_error(error))
        finally:
            HELD.forget(unshown.lines)

    async def _try_to_show(self, taken: TakenRun, unshown: UnshownFlowRun) -> bool:
        """Show a run; return False to try it again."""
        runs = self.recorder.runs
        try:
            flow_run = await runs.show_begun(taken)
            linked = await runs.store.link_recorded_runs([RecordLink(taken.run_id, taken.epoch, flow_run.id)])
            # After a lost answer, the same link is no news.
            is_ours = taken.run_id in linked or (await runs.store.read_run(taken.run_id)).flow_run_id == flow_run.id
        except DeploymentGoneError as error:
            _logger.warning("run %s takes long, and is not shown yet: %s", taken.run_id, error)
            await self.recorder.restore(taken.workflow_slug)
            return False
        except Exception as error:  # noqa: BLE001  the run goes on after any error
            _logger.warning("run %s takes long, and is not shown yet: %s", taken.run_id, describe_error(error))
            return False
        if is_ours:
            unshown.show(flow_run, runs.writer)
            self.executing[flow_run.id] = taken.run_id
            _logger.info("run %s of %r takes long: flow run %s", taken.run_id, taken.workflow_slug, flow_run.name)
        return True  # otherwise another owner has the run

    async def _release(self, taken: TakenRun) -> None:
        """Hand back a run that this process no longer executes."""
        try:
            await self.host.store.release_run(taken.run_id, taken.epoch)
        except PgflowPrefectError as error:
            _logger.warning("run %s could not be handed back: %s", taken.run_id, error)  # its lease runs out


async def _await(task: "asyncio.Task[None]") -> None:
    await asyncio.wait([task])
