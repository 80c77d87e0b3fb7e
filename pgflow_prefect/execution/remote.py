"""A step for a task runner, with everything that another thread, process or machine needs to execute it."""

import inspect
import sys
import sysconfig
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import cloudpickle
from anyio import to_thread
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.states import Crashed
from pydantic import SecretStr

from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError
from pgflow_prefect.execution.process.external_steps import Watch
from pgflow_prefect.execution.process.host import ActiveRun, StepEnvironment
from pgflow_prefect.execution.process.pool_watch import PoolWatch
from pgflow_prefect.execution.process.resources import open_toolbox
from pgflow_prefect.execution.process.shared_store import Shared, borrow
from pgflow_prefect.execution.process.slots import Turns
from pgflow_prefect.execution.reporting.console_logs import clean_consoles
from pgflow_prefect.execution.reporting.handler_logs import show_logs
from pgflow_prefect.execution.reporting.task_runs import StepTask
from pgflow_prefect.execution.reporting.tracebacks import trim_tracebacks
from pgflow_prefect.execution.step_writer import StepWriter
from pgflow_prefect.execution.steps.run_results import RunResults
from pgflow_prefect.execution.steps.step import Step
from pgflow_prefect.execution.steps.step_task import make_task, set_policy
from pgflow_prefect.handlers.base import RetryPolicy
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.settings import Settings
from pgflow_prefect.waiting import Backoff

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@dataclass(frozen=True)
class RemoteStep:
    """One step of a run in an epoch: it claims, works and reports wherever it is executed.

    It reads its input from PostgreSQL and writes its result there: neither travels with the step.

    Attributes:
        handlers: the handlers that may do its work.
        workflow_slug: the run's workflow.
        upstream: the slugs of the steps that it waits for.
        run_id: the run.
        epoch: in which its flow run took it.
        results: what the code says of its result and of those of its upstream steps.
        token: lets a thread of the flow run's own process borrow its connections.
        dsn: the database.
        settings: the limits.
        may_follow_failure: as of `Step`.
        is_map: it is executed for each item of an array.
    """

    handlers: StepHandlers
    workflow_slug: str
    upstream: tuple[str, ...]
    run_id: UUID
    epoch: int
    results: RunResults
    token: UUID
    dsn: SecretStr
    settings: Settings
    may_follow_failure: bool = False
    is_map: bool = False

    def make_task(self) -> StepTask:
        """Return the task that Prefect runs."""
        step = replace(self, handlers=_prepare(self.handlers))

        async def perform(upstream: None = None) -> State[None] | None:
            return await step.perform()

        task = make_task(step.handlers, perform)
        if self.is_map:
            set_policy(task, RetryPolicy())  # each item is tried again by itself
        return task

    async def perform(self) -> State[None] | None:
        """Make one attempt, here, as the current task run."""
        context = TaskRunContext.get()
        assert context is not None
        trim_tracebacks()
        clean_consoles()
        if self.handlers.function is not None:
            show_logs([self.handlers.function.function])
        try:
            store, watch = await self._borrow()
        except PgflowPrefectError as error:
            return Crashed(message=str(error))
        # A row may bind the step to a work pool during the run.
        pools = PoolWatch(store, self.results.installation, self.settings.report_timeout)
        with closing(pools):
            return await self._perform(context, store, watch, pools)

    async def _perform(
        self, context: TaskRunContext, store: Store, watch: Watch, pools: PoolWatch
    ) -> State[None] | None:
        assert isinstance(context.task, StepTask)
        async with open_toolbox(self.settings) as toolbox:
            dsn = self.dsn.get_secret_value()
            step = Step(
                handlers=self.handlers,
                workflow_slug=self.workflow_slug,
                upstream=self.upstream,
                task_run_id=context.task_run.id,
                writer=StepWriter(store, self.run_id, self.epoch, self.settings.report_timeout),
                host=StepEnvironment(self.settings, dsn, store, toolbox, watch, pools),
                observe=_ignore,
                run=ActiveRun(self.run_id, self.epoch, Turns(1)),
                results=self.results,
                may_follow_failure=self.may_follow_failure,
                is_map=self.is_map,
            )
            return await step.perform(context.task)

    async def _borrow(self) -> Shared:
        """Return the connections of this process, as soon as the database answers."""
        backoff = Backoff(self.settings.report_timeout, f"run {self.run_id}, step {self.handlers.step_slug!r}")
        settings = self.settings.model_copy(update={"dsn": self.dsn})
        while True:
            try:
                return await to_thread.run_sync(borrow, self.token, self.dsn.get_secret_value(), settings)
            except DatabaseUnavailableError as error:
                if not await backoff.pause(error):
                    raise


def _prepare(handlers: StepHandlers) -> StepHandlers:
    """Return handlers that can be pickled, and unpickled on a machine without the user's file."""
    if handlers.function is None:
        return handlers
    module = inspect.getmodule(handlers.function.function)
    if module is not None and module is not sys.modules.get("__main__") and not _is_installed(module):
        cloudpickle.register_pickle_by_value(module)
    return replace(handlers, function=replace(handlers.function))  # without its caches


def _is_installed(module: Any) -> bool:  # noqa: ANN401  a module's attributes are its own
    return str(getattr(module, "__file__", "")).startswith(_INSTALLED)


def _ignore(step_slug: str, state_name: str) -> None:
    """Ignore a state: the process that waits for the step reports it."""
