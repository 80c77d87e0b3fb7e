"""The shared parts of all runs that one process executes: the database, the leases, and the ways to stop the runs."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from uuid import UUID

from anyio import CancelScope, move_on_after

from pgflow_prefect.database.connection import find_dsn
from pgflow_prefect.database.leases import LeaseKeeper, Pool
from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.definitions.graph import Graph, build_graph
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.execution.batch import Batch
from pgflow_prefect.execution.process.external_steps import Watch
from pgflow_prefect.execution.process.gathering import Gathering
from pgflow_prefect.execution.process.pool_watch import PoolWatch
from pgflow_prefect.execution.process.resources import open_toolbox
from pgflow_prefect.execution.process.shared_store import lend
from pgflow_prefect.execution.process.slots import Slot, Turns
from pgflow_prefect.execution.step_writer import persist
from pgflow_prefect.handlers.base import Toolbox
from pgflow_prefect.models import Installation, LinkedRun, LinkRequest, RunEnd, Status, TakenRun
from pgflow_prefect.settings import Settings

if TYPE_CHECKING:
    from pgflow_prefect.database.recording import BegunRun
    from pgflow_prefect.execution.reporting.unshown import UnshownFlowRun

MOST_STEPS = 100_000
"""The most steps of all definitions that a process keeps. The latest definition may have more."""

SMALL = 64 * 1024
"""The most bytes of a run's results, if its end shares a statement with the ends of other runs."""

_logger = logging.getLogger(__name__)


class Stop(StrEnum):
    """Why a run is stopped."""

    LOST = "it was taken over"
    ENDED = "it has ended"
    SHUTDOWN = "the process ends"


@dataclass(frozen=True)
class Refusal:
    """A write that PostgreSQL refuses for good.

    Attributes:
        step_slug: the step that it is about; None for the run.
        reason: of PostgreSQL.
    """

    step_slug: str | None
    reason: str


@dataclass
class ActiveRun:
    """A run that this process executes in an epoch, and the ways to stop it.

    Attributes:
        run_id: the run.
        epoch: in which it was taken.
        turns: limits how many of its steps work at the same time.
        drained: no further step begins, and working steps go on to their end.
        stopped: the reason why the working steps are stopped, too; None while they may work.
        linked: the facts from the answer that linked its flow run; None if this process did not reserve the run.
        result_sizes: bytes of the results that this process reported, by step slug.
        refusal: the first write that PostgreSQL refused for good, so that the run is set aside.
    """

    run_id: UUID
    epoch: int
    turns: Turns
    drained: bool = False
    stopped: Stop | None = None
    linked: LinkedRun | None = None
    result_sizes: Mapping[str, int] = field(default_factory=dict)
    refusal: Refusal | None = None
    _waiting: dict[str, CancelScope] = field(default_factory=dict)  # steps' tasks before an attempt, by slug
    _working: set[CancelScope] = field(default_factory=set)  # handlers
    _awaiting: set[CancelScope] = field(default_factory=set)  # waits for external steps

    def refuse(self, step_slug: str | None, reason: str) -> None:
        """Note that PostgreSQL refuses what has to be noted of this run; None if it is not about a step."""
        self.refusal = self.refusal or Refusal(step_slug, reason)

    def drain(self) -> None:
        """Begin no further step and no further attempt, and wait for no external step."""
        self.drained = True
        for scope in [*self._waiting.values(), *self._awaiting]:
            scope.cancel()

    def settle(self) -> None:
        """Interrupt the handlers of a run that completed without them. Prefect still shows the rest of the run."""
        self.stopped = self.stopped or Stop.ENDED
        for scope in self._working:
            scope.cancel()

    def stop(self, reason: Stop) -> None:
        """Stop async handlers at their next await. Sync handlers can't be stopped, and go on."""
        if self.stopped is None:
            _logger.info("run %s: stopping, %s", self.run_id, reason)
            self.stopped = reason
        self.drain()
        for scope in self._working:
            scope.cancel()

    @contextmanager
    def task(self, step_slug: str) -> Iterator[None]:
        """Run a step's task with all its attempts. Draining cancels it while it waits for an attempt."""
        with CancelScope() as scope:
            self._waiting[step_slug] = scope
            try:
                yield
            finally:
                self._waiting.pop(step_slug, None)

    @contextmanager
    def attempt(self, step_slug: str) -> Iterator[None]:
        """Make one attempt of a step: claim, work, report. After an error, the task waits for the next attempt."""
        task = self._waiting.pop(step_slug, None)  # None if a task runner executes the step, and waits itself
        try:
            yield
        except Exception:
            if task is not None:
                self._waiting[step_slug] = task
                if self.drained:
                    task.cancel()
            raise

    @contextmanager
    def wait(self) -> Iterator[CancelScope]:
        """Wait until an external worker has done a step, or the run is drained or stopped."""
        with CancelScope() as scope:
            self._awaiting.add(scope)
            if self.drained:
                scope.cancel()
            try:
                yield scope
            finally:
                self._awaiting.discard(scope)

    @contextmanager
    def work(self, at_most: float | None = None) -> Iterator[CancelScope]:
        """Do a handler's work. Stopping the run cancels the work, but no claim and no report.

        Args:
            at_most: seconds after which the work is cancelled, too.
        """
        with move_on_after(at_most) as scope:
            self._working.add(scope)
            if self.stopped:
                scope.cancel()
            try:
                yield scope
            finally:
                self._working.discard(scope)


