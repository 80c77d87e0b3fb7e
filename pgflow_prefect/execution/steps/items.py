"""Executes the items of one map: it claims and reports them in batches, and gives each its own attempts."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from anyio import move_on_after

from pgflow_prefect.database.item_statements import write_reports
from pgflow_prefect.database.step_transaction import Logger, StepTransaction
from pgflow_prefect.database.translation import is_of_report
from pgflow_prefect.errors import (
    NO_REFUSALS,
    NotRetriableError,
    PgflowPrefectError,
    ReportRefusedError,
    ResultInvalidError,
    RetryLaterError,
    RunNotPendingError,
    StepTimeoutError,
    SupersededError,
    TransientError,
)
from pgflow_prefect.execution.process.host import ActiveRun
from pgflow_prefect.execution.reporting.failed_attempts import find_delay
from pgflow_prefect.execution.reporting.items import ShownItem, ShownItems
from pgflow_prefect.execution.reporting.task_runs import StepTask
from pgflow_prefect.execution.step_writer import StepWriter, clean_message
from pgflow_prefect.execution.steps.handed_over import HandedOver
from pgflow_prefect.execution.steps.returned import settle
from pgflow_prefect.execution.steps.step_task import may_retry
from pgflow_prefect.handlers.base import (
    AnyItemContext,
    AsyncItemContext,
    Deferred,
    ItemContext,
    RetryPolicy,
    StepExecution,
)
from pgflow_prefect.handlers.containment import contain
from pgflow_prefect.handlers.items import AnyEnd, ItemWork, split_results
from pgflow_prefect.handlers.outcomes import Decided
from pgflow_prefect.handlers.raised import describe
from pgflow_prefect.models import ClaimedItem, Doing, ItemReport, MapState, Report, SkipOutcome, Status

_FLUSH = 0.25
"""Seconds after which a report is sent even if few others have gathered."""

_SHORTEST_LOOK, _LONGEST_LOOK = 0.2, 5.0
"""Seconds between two looks at a map of which this process has nothing to report."""

_MOST_BYTES = 1024 * 1024  # of the results in one statement
_PAUSE_AFTER_LOSS = 1.0  # seconds before an item is tried again whose transaction was lost
_MOST_LOSSES = 30  # of an item; the next one counts as a failure of its handler
_FAILURES_LOGGED = 100


class _ItemStoppedError(Exception):
    """The handler of an item was interrupted because its run is stopped; this does not end the item."""


@dataclass
class ItemRunner:
    """The items of a map that this process executes.

    It has twice as many items as it executes at once. While one half works, the reports on the other half are sent and
    as many items claimed, in one statement.

    Attributes:
        step_slug: the map.
        workflow_slug: the run's workflow.
        work: does the work of items.
        policy: when to try an item again.
        at_once: the most calls of `work` at the same time.
        writer: writes for the run.
        run: the run, which may be stopped.
        task: of the step, for the user's condition of retries.
        logger: of the step's task run.
        result_limit: bytes of JSON that the result of an item may have.
        open_transaction: returns a transaction for the handler of items.
        is_broken_off: tells whether the step is being cancelled from outside.
        shown: shows the items in Prefect.
        told: what the contexts of all items have in common: the dates of the run, say.
    """

    step_slug: str
    workflow_slug: str
    work: ItemWork
    policy: RetryPolicy
    at_once: int
    writer: StepWriter
    run: ActiveRun
    task: StepTask
    logger: Logger
    result_limit: int
    open_transaction: Callable[[], StepTransaction]
    is_broken_off: Callable[[], bool]
    shown: ShownItems
    told: Mapping[str, Any]
    _reports: list[ItemReport] = field(default_factory=list, init=False)
    _ready: deque[ClaimedItem] = field(default_factory=deque, init=False)
    _held: dict[int, None] = field(default_factory=dict, init=False)  # claimed, and not reported
    _failures: dict[int, int] = field(default_factory=dict, init=False)  # of this process, by item
    _losses: dict[int, int] = field(default_factory=dict, init=False)  # of transactions, by item
    _overdue: set[int] = field(default_factory=set, init=False)  # claimed again, as no program has reported them
    _failures_logged: int = field(default=0, init=False)
    _working: set[asyncio.Task[None]] = field(default_factory=set, init=False)
    _raised: BaseException | None = field(default=None, init=False)
    _is_over: bool = field(default=False, init=False)  # nothing more is begun
    _is_left: bool = field(default=False, init=False)  # the step's task is being cancelled
    _has_more: bool = field(default=True, init=False)  # the latest claim got as many as it wanted
    _next_look: float = field(default=0.0, init=False)
    _look_interval: float = field(default=_SHORTEST_LOOK, init=False)
    _first_report_at: float = field(default=0.0, init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    def __post_init__(self) -> None:
        self._handed_over = HandedOver(self.policy.timeout_seconds)

    @property
    def _batch(self) -> int:
        return self.work.batch or 1

    @property
    def _half(self) -> int:
        """As many items as work at the same time."""
        return self.at_once * self._batch

    async def execute(self) -> Report | None:
        """Execute items until the map has ended, and return how; None if the run must not go on here.

        Raises:
            RunNotPendingError: the run has ended before the map.
            SupersededError: another owner has taken the run.
            TransientError: PostgreSQL does not answer.
        """
        try:
            while True:
                state = await self._exchange()
                if self._is_over and not self._working and not self._reports:
                    return self._conclude(state)
                self._begin_ready()
                while not self._is_due():
                    await self._wait()
                    self._begin_ready()
        finally:
            self._is_left = True
            for each in self._working:
                each.cancel()
            await asyncio.gather(*self._working, return_exceptions=True)

    def _conclude(self, state: MapState) -> Report | None:
        if state.report.status is not Status.PENDING:
            return state.report
        if state.run_status is not Status.PENDING:
            raise RunNotPendingError(
                f"step {self.step_slug!r}: the rest of its items is not executed: run {self.run.run_id} is "
                f"{state.run_status}"
            )
        return None

    # Statements

    async def _exchange(self) -> MapState:
        """Send the reports, and claim as many items as there is room for."""
        if self._raised is not None:
            raise self._raised
        if self.run.drained:
            self._end()
        reports = self._take_reports()
        under_way = len(self._ready) + sum(1 for _ in self._working) * self._batch
        wanted = 0 if self._is_over or self._reports else max(0, 2 * self._half - under_way)
        state = await self._send(reports, wanted)
        for report in reports:
            self._held.pop(report.item_index, None)
        self._handed_over.add([each.item_index for each in reports if each.doing is Doing.DEFER])
        self.shown.show_ends([each.item_index for each in reports])
        self._held.update(dict.fromkeys(each.index for each in state.items))
        await self._note_overdue(state.items, were_all=len(state.items) < wanted)
        self._ready.extend(state.items)
        if wanted:
            self._has_more = len(state.items) >= wanted
        self._plan_look(state, is_busy=bool(reports or state.items))
        if state.report.status is not Status.PENDING or state.run_status is not Status.PENDING:
            self._end()
        self.shown.tell(state)
        return state

    async def _note_overdue(self, claimed: Sequence[ClaimedItem], *, were_all: bool) -> None:
        """Tell the items whose time is up from those that their program has given back."""
        found = self._handed_over.take([each.index for each in claimed], were_all=were_all)
        if found:
            self._overdue |= {*found} - {*await self.writer.list_returned_items(self.step_slug, found)}

    def _take_reports(self) -> list[ItemReport]:
        size, count = 0, 0
        for report in self._reports:
            size += len(report.result or "")
            if size > _MOST_BYTES and count:
                break
            count += 1
        taken, self._reports = self._reports[:count], self._reports[count:]
        return taken

    async def _send(self, reports: Sequence[ItemReport], wanted: int) -> MapState:
        """Send reports, in halves if PostgreSQL refuses them, until the one is found that it refuses."""
        try:
            return await self.writer.work_items(self.step_slug, reports, wanted=wanted, held=self._held)
        except (TransientError, SupersededError, RunNotPendingError):
            raise
        except PgflowPrefectError as error:
            if not reports:
                raise
            if len(reports) > 1:
                middle = len(reports) // 2
                await self._send(reports[:middle], 0)
                return await self._send(reports[middle:], wanted)
            [refused] = reports
            if refused.doing is not Doing.COMPLETE:
                raise
            what = "jsonb can't hold the result" if isinstance(error, ResultInvalidError) else "its report was refused"
            message = clean_message(f"{what}: {error}")
            return await self._send(
                [ItemReport(refused.item_index, refused.attempt, Doing.FAIL, None, message)], wanted
            )

    def _plan_look(self, state: MapState, *, is_busy: bool) -> None:
        self._look_interval = _SHORTEST_LOOK if is_busy else min(_LONGEST_LOOK, self._look_interval * 2)
        pause = _LONGEST_LOOK if self._working or self._ready else self._look_interval
        if state.next_due is not None:
            pause = min(pause, max(state.next_due, 0.0))
        self._next_look = monotonic() + pause

    def _end(self) -> None:
        """Begin no further item. What was claimed and not begun is left to the next owner."""
        self._is_over = True
        self._ready.clear()

    # When the next statement is due

    def _is_due(self) -> bool:
        if self._raised is not None or (self.run.drained and not self._is_over):
            return True
        now, is_idle = monotonic(), not self._working and not self._ready
        if self._reports and (is_idle or len(self._reports) >= self._half or now >= self._first_report_at + _FLUSH):
            return True
        if self._is_over:
            return is_idle
        has_room = not self._ready and len(self._working) < self.at_once
        return (has_room and self._has_more) or now >= self._next_look

    async def _wait(self) -> None:
        """Wait until an item has ended, or the next look is due."""
        until = self._next_look if not self._is_over else monotonic() + _LONGEST_LOOK
        if self._reports:
            until = min(until, self._first_report_at + _FLUSH)
        at_most = max(0.0, until - monotonic())
        if self._working or self._ready or self.run.drained:
            await self._wait_for_change(at_most)
        else:  # others have the rest: other steps and runs work meanwhile
            # The limit is inside: it does not end the wait for the next turn.
            async with self.run.turns.pause(self.step_slug):
                await self._wait_for_change(at_most)
        self._changed.clear()

    async def _wait_for_change(self, at_most: float) -> None:
        with move_on_after(at_most):
            if self.run.drained:
                await self._changed.wait()
            else:
                with self.run.wait():
                    await self._changed.wait()

    # Items

    def _begin_ready(self) -> None:
        while self._ready and len(self._working) < self.at_once and not self._is_over:
            items = self._take_batch()
            task = asyncio.get_running_loop().create_task(self._work_on(items))
            self._working.add(task)
            task.add_done_callback(self._note_end)

    def _take_batch(self) -> list[ClaimedItem]:
        """Return the next items, all of which are overdue, or none: a batch succeeds or fails as a whole."""
        are_overdue = self._ready[0].index in self._overdue
        taken: list[ClaimedItem] = []
        while self._ready and len(taken) < self._batch and (self._ready[0].index in self._overdue) is are_overdue:
            taken.append(self._ready.popleft())
        return taken

    def _note_end(self, task: "asyncio.Task[None]") -> None:
        self._working.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._raised = self._raised or error
        self._changed.set()

    def _report(self, reports: Sequence[ItemReport]) -> None:
        if not self._reports:
            self._first_report_at = monotonic()
        self._reports.extend(reports)

    async def _work_on(self, items: Sequence[ClaimedItem]) -> None:
        shown = self.shown.begin(items)
        try:
            with shown.entered():
                reports = await self._make_attempt(items, shown)
        except _ItemStoppedError:
            shown.stop()
            return
        if reports:
            self._report(reports)
        else:  # they were committed with the handler's work
            self.shown.show_ends([each.index for each in items])

    async def _make_attempt(self, items: Sequence[ClaimedItem], shown: ShownItem) -> list[ItemReport]:
        """Execute items, and return what is to be reported of them; nothing if it was committed with their work."""
        transaction = self.open_transaction()
        try:
            async with transaction:
                end = await self._perform(items, transaction, shown)
                reports = self._describe_end(items, end)
                if transaction.is_open:
                    await self._commit(items, reports, transaction)
        except Exception as error:
            if isinstance(error, _ItemStoppedError | SupersededError):
                raise
            return await self._describe_failure(items, error, transaction, shown)
        shown.end(reports[0])
        if not transaction.is_open:
            return reports
        if not transaction.committed:  # another report on one of them was first: the handler's writes do not count
            return self._retry(items, "another report on it was first", 0.0)
        for each in items:
            self._held.pop(each.index, None)
        if reports[0].doing is Doing.DEFER:
            self._handed_over.add([each.index for each in items])
        return []

    async def _perform(self, items: Sequence[ClaimedItem], transaction: StepTransaction, shown: ShownItem) -> AnyEnd:
        timeout = self.policy.timeout_seconds
        if items[0].index in self._overdue:
            self._overdue.difference_update(each.index for each in items)
            raise StepTimeoutError(f"{self._name(items)}: no program has reported it within {timeout:g} s")
        execution = StepExecution.of(self._make_context(items, shown), transaction, settle)
        with self.run.work(timeout):
            try:
                return await contain(self.work.perform(items, execution), self._is_cancelled)
            except Exception as error:
                if self.run.stopped is not None:  # an error of a handler that is being stopped is no failure
                    raise _ItemStoppedError from error
                raise
        if self.run.stopped is not None:
            raise _ItemStoppedError
        raise StepTimeoutError(f"{self._name(items)} took longer than {timeout:g} s")

    def _is_cancelled(self) -> bool:
        return self._is_left or self.is_broken_off()

    def _make_context(self, items: Sequence[ClaimedItem], shown: ShownItem) -> AnyItemContext[Any]:
        first = items[0]
        make = AsyncItemContext if self.work.is_async else ItemContext
        return make(
            run_id=self.writer.run_id,
            workflow_slug=self.workflow_slug,
            step_slug=self.step_slug,
            attempt=first.attempt,
            logger=shown.logger or self.logger,
            index=first.index,
            item_index=first.index,
            item_indexes=tuple(each.index for each in items),
            **self.told,
        )

    def _name(self, items: Sequence[ClaimedItem]) -> str:
        which = str(items[0].index) if len(items) == 1 else f"{items[0].index} and {len(items) - 1} others"
        return f"step {self.step_slug!r}, item {which}"

    def _describe_end(self, items: Sequence[ClaimedItem], end: AnyEnd) -> list[ItemReport]:
        if isinstance(end, Deferred):
            pause = self.policy.timeout_seconds
            return [ItemReport(each.index, each.attempt, Doing.DEFER, pause=pause) for each in items]
        result, outcome = (end.result, end.outcome) if isinstance(end, Decided) else (end, None)
        if outcome is not None and "skip" not in outcome:
            raise NotRetriableError(f"{self._name(items)} can't take branches: only a whole step does")
        if outcome is not None:
            note = outcome.get("note")
            message = None if note is None else clean_message(str(note))
            return [ItemReport(each.index, each.attempt, Doing.SKIP, message=message) for each in items]
        results = [result] if self.work.batch is None else split_results(self.step_slug, result, len(items))
        for each in results:
            if (size := len(each.encode("utf-8", "surrogatepass"))) > self.result_limit:
                raise ResultInvalidError(
                    f"{self._name(items)}: the result has {size:,} bytes of JSON, more than the limit of "
                    f"{self.result_limit:,} (PGFLOW_RESULT_LIMIT): store it elsewhere and return its address"
                )
        return [
            ItemReport(item.index, item.attempt, Doing.COMPLETE, each)
            for item, each in zip(items, results, strict=True)
        ]

    async def _commit(
        self, items: Sequence[ClaimedItem], reports: Sequence[ItemReport], transaction: StepTransaction
    ) -> None:
        """Store the reports in the handler's transaction, and commit it if they are accepted."""
        doing = reports[0].doing
        if doing is Doing.DEFER:
            await transaction.defer_items(self.step_slug, self.writer.epoch, write_reports(reports))
            return
        outcome = SkipOutcome(skip=True, note=reports[0].message, cascade=True) if doing is Doing.SKIP else None
        try:
            await transaction.complete(
                f"[{','.join(each.result or 'null' for each in reports)}]",
                outcome,
                epoch=self.writer.epoch,
                item_indexes=[each.index for each in items],
                attempts=[each.attempt for each in items],
            )
        except NO_REFUSALS:
            raise
        except PgflowPrefectError as error:
            if not is_of_report(error):
                raise
            raise ReportRefusedError(f"{self._name(items)}: its report was refused: {error}") from error

    async def _describe_failure(
        self, items: Sequence[ClaimedItem], error: Exception, transaction: StepTransaction, shown: ShownItem
    ) -> list[ItemReport]:
        """Return whether items are tried again after an error, or have failed for good."""
        message = clean_message(describe(error))
        if self._is_lost(items, error, transaction):
            # Not the handler's fault: its work was rolled back, and this attempt does not count.
            shown.retry(error, _PAUSE_AFTER_LOSS)
            return self._retry(items, message, _PAUSE_AFTER_LOSS)
        if self.writer.decides_about_retries:
            return await self._report_attempt(items, error, message, shown)
        failures = max(self._failures.get(each.index, 0) for each in items) + 1
        if await self._is_retried(error, failures):
            if isinstance(error, RetryLaterError) and error.after is not None:
                pause = error.after
            else:
                pause = find_delay(self.policy.retry_delay_seconds, self.policy.retry_jitter_factor, failures - 1)
            self._failures |= dict.fromkeys((each.index for each in items), failures)
            shown.retry(error, pause)
            return self._retry(items, message, pause)
        for each in items:
            self._failures.pop(each.index, None)
        self._log_failure(items, error, shown)
        reports = [ItemReport(each.index, each.attempt, Doing.FAIL, message=message) for each in items]
        shown.fail(error)
        return reports

    async def _report_attempt(
        self, items: Sequence[ClaimedItem], error: Exception, message: str, shown: ShownItem
    ) -> list[ItemReport]:
        """Return that the attempt has failed: the database decides what follows."""
        pause = await self.writer.foresee_retry(self.workflow_slug, self.step_slug, items[0].attempt)
        if pause is None:
            self._log_failure(items, error, shown)
            shown.fail(error)
        else:
            shown.retry(error, pause)
        return [ItemReport(each.index, each.attempt, Doing.FAIL, message=message) for each in items]

    def _is_lost(self, items: Sequence[ClaimedItem], error: Exception, transaction: StepTransaction) -> bool:
        """Tell whether the database has caused an error, unless it causes it again and again."""
        if not (transaction.lost or transaction.is_cut_off or isinstance(error, TransientError)):
            return False
        losses = max(self._losses.get(each.index, 0) for each in items) + 1
        self._losses |= dict.fromkeys((each.index for each in items), losses)
        return losses <= _MOST_LOSSES

    def _retry(self, items: Sequence[ClaimedItem], message: str, pause: float) -> list[ItemReport]:
        return [ItemReport(each.index, each.attempt, Doing.RETRY, message=message, pause=pause) for each in items]

    async def _is_retried(self, error: Exception, failures: int) -> bool:
        if failures > self.policy.retries or isinstance(error, NotRetriableError):
            return False
        condition = self.policy.retry_condition
        return condition is None or await may_retry(condition, self.task, error, self.logger)

    def _log_failure(self, items: Sequence[ClaimedItem], error: Exception, shown: ShownItem) -> None:
        if shown.logger is not None:
            return  # its own task run shows it
        self._failures_logged += 1
        if self._failures_logged <= _FAILURES_LOGGED:
            self.logger.error("%s has failed: %s", self._name(items), describe(error))
        elif self._failures_logged == _FAILURES_LOGGED + 1:
            self.logger.error("step %r: further failures of items are not logged", self.step_slug)
