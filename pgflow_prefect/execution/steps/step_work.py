"""The work on a step: its handler is executed, and its result is reported to PostgreSQL."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from pgflow_prefect.database.step_connection import Connector
from pgflow_prefect.database.step_transaction import Logger, StepTransaction
from pgflow_prefect.database.translation import is_of_report
from pgflow_prefect.errors import (
    PgflowPrefectError,
    ReportRefusedError,
    ResultInvalidError,
    RunNotPendingError,
    StepTimeoutError,
    SupersededError,
    TransientError,
)
from pgflow_prefect.execution.process.host import ActiveRun, StepEnvironment, Stop
from pgflow_prefect.execution.step_writer import StepWriter
from pgflow_prefect.execution.steps.returned import settle
from pgflow_prefect.execution.steps.run_results import RunResults
from pgflow_prefect.execution.steps.step_cache import RunCache
from pgflow_prefect.handlers.base import AsyncStepContext, Deferred, FailedStep, Handler, StepContext, StepExecution
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.handlers.containment import contain
from pgflow_prefect.handlers.outcomes import Decided
from pgflow_prefect.handlers.stored import StepResults
from pgflow_prefect.models import AnyOutcome, Claim, Report, TaskKey, find_source, is_skipping
from pgflow_prefect.prefect_api.states import handed_back, superseded
from pgflow_prefect.state_names import Observer


class StoppedError(Exception):
    """The handler was interrupted because its run is stopped; this does not end the step."""

    def __init__(self, run_id: UUID, reason: Stop) -> None:
        message = f"run {run_id} was stopped here: {reason}"
        super().__init__(message)
        self.reason = reason
        states = {Stop.ENDED: Cancelled(message=message), Stop.LOST: superseded(message)}
        self.state: State[Any] = states.get(reason) or handed_back(message)


@dataclass
class StepWork:
    """The work on a step of a run that is under way.

    Attributes:
        handlers: the handlers that may do its work.
        workflow_slug: the run's workflow.
        upstream: the slugs of the steps that it waits for.
        task_run_id: Prefect's task run.
        writer: writes for the run.
        host: the process that executes it.
        observe: called with every state that the step enters.
        run: the run, which may be stopped.
        results: what the code says of results in a storage.
        claim_next: claims the steps that this step's completion makes ready, in the same statement.
        is_broken_off: tells whether all steps of the run are being cancelled here, without its `ActiveRun`.
        logger: of Prefect's task run; by default, of the current one.
        may_follow_failure: the step may run after a failure, so its handler is told of the run's failed steps.
        cached_from: the run whose result was reported as this step's, if it was.
    """

    handlers: StepHandlers
    workflow_slug: str
    upstream: tuple[str, ...]
    task_run_id: UUID
    writer: StepWriter
    host: StepEnvironment
    observe: Observer
    run: ActiveRun
    results: RunResults
    claim_next: Callable[[str], None] = lambda slug: None
    is_broken_off: Callable[[], bool] = lambda: True
    logger: Logger | None = None
    may_follow_failure: bool = False
    cached_from: str | None = field(default=None, init=False)

    @property
    def slug(self) -> str:
        """The step's slug."""
        return self.handlers.step_slug

    @property
    def task(self) -> TaskKey:
        """The only task of a plain step."""
        return TaskKey(self.slug)

    @cached_property
    def task_run_logger(self) -> Logger:
        """The logger whose messages show under the task run."""
        return self.logger or get_run_logger()

    @property
    def _connector(self) -> Connector:
        settings = self.host.settings
        return Connector(self.host.dsn, settings.connect_timeout, settings.report_timeout, settings.statement_bound)

    def make_transaction(self) -> StepTransaction:
        """Return the transaction of `context.connection`. It opens when a handler uses it."""
        return StepTransaction(self._connector, self.writer.run_id, self.task, self.task_run_logger, self.host.store)

    async def find_failed(self) -> tuple[FailedStep, ...]:
        """Return the failed steps that the handler is told of, in the order of their ends."""
        function = self.handlers.function
        if not self.may_follow_failure or function is None or "context" not in function.arguments:
            return ()
        failed = await self.writer.list_failed_steps()
        return tuple(FailedStep(each.step_slug, each.error_message or "") for each in failed)

    def make_execution(
        self, claim: Claim, transaction: StepTransaction, *, failed: tuple[FailedStep, ...] = (), shadow: bool = False
    ) -> StepExecution:
        """Return what the handler gets for this attempt."""
        function = self.handlers.function
        make_context = AsyncStepContext if function is not None and function.is_async else StepContext
        context = make_context(
            run_id=self.writer.run_id,
            workflow_slug=self.workflow_slug,
            step_slug=self.slug,
            index=self.task.index,
            attempt=claim.attempt,
            logger=self.task_run_logger,
            shadow=shadow,
            failed_steps=failed,
            **list_dates(claim),
        )
        results = self.results.open(self.host.toolbox, self.writer.run_id, self.task, claim.attempt)
        return StepExecution.of(context, transaction, settle, results, self._make_cache(results))

    def _make_cache(self, results: StepResults) -> RunCache | None:
        function = self.handlers.function
        if function is None or function.cache is None:
            return None
        look_up = partial(self.writer.find_cached, self.task)
        return RunCache(self.workflow_slug, self.slug, function.function, results, look_up, self.task_run_logger)

    async def work(self, handler: Handler, claim: Claim, execution: StepExecution) -> str | Decided | Deferred:
        """Execute the handler, and return its result.

        Raises:
            StoppedError: the run is stopped here.
            StepTimeoutError: it takes too long.
        """
        if handler is self.handlers.function and not execution.context.shadow:
            self.results.check(self.slug, self.host.toolbox)
        timeout = handler.policy.timeout_seconds
        # Not Prefect's own time-out: it would cancel the task before the report reaches PostgreSQL.
        with self.run.work(timeout):
            try:
                return await contain(handler.execute(claim, self.upstream, execution), self.is_broken_off)
            except Exception as error:
                if self.run.stopped is not None:  # an error of a handler that is being stopped is no failure
                    raise StoppedError(self.run.run_id, self.run.stopped) from error
                raise
        if self.run.stopped is not None:
            raise StoppedError(self.run.run_id, self.run.stopped)
        raise StepTimeoutError(f"step {self.slug!r} took longer than {timeout:g} s")

    async def complete(self, claim: Claim, decided: str | Decided, transaction: StepTransaction) -> Report:
        """Report what a handler has returned, in its own transaction if it has opened one.

        Raises:
            ResultInvalidError: the result is too big, or jsonb can't hold it.
            ReportRefusedError: PostgreSQL refused the report.
        """
        result, outcome = split(decided)
        self.cached_from = find_source(outcome)
        size = len(result.encode("utf-8", "surrogatepass"))
        limit = self.host.settings.result_limit
        if size > limit:
            raise ResultInvalidError(
                f"step {self.slug!r}: the result has {size:,} bytes of JSON, more than the limit of {limit:,} "
                "(PGFLOW_RESULT_LIMIT). Keep it in a storage, by @workflow.step(result_storage=…) or "
                "PGFLOW_RESULT_STORAGE: see `pgflow-prefect guide results`"
            )
        try:
            if transaction.is_open:
                return await transaction.complete(
                    result, outcome, epoch=self.writer.fence, attempt=claim.attempt, task_run_id=self.task_run_id
                )
            if not is_skipping(outcome):
                self.claim_next(self.slug)
            return await self.writer.complete(
                self.task, result, task_run_id=self.task_run_id, attempt=claim.attempt, outcome=outcome
            )
        except ResultInvalidError as error:
            raise ResultInvalidError(f"step {self.slug!r}: jsonb can't hold the result: {error}") from error
        except (TransientError, SupersededError, RunNotPendingError):
            raise
        except PgflowPrefectError as error:
            if transaction.is_open and not is_of_report(error):
                raise  # at the COMMIT: the handler's own writes are the reason
            raise ReportRefusedError(f"step {self.slug!r} is done, and its report was refused: {error}") from error

    async def complete_again(self, claim: Claim, result: str | Decided) -> Report:
        """Report once more. The count of a stale write was rolled back with a transaction whose report was refused."""
        text, outcome = split(result)
        return await self.writer.complete(
            self.task, text, task_run_id=self.task_run_id, attempt=claim.attempt, outcome=outcome
        )


def _to_utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.astimezone(UTC)


def list_dates(claim: Claim) -> dict[str, Any]:
    """Return the dates of the run, as a context has them."""
    return {
        "logical_date": _to_utc(claim.logical_date),
        "data_interval_start": _to_utc(claim.interval_start),
        "data_interval_end": _to_utc(claim.interval_end),
    }


def split(decided: str | Decided) -> tuple[str, AnyOutcome | None]:
    """Return the JSON text of a result, and what else was decided."""
    return (decided.result, decided.outcome) if isinstance(decided, Decided) else (decided, None)
