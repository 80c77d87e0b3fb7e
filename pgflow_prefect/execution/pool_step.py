"""Does an attempt of a step in a process of a work pool, and reports it to PostgreSQL."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from uuid import UUID, uuid4

import anyio
from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Crashed, Failed

from pgflow_prefect.database.connection import find_dsn
from pgflow_prefect.database.pool_lease import PoolLease
from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.errors import DatabaseUnavailableError, NotRetriableError, RunNotPendingError, UnknownRunError
from pgflow_prefect.execution.process.external_steps import Watch
from pgflow_prefect.execution.process.host import ActiveRun, StepEnvironment, Stop
from pgflow_prefect.execution.process.pool_watch import PoolWatch
from pgflow_prefect.execution.process.resources import open_toolbox
from pgflow_prefect.execution.process.slots import Turns
from pgflow_prefect.execution.run_executor import may_follow_failure
from pgflow_prefect.execution.step_writer import StepWriter, clean_message, persist
from pgflow_prefect.execution.steps.run_results import RunResults
from pgflow_prefect.execution.steps.step_work import StepWork
from pgflow_prefect.handlers.base import Deferred, RetryPolicy, Toolbox
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.handlers.python import PythonHandler
from pgflow_prefect.handlers.raised import describe
from pgflow_prefect.models import Claim, PoolAttempt, PoolInput, Report, Status
from pgflow_prefect.prefect_api.states import skipped, superseded
from pgflow_prefect.settings import Settings

_OVER = "no run waits for this attempt any more, or another process does it"


@dataclass(frozen=True)
class PoolStep:
    """An attempt that this process of a work pool may do.

    Its lease in PostgreSQL is its own: it lives on if the owner of the run dies, and the next owner waits for it. If
    this process dies, the lease ends, and the owner decides about another attempt.

    Attributes:
        store: the database.
        settings: the limits.
        attempt: of a step.
        holder: this process.
    """

    store: Store
    settings: Settings
    attempt: PoolAttempt
    holder: UUID = field(default_factory=uuid4)

    async def begin(self) -> PoolInput | None:
        """Claim the attempt, and return its input; None if this process is not to do it."""
        try:
            return await self._persist_claim()
        except UnknownRunError:
            return None

    async def _persist_claim(self) -> PoolInput | None:
        return await persist(
            self.store,
            self.settings.report_timeout,
            lambda: self.store.begin_pool_step(self.attempt, self.holder, self.settings.lease),
            self._name,
        )

    @property
    def _name(self) -> str:
        return f"run {self.attempt.run_id}, step {self.attempt.task.step_slug!r}"

    def keep(self) -> PoolLease:
        """Return what extends the lease in a block. It begins before the handlers are imported, which may take long."""
        return PoolLease(
            self.store,
            self.attempt,
            self.holder,
            self.settings.lease,
            dsn=find_dsn(self.settings),
            connect_timeout=self.settings.connect_timeout,
        )

    async def perform(self, given: PoolInput, handlers: Mapping[str, StepHandlers], lease: PoolLease) -> State[None]:
        """Do the attempt and report it; return the state of the flow run."""
        run = ActiveRun(self.attempt.run_id, 0, Turns(1))
        lease.tell(lambda: run.stop(Stop.ENDED))
        try:
            return await self._perform(run, given, handlers)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.give_up()
            raise

    async def fail(self, message: str, *, is_final: bool) -> State[None]:
        """Tell the owner of the run that the attempt has failed, and return the state of the flow run."""
        text = clean_message(message)
        await persist(
            self.store,
            self.settings.report_timeout,
            lambda: self.store.end_pool_step(self.attempt, self.holder, text, is_final=is_final),
            self._name,
        )
        return Failed(message=text)

    async def give_up(self) -> None:
        """End the lease at once: this process stops."""
        with anyio.move_on_after(self.settings.connect_timeout):
            try:
                await self.store.end_pool_step(self.attempt, self.holder)
            except DatabaseUnavailableError as error:
                get_run_logger().warning("%s: the lease ends later: %s", self._name, error)

    async def _perform(self, run: ActiveRun, given: PoolInput, handlers: Mapping[str, StepHandlers]) -> State[None]:
        slug = self.attempt.task.step_slug
        known = handlers.get(slug)
        function = known.function if known is not None else None
        if known is None or function is None:
            return await self.fail(f"the file of handlers there has no function for step {slug!r}", is_final=True)
        # Retries and time-out are those of the binding, and the owner of the run counts them.
        function = replace(function, policy=RetryPolicy())
        try:
            report = await self._execute(run, given, handlers, replace(known, function=function), function)
        except DatabaseUnavailableError as error:
            return Crashed(message=str(error))  # its lease ends, and the owner of the run decides
        except Exception as error:  # noqa: BLE001  whatever the function raised
            if run.stopped is not None or isinstance(error, RunNotPendingError):
                return superseded(_OVER)
            get_run_logger().exception("step %r has failed", slug)
            return await self.fail(describe(error), is_final=isinstance(error, NotRetriableError))
        if report.status is not Status.COMPLETED:
            return superseded(_OVER)
        return skipped(report.skip_message) if report.skip_reason is not None else Completed()

    async def _execute(
        self,
        run: ActiveRun,
        given: PoolInput,
        handlers: Mapping[str, StepHandlers],
        known: StepHandlers,
        function: PythonHandler,
    ) -> Report:
        store, settings = self.store, self.settings
        graph = build_graph(await store.load_run_definition(self.attempt.run_id))
        installation = await persist(store, settings.report_timeout, store.use_installation, "the database")
        async with open_toolbox(settings) as toolbox:
            step = _AttemptOfPool(
                handlers=known,
                workflow_slug=given.workflow_slug,
                upstream=tuple(graph.predecessors(self.attempt.task.step_slug)),
                task_run_id=UUID(int=0),  # the owner notes the state of the step's task run
                writer=_Writer(store, self.attempt.run_id, 0, settings.report_timeout),
                host=self._make_environment(toolbox, installation.id),
                observe=_ignore,
                run=run,
                results=RunResults.of(installation.id, handlers, self.holder.hex),
                may_follow_failure=may_follow_failure(graph, self.attempt.task.step_slug),
            )
            return await step.make_attempt(function, _make_claim(self.attempt, given))

    def _make_environment(self, toolbox: Toolbox, installation: UUID) -> StepEnvironment:
        store, settings = self.store, self.settings
        pools = PoolWatch(store, installation, settings.report_timeout)
        return StepEnvironment(settings, find_dsn(settings), store, toolbox, Watch(store), pools)


class _Writer(StepWriter):
    """Reports for whichever owner the run has: the number of the attempt is the fence."""

    @property
    def fence(self) -> int | None:
        return None


class _AttemptOfPool(StepWork):
    """A step without a task run of its own: its attempt was claimed before, and its owner decides about retries."""

    async def make_attempt(self, function: PythonHandler, claim: Claim) -> Report:
        transaction = self.make_transaction()
        async with transaction:
            execution = self.make_execution(claim, transaction, failed=await self.find_failed())
            result = await self.work(function, claim, execution)
            assert not isinstance(result, Deferred)
            report = await self.complete(claim, result, transaction)
        if transaction.is_open and not transaction.committed:
            return await self.complete_again(claim, result)
        return report


def _make_claim(attempt: PoolAttempt, given: PoolInput) -> Claim:
    return Claim(
        status=Status.PENDING,
        attempt=attempt.attempt,
        payload=given.payload,
        upstream_results=given.upstream_results,
        logical_date=given.logical_date,
        interval_start=given.interval_start,
        interval_end=given.interval_end,
    )


def _ignore(step_slug: str, state_name: str) -> None:
    """Ignore a state: the owner of the run shows it."""
