"""Decides in a worker which ended runs to show in Prefect, and shows them. No run waits for that.

A bounded queue has the ids of the runs that wait, and a bounded number of their log lines. All else comes from the
rows. If the queue has no room for a failed run, the recorder finds it later by its row. The same holds for runs of a
process that died. Any other run without room stays unshown, and `pgflow-prefect record` can show it.
"""

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from uuid import UUID

import anyio

from pgflow_prefect.errors import PgflowPrefectError, PrefectRefusedError
from pgflow_prefect.execution.reporting.held_logs import HELD, HeldLines
from pgflow_prefect.models import Status
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.recording import RecordLater
from pgflow_prefect.services.recording import MOST_RUNS, RunRecorder
from pgflow_prefect.waiting import Pauses, Wakeup

MOST_WAITING = 1_000
"""The most runs that wait to be shown."""

_MOST_SETTLED = 100
"""The most runs in a statement that notes that they stay unshown."""

_MOST_UNSETTLED = 10_000
"""The most runs that wait for such a statement. The recorder finds later runs by their rows."""

_LINGER = 0.5  # seconds for which such runs are collected
_PAGE = 500  # runs of one look
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries while Prefect or PostgreSQL is away
_PATIENCE = 10.0  # seconds for which an ending process goes on showing runs

_logger = logging.getLogger(__name__)

_LIVE = RecordLater()
"""The policy for unshown runs of a workflow that is no longer recorded later: it shows failed and long runs."""


