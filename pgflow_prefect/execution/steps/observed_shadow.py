"""Executes a handler beside a task that Airflow has completed: with the same input, and without any effect here."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import anyio
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import TaskRun
from prefect.context import TaskRunContext

from pgflow_prefect.database.mirror_statements import BegunShadow, DueShadow
from pgflow_prefect.database.step_connection import Connector
from pgflow_prefect.database.step_transaction import Logger, StepTransaction
from pgflow_prefect.errors import StepTimeoutError
from pgflow_prefect.execution.process.host import StepEnvironment
from pgflow_prefect.execution.steps.returned import settle
from pgflow_prefect.execution.steps.run_results import RunResults
from pgflow_prefect.execution.steps.shadow import Shadow
from pgflow_prefect.execution.steps.step_task import make_task
from pgflow_prefect.execution.steps.step_work import list_dates
from pgflow_prefect.handlers.base import AsyncStepContext, Deferred, StepContext, StepExecution
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.handlers.containment import contain
from pgflow_prefect.handlers.outcomes import Decided
from pgflow_prefect.handlers.python import PythonHandler
from pgflow_prefect.models import Claim, Status, TaskKey
from pgflow_prefect.prefect_api.internals import ResultStore, patch_print
from pgflow_prefect.wording import clean

LONGEST = 3600.0
"""Seconds that a handler without a time-out may take beside Airflow: the next shadow waits for it."""


@dataclass(frozen=True)
class ObservedShadow:
    """A handler beside a task of Airflow's.

    Attributes:
        host: this process.
        client: Prefect's API, for what the handler asks there.
        handlers: of the step; they have a function.
        due: the step.
        begun: its input, and its result in Airflow.
        upstream: the steps that it waits for.
        results: what the code says of results in a storage.
        logger: shows in Prefect, under the task run of the step.
    """

    host: StepEnvironment
    client: PrefectClient
    handlers: StepHandlers
    due: DueShadow
    begun: BegunShadow
    upstream: tuple[str, ...]
    results: RunResults
    logger: Logger

    async def compare(self) -> str:
        """Execute the handler, store the comparison with Airflow's result, and return it in words."""
        shadow = Shadow(self.host.store, self.due.run_id, TaskKey(self.due.step_slug), self.logger)
        if self.begun.unread:
            shadow.refuse(self._describe_unread())
        else:
            with shadow.timed():
                shadow.result = await self._execute()
        return await shadow.compare(self.begun.result, note=self._describe_conf())

    def _describe_unread(self) -> str:
        notes = self.begun.notes
        named = [f"step {slug!r}: {notes.get(slug) or notes.get('') or 'it'}" for slug in self.begun.unread]
        return f"not compared, because Airflow's results are not here: {'; '.join(named)}"

    def _describe_conf(self) -> str | None:
        """Return why the handler's payload is not what Airflow's task has got."""
        said = self.begun.notes.get("", "")
        if not self._function.wants_payload or not said.startswith("its conf"):
            return None
        return f"the payload is not what Airflow's task has got: {said}"

    @property
    def _function(self) -> PythonHandler:
        assert self.handlers.function is not None
        return self.handlers.function

    async def _execute(self) -> str | Deferred:
        """Return the handler's result as JSON; what it writes through `context.connection` is rolled back."""
        claim = Claim(
            status=Status.PENDING,
            attempt=self.begun.attempt,
            payload=self.begun.payload,
            upstream_results=self.begun.upstream_results,
            logical_date=self.begun.logical_date,
            interval_start=self.begun.interval_start,
            interval_end=self.begun.interval_end,
        )
        seconds = self._function.policy.timeout_seconds or LONGEST
        with anyio.move_on_after(seconds), self._entered():
            async with self._make_transaction() as transaction:
                execution = self._make_execution(claim, transaction)
                worked = await contain(self._function.execute(claim, self.upstream, execution))
                return worked.result if isinstance(worked, Decided) else worked
        raise StepTimeoutError(f"step {self.due.step_slug!r} took longer than {seconds:g} s")

    def _make_transaction(self) -> StepTransaction:
        settings, key = self.host.settings, TaskKey(self.due.step_slug)
        connector = Connector(
            self.host.dsn, settings.connect_timeout, settings.report_timeout, settings.statement_bound
        )
        return StepTransaction(connector, self.due.run_id, key, self.logger, self.host.store)

    def _make_execution(self, claim: Claim, transaction: StepTransaction) -> StepExecution:
        make = AsyncStepContext if self._function.is_async else StepContext
        context = make(
            run_id=self.due.run_id,
            workflow_slug=self.due.workflow_slug,
            step_slug=self.due.step_slug,
            attempt=claim.attempt,
            logger=self.logger,
            shadow=True,
            **list_dates(claim),
        )
        task = TaskKey(self.due.step_slug)
        results = self.results.open(self.host.toolbox, self.due.run_id, task, claim.attempt)
        return StepExecution.of(context, transaction, settle, results)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Be the task run of the step, for handlers that ask for Prefect's logger or context."""
        task_run = TaskRun(
            id=self.begun.task_run_id,
            flow_run_id=self.begun.flow_run_id,
            name=clean(self.due.step_slug),
            task_key=clean(self.due.step_slug),
            dynamic_key=str(self.begun.task_run_id),
            run_count=self.begun.attempt,
        )
        context = TaskRunContext(
            task=make_task(self.handlers, _never),
            task_run=task_run,
            log_prints=self.begun.flow_run_id is not None,
            parameters={},
            result_store=ResultStore(),
            client=self.client,
            persist_result=False,
        )
        with context, patch_print() if context.log_prints else nullcontext():
            yield


async def _never(_: None) -> Any:  # noqa: ANN401  the shape of a step's task
    raise AssertionError("the task of a shadow is never run")
