"""One step as a Prefect task: it claims, works, reports to PostgreSQL, and only then returns to Prefect."""

from asyncio import Future
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from time import monotonic

from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.states import Cancelled, Completed, Crashed, Failed
from prefect.types import DateTime
from pydantic import TypeAdapter

from pgflow_prefect.bindings import Kind
from pgflow_prefect.database.step_transaction import StepTransaction
from pgflow_prefect.errors import (
    NoConnectionError,
    NotRetriableError,
    PgflowPrefectError,
    ResultInvalidError,
    RetryLaterError,
    RunNotPendingError,
    SupersededError,
    TransientError,
    WriteRefusedError,
)
from pgflow_prefect.execution.process.host import Stop
from pgflow_prefect.execution.reporting.items import ShownItems
from pgflow_prefect.execution.reporting.past import Past
from pgflow_prefect.execution.reporting.task_runs import StepTask
from pgflow_prefect.execution.steps.external_wait import await_end, run_shadow
from pgflow_prefect.execution.steps.items import ItemRunner
from pgflow_prefect.execution.steps.step_names import NamedInput, name_step, rename_current
from pgflow_prefect.execution.steps.step_task import make_request, make_task, may_retry, set_policy
from pgflow_prefect.execution.steps.step_work import StepWork, StoppedError, list_dates
from pgflow_prefect.handlers.base import Deferred, Handler, RetryPolicy
from pgflow_prefect.handlers.choice import Chosen
from pgflow_prefect.handlers.items import make_item_work
from pgflow_prefect.handlers.outcomes import Decided
from pgflow_prefect.handlers.raised import describe
from pgflow_prefect.handlers.work_pool import WorkPoolHandler
from pgflow_prefect.models import Claim, Ending, Outcome, Report, Status
from pgflow_prefect.prefect_api.states import refused, skipped, superseded
from pgflow_prefect.state_names import StateName
from pgflow_prefect.waiting import Backoff

_DATE_TIME: TypeAdapter[DateTime] = TypeAdapter(DateTime)

_FRESH = 1.0  # seconds for which an earlier claim is as good as a new one

_DONE_BY_OTHERS = "completed outside Prefect"


@dataclass(frozen=True)
class ClaimAhead:
    """A claim that was sent with the completion that makes the step ready.

    Attributes:
        answer: the database's answer.
        asked_at: by the monotonic clock.
    """

    answer: Future[Claim]
    asked_at: float