@dataclass
class Recorder:
    """Shows the runs of a worker's workflows that began unshown.

    Attributes:
        runs: shows them.
        policies: of the workflows that are recorded later, by slug.
        list_slugs: returns the workflows with a deployment of the worker.
        executing: returns the runs that this process executes.
        restore: creates a workflow's deployment again after a user has deleted it.
        interval: seconds between two looks for runs that no process has decided on.
        grace: seconds after a run's end; after that, the process that executed it has left it undecided.
    """

    runs: RunRecorder
    policies: Mapping[str, RecordLater]
    list_slugs: Callable[[], Collection[str]]
    executing: Callable[[], Collection[UUID]]
    restore: Callable[[str], Awaitable[None]]
    interval: float
    grace: float
    _waiting: OrderedDict[UUID, HeldLines | None] = field(default_factory=OrderedDict, init=False)
    _unwanted: OrderedDict[UUID, int] = field(default_factory=OrderedDict, init=False)  # epochs, by run
    _left_out: int = field(default=0, init=False)
    _is_behind: bool = field(default=False, init=False)  # the rows have more than there was room for

    def __post_init__(self) -> None:
        self._recording_wakeup, self._settling_wakeup, self._looking_wakeup = Wakeup(), Wakeup(), Wakeup()

    @property
    def waiting(self) -> int:
        """The number of runs that wait to be shown."""
        return len(self._waiting)

    def note_end(
        self, workflow_slug: str, run_id: UUID, epoch: int, *, completed: bool, seconds: float, lines: HeldLines
    ) -> None:
        """Decide whether to show a run that this process has executed unshown. No run waits for that.

        Args:
            workflow_slug: its workflow.
            run_id: the run.
            epoch: in which it was executed.
            completed: whether it completed; the rows tell any other end.
            seconds: how long it took.
            lines: its log lines.
        """
        if not completed:
            if not self._want(run_id, lines):
                self._is_behind = True  # the recorder finds its row later
        elif not self._find_policy(workflow_slug).wants(run_id, seconds):
            HELD.forget(lines)
            self._settle(run_id, epoch)
        elif not self._want(run_id, lines):
            self._settle(run_id, epoch)
            self._left_out += 1
            if self._left_out == 1:
                _logger.warning("more runs end than Prefect can be told of: some completed ones stay unshown")

    async def run(self) -> None:
        """Decide, show and look for ever."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._keep_settling)
            group.start_soon(self._keep_recording)
            group.start_soon(self._keep_looking)

    async def close(self) -> None:
        """Show the waiting runs, for a limited time. Another worker finds the rest by their rows."""
        with anyio.move_on_after(_PATIENCE) as scope:
            try:
                while self._unwanted:
                    await self._settle_next()
                while self._waiting:
                    await self._record_next()
            except PgflowPrefectError as error:
                _logger.warning("%d runs are not shown yet: %s", len(self._waiting), error)
        if scope.cancelled_caught:
            _logger.warning("%d runs are not shown yet: the next worker shows them", len(self._waiting))

    def _find_policy(self, workflow_slug: str) -> RecordLater:
        return self.policies.get(workflow_slug, _LIVE)

    # Runs that wait

    def _want(self, run_id: UUID, lines: HeldLines | None = None) -> bool:
        """Let a run wait to be shown; return False if there is no room for it."""
        is_new = run_id not in self._waiting
        if is_new and len(self._waiting) >= MOST_WAITING:
            if lines is not None:
                HELD.forget(lines)
            return False
        former = self._waiting.get(run_id)
        if former is not None and lines is not None:
            HELD.forget(former)
        self._waiting[run_id] = lines or former
        self._recording_wakeup.wake()
        return True

    def _settle(self, run_id: UUID, epoch: int) -> None:
        if len(self._unwanted) < _MOST_UNSETTLED:
            self._unwanted[run_id] = epoch
            self._settling_wakeup.wake()

    # Runs that stay unshown

    async def _keep_settling(self) -> None:
        pauses = Pauses(_SHORTEST_PAUSE, _LONGEST_PAUSE)
        while True:
            await self._settling_wakeup.wait(self.interval)
            await anyio.sleep(_LINGER)
            try:
                while self._unwanted:
                    await self._settle_next()
                pauses.reset()
            except PgflowPrefectError as error:
                _logger.warning("%d runs are not yet noted as unshown: %s", len(self._unwanted), error)
                await anyio.sleep(pauses.draw())
                self._settling_wakeup.wake()

    async def _settle_next(self) -> None:
        some = [*self._unwanted.items()][:_MOST_SETTLED]
        await self.runs.store.settle_unshown(some)
        for run_id, _ in some:
            self._unwanted.pop(run_id, None)

    # Runs that are shown

    async def _keep_recording(self) -> None:
        pauses = Pauses(_SHORTEST_PAUSE, _LONGEST_PAUSE)
        while True:
            await self._recording_wakeup.wait(self.interval)
            try:
                while self._waiting:
                    await self._record_next()
                    pauses.reset()
                if self._is_behind:
                    self._looking_wakeup.wake()
            except Exception as error:  # noqa: BLE001  any error only delays these runs, which are tried again
                self._put_back()
                pause, reason = pauses.draw(), describe_error(error)
                _logger.warning(
                    "%d runs wait to be shown: %s; trying again in %.1f s", len(self._waiting), reason, pause
                )
                await anyio.sleep(pause)
                self._recording_wakeup.wake()

    def _put_back(self) -> None:
        """Let the runs that could not be shown wait behind the others: one of them may be the reason."""
        for run_id in [*self._waiting][:MOST_RUNS]:
            self._waiting.move_to_end(run_id)

    async def _record_next(self) -> None:
        """Show the runs that have waited longest. Runs that could not be shown stay in the queue."""
        some = dict([*self._waiting.items()][:MOST_RUNS])
        lines = {run_id: each for run_id, each in some.items() if each is not None}
        recorded = await self.runs.record([*some], lines)
        for run_id, error in recorded.refused.items():
            _logger.warning("run %s is not shown: %s", run_id, error)
            if isinstance(error, PrefectRefusedError):
                await self._leave_unshown(run_id)
        for workflow_slug in recorded.without_deployment:  # the recorder finds its runs by their rows
            await self.restore(workflow_slug)
        if recorded.shown:
            _logger.info("shown later: %d runs", len(recorded.shown))
        for run_id in some:
            if (held := self._waiting.pop(run_id, None)) is not None:
                HELD.forget(held)

    async def _leave_unshown(self, run_id: UUID) -> None:
        for run in await self.runs.store.read_unrecorded([run_id]):
            self._settle(run_id, run.epoch)

    # Runs that no process has decided on

    async def _keep_looking(self) -> None:
        while True:
            try:
                await self._look()
            except PgflowPrefectError as error:
                _logger.warning("not looking for unshown runs: %s", error)
            await self._looking_wakeup.wait(self.interval)

    async def _look(self) -> None:
        """Find ended runs that a process left undecided, or that had no room, as long as there is room now."""
        after: UUID | None = None
        self._is_behind = True
        while len(self._waiting) < MOST_WAITING and len(self._unwanted) < _MOST_UNSETTLED:
            page = await self.runs.store.list_left_unshown(
                self.list_slugs(), grace=self.grace, after=after, limit=_PAGE
            )
            if not page:
                self._is_behind, self._left_out = False, 0
                return
            after = page[-1].run_id
            ours = self.executing()
            for left in page:
                if left.run_id in ours or left.run_id in self._unwanted:
                    continue
                policy = self._find_policy(left.workflow_slug)
                if left.status is not Status.COMPLETED or policy.wants(left.run_id, left.seconds):
                    self._want(left.run_id)
                else:
                    self._settle(left.run_id, left.epoch)
