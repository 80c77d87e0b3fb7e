"""One step as a Prefect task: claim, work, finish in PostgreSQL, and only then return to Prefect."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import anyio
from anyio import CancelScope
from prefect import Task, get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.states import Cancelled, Completed, Crashed

from pgflow_prefect.database.step_connection import Connector
from pgflow_prefect.database.step_transaction import StepTransaction
from pgflow_prefect.database.translation import TransientError
from pgflow_prefect.errors import (
    NotRetriableError,
    ResultInvalidError,
    RunNotPendingError,
    StepTimeoutError,
    SupersededError,
)
from pgflow_prefect.execution.host import ActiveRun, Stop
from pgflow_prefect.execution.mirror import Backoff, Mirror
from pgflow_prefect.execution.states import handed_back, superseded
from pgflow_prefect.handlers.base import Handler, StepContext
from pgflow_prefect.models import Claim, Report, Status


class _StoppedError(Exception):
    """The handler was interrupted, because its run is stopped: no end of the step."""

    def __init__(self, run_id: UUID, reason: Stop) -> None:
        message = f"run {run_id} was stopped here: {reason}"
        super().__init__(message)
        states = {Stop.ENDED: Cancelled(message=message), Stop.LOST: superseded(message)}
        self.state: State[Any] = states.get(reason) or handed_back(message)


Observer = Callable[[str, str], None]
"""Called with a step's slug and the name of the state that it entered, in Prefect's words."""


@dataclass(frozen=True)
class Step:
    """A step of a run that is under way.

    Attributes:
        handler: does its work.
        workflow_slug: the run's workflow.
        upstream: the slugs of the steps that it waits for.
        task_run_id: Prefect's task run.
        mirror: writes for the run.
        result_limit: bytes of JSON that the result may have.
        observe: hears of every state that the step enters.
        run: the run, which may be stopped.
        task_scope: ends the step's task while it waits for its next attempt.
        connector: opens `context.connection`; without it, there is none.
    """

    handler: Handler
    workflow_slug: str
    upstream: tuple[str, ...]
    task_run_id: UUID
    mirror: Mirror
    result_limit: int
    observe: Observer = field(repr=False)
    run: ActiveRun = field(repr=False)
    task_scope: CancelScope = field(repr=False)
    connector: Connector | None = None

    @property
    def slug(self) -> str:
        """The step's slug."""
        return self.handler.step_slug

    def make_task(self) -> Task[[None], Any]:
        """Return the task that Prefect runs: retries are Prefect's, everything else happens in `_perform`."""

        async def perform(upstream: None = None) -> State[None] | None:
            with self.run.attempt(self.slug, self.task_scope):
                return await self._perform()

        policy = self.handler.policy
        return Task(
            perform,
            name=self.slug,
            description=self.handler.description,
            task_run_name=lambda: self.slug,  # as text, it would be a template
            retries=policy.retries,
            retry_delay_seconds=policy.retry_delay_seconds,
            retry_jitter_factor=policy.retry_jitter_factor,
            retry_condition_fn=_may_retry,
            log_prints=True,
            cache_policy=NO_CACHE,
            persist_result=False,
        )

    async def _perform(self) -> State[None] | None:
        backoff = Backoff(self.mirror.patience, f"run {self.mirror.run_id}, step {self.slug!r}")
        report: Report | None = None
        try:
            while report is None:
                claim = await self._claim(again=backoff.has_begun)
                if claim is None:
                    return Completed(
                        name="Cached", message="completed before, according to PostgreSQL; not executed again"
                    )
                self.observe(self.slug, "Running")
                report = await self._execute(claim, backoff)
        except RunNotPendingError as error:
            return Cancelled(message=str(error))
        except SupersededError as error:
            return self._give_up(str(error))
        except TransientError as error:
            return Crashed(message=str(error))
        except _StoppedError as error:
            return error.state
        return self._conclude(report)

    async def _claim(self, *, again: bool) -> Claim | None:
        """Claim the step, perhaps once more after a COMMIT whose answer was lost; None where it is completed."""
        try:
            claim = await self.mirror.claim(
                self.slug,
                task_run_id=self.task_run_id,
                upstream=self.handler.choose_upstream(self.upstream),
                with_payload=self.handler.wants_payload,
            )
        except RunNotPendingError:
            # That COMMIT may have completed the run's last step, and the run with it.
            if again and await self.mirror.is_completed(self.slug):
                return None
            raise
        return None if claim.status is Status.COMPLETED else claim

    async def _execute(self, claim: Claim, backoff: Backoff) -> Report | None:
        """Do the work and report how it ended; raise what the handler raised where that report was accepted.

        Returns:
            The report; None where the transaction of `context.connection` was lost, and with it all that was done.
        """
        logger = get_run_logger()
        transaction = StepTransaction(self.connector, self.mirror.run_id, self.slug, logger)
        context = StepContext(
            run_id=self.mirror.run_id,
            workflow_slug=self.workflow_slug,
            step_slug=self.slug,
            attempt=claim.attempt,
            logger=logger,
            transaction=transaction,
        )
        try:
            async with transaction:
                result = await self._work(claim, context)
                report = await self._complete(claim, result, transaction)
        except Exception as error:
            if transaction.lost and await backoff.pause(error):
                return None
            if isinstance(error, TransientError | _StoppedError):
                raise  # not of the handler's making: its work is done, and not to be done again for this
            failed = await self._fail(claim, error)
            if failed is None or failed.status is Status.FAILED:
                raise
            return failed
        if transaction.is_open and not transaction.committed:
            # Refused, and if it was a stale write, its count was rolled back with the rest: refused once more.
            return await self.mirror.complete(self.slug, result, task_run_id=self.task_run_id, attempt=claim.attempt)
        return report

    async def _work(self, claim: Claim, context: StepContext) -> str:
        timeout = self.handler.policy.timeout_seconds
        # Not Prefect's own time-out: it would cancel the task before PostgreSQL is told.
        with anyio.move_on_after(timeout) as scope:
            with self.run.work():
                return await self.handler.execute(claim, self.upstream, context)
            assert self.run.stopped is not None
            raise _StoppedError(self.run.run_id, self.run.stopped)
        assert scope.cancelled_caught
        raise StepTimeoutError(f"step {self.slug!r} took longer than {timeout:g} s")

    async def _complete(self, claim: Claim, result: str, transaction: StepTransaction) -> Report:
        size = len(result.encode("utf-8", "surrogatepass"))
        if size > self.result_limit:
            raise ResultInvalidError(
                f"step {self.slug!r}: the result has {size:,} bytes of JSON, more than the limit of "
                f"{self.result_limit:,} (PGFLOW_RESULT_LIMIT): store it elsewhere and return its address"
            )
        try:
            if transaction.is_open:
                return await transaction.complete(
                    result, epoch=self.mirror.epoch, attempt=claim.attempt, task_run_id=self.task_run_id
                )
            return await self.mirror.complete(self.slug, result, task_run_id=self.task_run_id, attempt=claim.attempt)
        except ResultInvalidError as error:
            raise ResultInvalidError(f"step {self.slug!r}: jsonb can't hold the result: {error}") from error

    async def _fail(self, claim: Claim, error: Exception) -> Report | None:
        """Write down that an attempt failed; None where Prefect will try again, which is no end of the step."""
        message = describe(error)
        if self._is_retried(error):
            self.observe(self.slug, "AwaitingRetry")
            if self.handler.policy.retry_delay_seconds:
                await self.mirror.note_retry(self.slug, message, task_run_id=self.task_run_id)
            return None
        return await self.mirror.fail(
            self.slug,
            message,
            state_name="TimedOut" if isinstance(error, TimeoutError) else "Failed",
            task_run_id=self.task_run_id,
            attempt=claim.attempt,
        )

    def _is_retried(self, error: Exception) -> bool:
        context = TaskRunContext.get()
        assert context is not None
        return context.task_run.run_count <= self.handler.policy.retries and not isinstance(error, NotRetriableError)

    def _conclude(self, report: Report) -> State[None] | None:
        """Return what Prefect shows for a step whose report was answered; the first report has won."""
        if report.status is Status.COMPLETED:
            return None
        if report.status is Status.FAILED:
            return Cancelled(message=report.error_message)
        return self._give_up(f"its report was refused: {SupersededError(self.mirror.run_id)}")

    def _give_up(self, reason: str) -> State[None]:
        get_run_logger().warning("step %r: %s", self.slug, reason)
        return superseded(reason)


async def _may_retry(task: Task[..., object], task_run: TaskRun, state: State[object]) -> bool:
    error = await state.aresult(raise_on_failure=False)
    return not isinstance(error, NotRetriableError)


def describe(error: Exception) -> str:
    """Return an exception in one line or more: its type where that says something, and its message."""
    if isinstance(error, NotRetriableError | StepTimeoutError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