@dataclass(frozen=True)
class Plan:
    """A definition, prepared for the runs that began with it.

    Attributes:
        definition: the definition from the database.
        graph: its graph, which no run changes.
    """

    definition: WorkflowDefinition
    graph: Graph


@dataclass
class StepEnvironment:
    """The parts that steps need.

    Attributes:
        settings: the database, and the limits.
        dsn: the database.
        store: a pool of connections to it.
        toolbox: the parts that handlers share.
        watch: waits for external steps.
        pools: has steps done on work pools.
    """

    settings: Settings
    dsn: str
    store: Store
    toolbox: Toolbox
    watch: Watch
    pools: PoolWatch

    def is_shown(self, run_id: UUID) -> bool:
        """Tell whether Prefect knows the flow run, as that of any step that another process or thread executes."""
        return True


@dataclass
class Host(StepEnvironment):
    """A process that executes runs.

    Attributes:
        keeper: extends the leases.
        token: lets threads of this process borrow the store.
        installation: identifies the database among those that share a Prefect server.
        batch: sends the claims and reports of the runs.
        places: the slots of the executing flow runs, if a limit allows only so many.
        requested: the flow runs that Prefect started, and not this process.
        active: the runs that are executed now, by id.
        unshown: those of them that began without a flow run of Prefect, by id.
        draining: set once no further step begins.
    """

    keeper: LeaseKeeper
    token: UUID
    installation: Installation
    batch: Batch
    places: dict[UUID, Slot] = field(default_factory=dict)
    requested: set[UUID] = field(default_factory=set)
    active: dict[UUID, ActiveRun] = field(default_factory=dict)
    unshown: dict[UUID, "UnshownFlowRun"] = field(default_factory=dict)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    _finishing: set[asyncio.Task[None]] = field(default_factory=set)
    _linked: dict[UUID, tuple[LinkRequest, LinkedRun]] = field(default_factory=dict)  # by run
    _prepared: dict[UUID, Plan] = field(default_factory=dict)  # by run, until that begins here
    _plans: OrderedDict[int, Plan] = field(default_factory=OrderedDict)  # by definition, the latest last

    def __post_init__(self) -> None:
        self._loading = asyncio.Lock()
        most_patient = max(1, self.store.connections // 4)
        self._links: Gathering[LinkRequest, LinkedRun] = Gathering(
            lambda links, lock_timeout: self.store.link_flow_runs(links, lock_timeout=lock_timeout), most_patient
        )
        self._beginnings: Gathering[LinkRequest, BegunRun] = Gathering(
            lambda links, lock_timeout: self.store.begin_unshown_runs(links, lock_timeout=lock_timeout), most_patient
        )
        self._ends: Gathering[tuple[UUID, Sequence[str]], RunEnd] = Gathering(
            lambda asked, _: self.store.read_ends(asked), most_patient
        )

    def is_shown(self, run_id: UUID) -> bool:
        """Tell whether Prefect knows the flow run."""
        return run_id not in self.unshown

    @property
    def executing(self) -> set[UUID]:
        """The runs that this process executes or will execute, even if it has lost their leases."""
        return {*self.active, *self.keeper.held}

    @contextmanager
    def reserve(self, run_id: UUID, epoch: int) -> Iterator[None]:
        """Hold a run that this process has just reserved, until its flow run takes it or the block ends."""
        self.keeper.hold(run_id, epoch, lambda _: None)
        try:
            yield
        finally:
            link, _ = self._linked.get(run_id, (None, None))
            if link is not None and link.epoch == epoch:  # a later reservation has its own link
                del self._linked[run_id]
            self.keeper.drop(run_id, epoch)

    async def link(self, taken: TakenRun, flow_run_id: UUID) -> bool:
        """Name the flow run that will execute a reserved run here; see `Store.link_flow_run`.

        The host keeps the facts of the answer until `begin`, or until the reservation ends.
        """
        link = LinkRequest(taken.run_id, taken.epoch, flow_run_id)
        # The flow run exists already. If PostgreSQL is away for a moment, the run should not wait for its lease to end.
        linked = await persist(
            self.store, self.settings.report_timeout, lambda: self._links.ask(link), f"run {taken.run_id}"
        )
        self._remember(link, linked)
        return linked.linked

    async def begin_unshown(self, taken: TakenRun, placeholder: UUID) -> "BegunRun":
        """Hold a run without a flow run, which this process has reserved; else as `link`."""
        link = LinkRequest(taken.run_id, taken.epoch, placeholder)
        begun = await persist(
            self.store, self.settings.report_timeout, lambda: self._beginnings.ask(link), f"run {taken.run_id}"
        )
        self._remember(link, begun)
        return begun

    def _remember(self, link: LinkRequest, linked: LinkedRun) -> None:
        if linked.linked and linked.status is Status.PENDING and linked.definition_id is not None:
            self._linked[link.run_id] = (link, linked)

    def begin(self, run_id: UUID, flow_run_id: UUID) -> tuple[int, LinkedRun] | None:
        """Return epoch and facts of a run that this process has reserved for this flow run; None for any other run.

        The second call returns None: a flow run that Prefect tries again takes its run in the next epoch.
        """
        link, linked = self._linked.pop(run_id, (None, None))
        if link is None or linked is None or link.flow_run_id != flow_run_id:
            return None
        return link.epoch, linked

    async def prepare_plan(self, run_id: UUID) -> Plan:
        """Return the definition that a run began with. The host keeps it for `load_plan`.

        Raises:
            UnknownRunError: there is no such run.
        """
        plan = self._prepared[run_id] = await self._read_plan(run_id)
        return plan

    async def load_plan(self, run: ActiveRun) -> Plan:
        """Return the definition that a run began with. Runs that began with the same definition read it once.

        Raises:
            UnknownRunError: there is no such run.
        """
        if (prepared := self._prepared.pop(run.run_id, None)) is not None:
            return prepared
        if run.linked is None or run.linked.definition_id is None:
            return await self._read_plan(run.run_id)
        definition_id = run.linked.definition_id
        async with self._loading:  # if runs begin together, one of them reads it
            if definition_id not in self._plans:
                self._plans[definition_id] = await self._read_plan(run.run_id)
            self._plans.move_to_end(definition_id)
            while (
                len(self._plans) > 1 and sum(len(each.definition.steps) for each in self._plans.values()) > MOST_STEPS
            ):
                self._plans.popitem(last=False)
            return self._plans[definition_id]

    async def _read_plan(self, run_id: UUID) -> Plan:
        definition = await self.store.load_run_definition(run_id)
        return Plan(definition, build_graph(definition))

    async def read_end(self, run: ActiveRun, step_slugs: Sequence[str]) -> RunEnd:
        """Return a run's status, and these results if it is completed; see `Store.read_end`.

        Runs that end together share a statement if this process knows that their results are small.
        """
        sizes = [run.result_sizes.get(slug, SMALL + 1) for slug in step_slugs]
        if sum(sizes) > SMALL:
            return await self.store.read_end(run.run_id, step_slugs)
        return await self._ends.ask((run.run_id, step_slugs))

    @contextmanager
    def execute(
        self, run_id: UUID, epoch: int, flow_run_id: UUID, linked: LinkedRun | None = None
    ) -> Iterator[ActiveRun]:
        """Hold a run that a flow run has just taken, until the block ends.

        Args:
            run_id: the run.
            epoch: in which it was taken.
            flow_run_id: its owner.
            linked: the facts from `begin`.
        """
        loop = asyncio.get_running_loop()
        turns = Turns(self.settings.concurrency, self.places.get(flow_run_id))
        run = ActiveRun(run_id, epoch, turns, drained=self.draining.is_set(), linked=linked)
        self.active[run_id] = run

        def stop(why: str) -> None:
            with suppress(RuntimeError):  # the event loop has ended, and the run with it
                if why == "completed":
                    loop.call_soon_threadsafe(run.settle)
                else:
                    loop.call_soon_threadsafe(run.stop, Stop[why.upper()])

        self.keeper.hold(run_id, epoch, stop)
        try:
            yield run
        finally:
            self.keeper.drop(run_id, epoch)
            if self.active.get(run_id) is run:
                del self.active[run_id]

    def finish(self, last: Coroutine[Any, Any, None]) -> None:
        """Do a last thing for a run, which does not wait for it. The host waits for it before it closes."""
        task = asyncio.create_task(last)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def close(self) -> None:
        """Wait for the last things of all runs."""
        await asyncio.gather(*self._finishing)

    def drain(self) -> None:
        """Begin no further step of any run."""
        self.draining.set()
        for run in self.active.values():
            run.drain()

    def end(self, run_id: UUID) -> None:
        """Stop a run that has ended, if it is one of this process."""
        if run := self.active.get(run_id):
            run.stop(Stop.ENDED)

    def stop(self) -> None:
        """Stop all runs at once."""
        self.draining.set()
        for run in self.active.values():
            run.stop(Stop.SHUTDOWN)


@asynccontextmanager
async def open_host(
    settings: Settings, *, pool_size: int | None = None, is_service: bool = False
) -> AsyncIterator[Host]:
    """Open the database that the settings name, to execute runs of it.

    Args:
        settings: the database, and the limits.
        pool_size: the most connections of the pool; by default, the one in the settings.
        is_service: open the connection that extends leases at once, before the server has no room for it.

    Raises:
        DatabaseUnavailableError: it can't be reached.
        SchemaMissingError: it has no pgflow schema, or an old one.
        ForeignInstallationError: it is a copy of a database that has been used with Prefect.
    """
    dsn = find_dsn(settings)
    async with open_store(settings, size=pool_size, executes_moved=True) as store, open_toolbox(settings) as toolbox:
        installation = await persist(store, settings.report_timeout, store.use_installation, "the database")
        watch = Watch(store)
        with (
            LeaseKeeper(
                dsn,
                settings.lease,
                connect_timeout=settings.connect_timeout,
                pool=Pool(store, asyncio.get_running_loop(), settings.report_timeout),
            ) as keeper,
            lend(store, watch) as token,
        ):
            if is_service:
                await keeper.open()
            pools = PoolWatch(store, installation.id, settings.report_timeout)
            host = Host(settings, dsn, store, toolbox, watch, pools, keeper, token, installation, Batch(store))
            try:
                yield host
            finally:
                watch.close()
                pools.close()
                await host.close()