@dataclass
class Step(StepWork):
    """A step of a run that is under way; its other attributes are those of its work.

    Attributes:
        claimed: the claim that came with the completion of its last upstream step.
        past: the times that Prefect shows for a step that was completed before; by default, now.
        rename: gives the task run another name; by default, the current one.
        is_map: its handler is executed for each item of an array.
        shown_items: shows those in Prefect.
    """

    claimed: ClaimAhead | None = None
    past: Past | None = None
    rename: Callable[[str], None] = rename_current
    is_map: bool = False
    shown_items: ShownItems = field(default_factory=ShownItems)
    _policy: RetryPolicy = field(init=False)
    _task: StepTask = field(init=False)
    _is_handed_over: bool = field(default=False, init=False)
    _is_named: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        # Of a map, each item is tried again by itself.
        self._policy = RetryPolicy() if self.is_map else self.handlers.policy

    def make_task(self) -> StepTask:
        """Return the task that Prefect runs: Prefect decides about retries, `perform` does everything else."""

        async def perform(upstream: None = None) -> State[None] | None:
            return await self.perform(self._task)

        self._task = make_task(self.handlers, perform)
        set_policy(self._task, self._policy)
        return self._task

    async def perform(self, task: StepTask) -> State[None] | None:
        """Make one attempt as a run of this task, and return the state in which it ends; None for Completed."""
        self._task = task
        with self.run.attempt(self.slug):
            return await self._perform()

    def _adopt(self, policy: RetryPolicy) -> None:
        """Give Prefect the retry policy of the step's handler, which may have changed since the last attempt."""
        self._policy = policy
        set_policy(self._task, policy)

    async def _perform(self) -> State[None] | None:
        try:
            end = await self._reach_end()
        except RunNotPendingError as error:
            return Cancelled(message=str(error))
        except SupersededError as error:
            return self._give_up(str(error))
        except TransientError as error:
            return Crashed(message=str(error))
        except WriteRefusedError as error:
            self._task.retries = 0  # the run is set aside
            return refused(f"PostgreSQL refuses to note step {self.slug!r}: {error}")
        except StoppedError as error:
            was_done = error.reason is Stop.ENDED and await self.writer.is_completed(self.slug)
            return Completed(message=_DONE_BY_OTHERS) if was_done else error.state
        return await self._conclude(end) if isinstance(end, Report) else end

    async def _reach_end(self) -> Report | State[None]:
        """Claim and execute the step until an attempt counts; return the report, or the state to show without one."""
        backoff = Backoff(self.writer.patience, f"run {self.writer.run_id}, step {self.slug!r}")
        end: Report | State[None] | None = None
        while end is None:
            claim = await self._claim_or_fail(again=backoff.has_begun)
            if isinstance(claim, Report):
                return claim
            if claim.status is not Status.PENDING:
                return self._show_ended(claim)
            end = await self._execute(claim, backoff)
        return end

    async def _claim_or_fail(self, *, again: bool) -> Claim | Report:
        """Claim the step; fail it if its input is beyond the limits, because no owner could ever read it.

        Returns:
            The claim, or the report if the step has another end than a failure, such as that of a step that is skipped
            where it fails.
        """
        try:
            return await self._claim(again=again)
        except Exception as error:
            if isinstance(error, PgflowPrefectError) and not isinstance(error, ResultInvalidError):
                raise
            self._task.retries = 0
            message = f"the input of step {self.slug!r} can't be read: {describe(error)}"
            report = await self.writer.fail(
                self.task, message, state_name=StateName.FAILED, task_run_id=self.task_run_id, attempt=None
            )
            if report.status is not Status.FAILED:
                self._log_skipped(report, error)
                return report
            raise ResultInvalidError(message) from error

    async def _claim(self, *, again: bool) -> Claim:
        """Claim the step, perhaps once more after a COMMIT whose answer was lost."""
        claimed, self.claimed = self.claimed, None
        if claimed is not None and monotonic() < claimed.asked_at + _FRESH:
            with suppress(PgflowPrefectError):  # this claim was not tried again, and may be out of date
                return await claimed.answer
        try:
            return await self.writer.claim(make_request(self.handlers, self.upstream, self.task_run_id))
        except RunNotPendingError:
            # That COMMIT may have completed the run's last step, and the run with it.
            if again and await self.writer.is_completed(self.slug):
                return Claim(status=Status.COMPLETED, attempt=0)
            raise

    async def _execute(self, claim: Claim, backoff: Backoff) -> Report | State[None] | None:
        """Execute the handler and report the end; raise the handler's error if its report was accepted.

        Returns:
            The report, or the state to show if another program has reported. None if the step has to be claimed again:
            the transaction of `context.connection` was lost with all its work, or the step is no longer external.
        """
        transaction = self.make_transaction()
        self._is_handed_over = claim.waits
        report: Report | None = None
        try:
            chosen = self._choose(claim)
            self._adopt(chosen.policy)
            await self._name(claim, chosen)
            if chosen.handler is not None and not claim.waits:
                self.observe(self.slug, StateName.RUNNING)
                if self.is_map:
                    return await self._execute_items(claim, chosen.handler)
                async with transaction:
                    execution = self.make_execution(claim, transaction, failed=await self.find_failed())
                    result = await self.work(chosen.handler, claim, execution)
                    report = await self._hand_in(claim, result, transaction)
            if report is None:
                return await self._await_others(claim, chosen)
        except Exception as error:
            if transaction.lost and await backoff.pause(error):
                return None
            if transaction.is_cut_off or (backoff.has_begun and isinstance(error, NoConnectionError)):
                raise TransientError(f"step {self.slug!r}: context.connection was lost: {describe(error)}") from error
            if isinstance(
                error, TransientError | SupersededError | RunNotPendingError | StoppedError | WriteRefusedError
            ):
                raise  # not the handler's fault: its work is done, and must not be repeated
            failed = await self._fail(claim, error)
            if failed is None or failed.status is Status.FAILED:
                raise
            self._log_skipped(failed, error)
            return failed
        if transaction.is_open and not transaction.committed:
            assert not isinstance(result, Deferred)
            return await self.complete_again(claim, result)
        return report

    async def _name(self, claim: Claim, chosen: Chosen) -> None:
        """Give the task run the name that the code has for it, once."""
        options = self.handlers.task_options
        if options.run_name is None or self._is_named:
            return
        self._is_named = True
        function = self.handlers.function if chosen.handler is self.handlers.function else None
        given = NamedInput(claim, self.upstream, function)
        if claim.waits and options.needs_values:
            payload, results = await self.writer.read_input(self.task, [*self.upstream])
            given = given.fill(payload, results)
        name = await name_step(options.run_name, given, self.task_run_logger)
        if name is not None:
            self.rename(name)

    async def _hand_in(
        self, claim: Claim, result: str | Decided | Deferred, transaction: StepTransaction
    ) -> Report | None:
        """Report what a handler has returned; None if another program will report the step."""
        if isinstance(result, Deferred):
            await self._defer(result, transaction)
            return None
        return await self.complete(claim, result, transaction)

    def _choose(self, claim: Claim) -> Chosen:
        """Return who does the step. The policy of a map's handler is that of each item."""
        chosen = self.handlers.choose(claim, self.host.toolbox)
        return replace(chosen, policy=self._policy) if self.is_map else chosen

    async def _execute_items(self, claim: Claim, handler: Handler) -> Report:
        """Execute the items of a map, and return how it has ended."""
        if isinstance(handler, WorkPoolHandler):
            raise NotRetriableError(f"step {self.slug!r} is a map, and a work pool does plain steps only: bind it anew")
        stored = self.results.open(self.host.toolbox, self.writer.run_id, self.task, claim.attempt)
        runner = ItemRunner(
            step_slug=self.slug,
            workflow_slug=self.workflow_slug,
            work=await make_item_work(handler, claim, self.upstream, stored),
            policy=handler.policy,
            at_once=self.handlers.items_at_once,
            writer=self.writer,
            run=self.run,
            task=self._task,
            logger=self.task_run_logger,
            result_limit=self.host.settings.result_limit,
            open_transaction=self.make_transaction,
            is_broken_off=self.is_broken_off,
            shown=self.shown_items,
            told=list_dates(claim) | {"failed_steps": await self.find_failed()},
        )
        report = await runner.execute()
        if report is None:
            raise StoppedError(self.run.run_id, self.run.stopped or Stop.SHUTDOWN)
        return report

    # External steps, and steps of endpoints and queues

    async def _defer(self, deferred: Deferred, transaction: StepTransaction) -> None:
        """Note that another program was asked, so that the next owner does not ask again."""
        self._is_handed_over = True
        message = f"handed over: {deferred.reason}"
        self.task_run_logger.info("%s", message)
        if transaction.is_open:
            await transaction.defer(task_run_id=self.task_run_id, state_name=StateName.DEFERRED, message=message)
        else:
            await self.writer.note(self.task, StateName.DEFERRED, message, task_run_id=self.task_run_id)

    async def _await_others(self, claim: Claim, chosen: Chosen) -> State[None] | None:
        """Wait until another program has ended the step; return None if it has to be claimed again.

        Raises:
            SupersededError: another owner has taken the run.
            StepTimeoutError: it takes too long.
        """
        self.observe(self.slug, StateName.WAITING)
        if claim.kind == Kind.PYTHON and self.handlers.function is None:
            self.task_run_logger.warning(
                "step %r is bound to Python, and the handlers that were loaded here have none for it: waiting until it "
                "is done elsewhere, or bound otherwise",
                self.slug,
            )
        shadow = await run_shadow(self, claim, chosen.shadow) if chosen.shadow else None
        end = await await_end(self, claim, chosen)
        match end.outcome:
            case Outcome.LOST:
                raise SupersededError(self.run.run_id)
            case Outcome.REBOUND:
                if self.run.drained:  # while it waited for its turn
                    raise StoppedError(self.run.run_id, self.run.stopped or Stop.SHUTDOWN)
                return None
            case Outcome.ENDED:
                return Cancelled(message=end.message)
            case Outcome.FAILED:
                return self._show_failed(end.message, end.began_at, end.ended_at)
            case Outcome.SKIPPED:
                _show_times(end.began_at, end.ended_at)
                return skipped(end.message)
        verdict = f" ({await shadow.compare()})" if shadow is not None else ""
        _show_times(end.began_at, end.ended_at)
        return Completed(message=f"{_DONE_BY_OTHERS}: {end.message}{verdict}")

    def _show_ended(self, claim: Claim) -> State[None]:
        if claim.status is Status.FAILED:
            return self._show_failed(claim.note, claim.began_at, claim.ended_at)
        if claim.skip_reason is not None:
            return skipped(claim.note)
        if self.is_map and claim.attempt == 0:
            return Completed(message="it has no items")
        if claim.ended_at is None:
            if self.past is not None:
                _show_times(*self.past.find_times(self.slug))
            return Completed(
                name=StateName.CACHED, message="completed before, according to PostgreSQL; not executed again"
            )
        _show_times(claim.began_at, claim.ended_at)
        return Completed(message=f"{_DONE_BY_OTHERS}: {claim.note}")

    def _show_failed(self, message: str | None, began_at: datetime | None, ended_at: datetime | None) -> State[None]:
        self._task.retries = 0  # the run has failed with it
        _show_times(began_at, ended_at)
        return Failed(message=message)

    async def _fail(self, claim: Claim, error: Exception) -> Report | None:
        """Report a failed attempt; return None if Prefect will try again, because the step has not ended then."""
        message = describe(error)
        if self.writer.decides_about_retries:
            return await self._fail_attempt(claim, error, message)
        if await self._is_retried(error):
            if isinstance(error, RetryLaterError) and error.after is not None:
                self._task.retry_delay_seconds, self._task.retry_jitter_factor = [error.after], None
            self.observe(self.slug, StateName.AWAITING_RETRY)
            # The program has no task any more: the next claim is another attempt.
            if self._task.retry_delay_seconds or self._is_handed_over:
                await self.writer.note(self.task, StateName.AWAITING_RETRY, message, task_run_id=self.task_run_id)
            return None
        return await self.writer.fail(
            self.task,
            message,
            state_name=StateName.TIMED_OUT if isinstance(error, TimeoutError) else StateName.FAILED,
            task_run_id=self.task_run_id,
            attempt=None if claim.waits else claim.attempt,  # another program may have made the attempt
        )

    async def _fail_attempt(self, claim: Claim, error: Exception, message: str) -> Report | None:
        """Report a failed attempt; return None if the database will try again, and let Prefect wait as long."""
        report = await self.writer.fail(
            self.task,
            message,
            state_name=StateName.TIMED_OUT if isinstance(error, TimeoutError) else StateName.FAILED,
            task_run_id=self.task_run_id,
            attempt=None if claim.waits else claim.attempt,
        )
        if report.retry_after is None:
            self._task.retries = 0
            return report
        context = TaskRunContext.get()
        assert context is not None
        self._task.retries = context.task_run.run_count  # one more
        self._task.retry_delay_seconds, self._task.retry_jitter_factor = [report.retry_after], None
        self.observe(self.slug, StateName.AWAITING_RETRY)
        return None

    async def _is_retried(self, error: Exception) -> bool:
        context = TaskRunContext.get()
        assert context is not None
        if context.task_run.run_count > self._policy.retries or isinstance(error, NotRetriableError):
            return False
        condition = self._policy.retry_condition
        if condition is None or await may_retry(condition, self._task, error, self.task_run_logger):
            return True
        self._task.retries = 0  # Prefect must not ask again
        return False

    async def _conclude(self, report: Report) -> State[None] | None:
        """Return the state that Prefect shows after a report; the first report wins."""
        if report.skip_reason is not None and report.status is Status.COMPLETED:
            return skipped(report.skip_message)
        if report.status is Status.COMPLETED and self.cached_from is not None:
            return Completed(name=StateName.CACHED, message=f"the result of run {self.cached_from}, by cache_key_fn")
        if report.status is Status.COMPLETED:
            return None
        if report.ended_as is Ending.CANCELLED:
            return Cancelled(message=report.error_message)
        if report.status is Status.FAILED:
            return self._show_failed(report.error_message, None, None)
        return self._give_up(f"its report was refused: {await self._find_refusal()}")

    def _log_skipped(self, report: Report, error: Exception) -> None:
        """Log the error of a step that is skipped where its last attempt fails: its state is none of failure."""
        if report.skip_reason is not None:
            self.task_run_logger.warning("step %r has failed, and is skipped instead: %s", self.slug, describe(error))

    async def _find_refusal(self) -> str:
        """Return why PostgreSQL refused a report on a step that is still pending."""
        if await self.writer.is_current():
            return "another attempt of the step has been claimed since"
        return str(SupersededError(self.writer.run_id))

    def _give_up(self, reason: str) -> State[None]:
        self.task_run_logger.warning("step %r: %s", self.slug, reason)
        return superseded(reason)


def _show_times(began_at: datetime | None, ended_at: datetime | None) -> None:
    """Let Prefect show the time of the work, not the time when this process noticed it."""
    context = TaskRunContext.get()
    assert context is not None
    if began_at is not None and ended_at is not None:
        context.task_run.start_time = _DATE_TIME.validate_python(began_at)
        context.task_run.end_time = _DATE_TIME.validate_python(ended_at)
