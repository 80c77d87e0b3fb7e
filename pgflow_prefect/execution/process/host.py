"""What the runs that one process executes have in common: the database, their leases, and how they are stopped."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import UUID

from anyio import CancelScope, move_on_after

from pgflow_prefect.database.connection import find_dsn
from pgflow_prefect.database.leases import LeaseKeeper, Pool
from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.execution.batch import Batch
from pgflow_prefect.execution.process.external_steps import Watch
from pgflow_prefect.execution.process.resources import open_toolbox
from pgflow_prefect.execution.process.shared_store import lend
from pgflow_prefect.execution.process.slots import Slot, Turns
from pgflow_prefect.execution.step_writer import persist
from pgflow_prefect.handlers.base import Toolbox
from pgflow_prefect.models import Installation
from pgflow_prefect.settings import Settings

_logger = logging.getLogger(__name__)


class Stop(StrEnum):
    """Why a run is stopped."""

    LOST = "it was taken over"
    ENDED = "it has ended"
    SHUTDOWN = "the process ends"


@dataclass
class ActiveRun:
    """A run that this process executes in an epoch, and the ways to stop it.

    Attributes:
        run_id: the run.
        epoch: in which it was taken.
        turns: how many of its steps work at the same time.
        drained: no further step begins; those that work go on to their end.
        stopped: those that work are stopped as well, for this reason.
    """

    run_id: UUID
    epoch: int
    turns: Turns
    drained: bool = False
    stopped: Stop | None = None
    _waiting: dict[str, CancelScope] = field(default_factory=dict)  # steps' tasks before an attempt, by slug
    _working: set[CancelScope] = field(default_factory=set)  # handlers
    _awaiting: set[CancelScope] = field(default_factory=set)  # steps that others do

    def drain(self) -> None:
        """Begin no further step, none of those that wait for their next attempt, and wait for no external step."""
        self.drained = True
        for scope in [*self._waiting.values(), *self._awaiting]:
            scope.cancel()

    def settle(self) -> None:
        """Interrupt the handlers, for the run is completed without them; what is yet to be shown of it is."""
        self.stopped = self.stopped or Stop.ENDED
        for scope in self._working:
            scope.cancel()

    def stop(self, reason: Stop) -> None:
        """End what can be ended: async handlers at their next await; sync ones are left alone."""
        if self.stopped is None:
            _logger.info("run %s: stopping, %s", self.run_id, reason)
            self.stopped = reason
        self.drain()
        for scope in self._working:
            scope.cancel()

    @contextmanager
    def task(self, step_slug: str) -> Iterator[None]:
        """Run a step's task, all its attempts and what it waits for between and before them; draining ends that."""
        with CancelScope() as scope:
            self._waiting[step_slug] = scope
            try:
                yield
            finally:
                self._waiting.pop(step_slug, None)

    @contextmanager
    def attempt(self, step_slug: str) -> Iterator[None]:
        """Make one attempt of a step: claim, work, report. What it raises makes the task wait for the next one."""
        task = self._waiting.pop(step_slug, None)  # None where a task runner has it, which waits by itself
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
        """Wait for another program to do a step, until the run is drained or stopped."""
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
        """Do a handler's work, which is cancelled when the run is stopped; claims and reports are not.

        Args:
            at_most: seconds after which it is cancelled as well.
        """
        with move_on_after(at_most) as scope:
            self._working.add(scope)
            if self.stopped:
                scope.cancel()
            try:
                yield scope
            finally:
                self._working.discard(scope)


@dataclass
class StepEnvironment:
    """What it takes to execute steps.

    Attributes:
        settings: where the database is, and the limits.
        dsn: the database.
        store: a pool of connections to it.
        toolbox: what handlers share.
        watch: waits for steps that others do.
    """

    settings: Settings
    dsn: str
    store: Store
    toolbox: Toolbox
    watch: Watch


@dataclass
class Host(StepEnvironment):
    """One process, as far as it executes runs.

    Attributes:
        keeper: extends the leases.
        token: by which threads of this process borrow the store.
        installation: the database, among those that share a Prefect server.
        batch: what claims and reports of the runs travel with.
        places: of the flow runs that are executed now, where only so many are at the same time.
        requested: flow runs that Prefect started, and not this process.
        active: the runs that are executed now, by id.
    """

    keeper: LeaseKeeper
    token: UUID
    installation: Installation
    batch: Batch
    places: dict[UUID, Slot] = field(default_factory=dict)
    requested: set[UUID] = field(default_factory=set)
    active: dict[UUID, ActiveRun] = field(default_factory=dict)
    _drained: bool = False
    _finishing: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def executing(self) -> set[UUID]:
        """The runs that this process executes, or is about to, whether it still has their leases or not."""
        return {*self.active, *self.keeper.held}

    @contextmanager
    def reserve(self, run_id: UUID, epoch: int) -> Iterator[None]:
        """Hold a run that was reserved just now, until its flow run takes it, or for as long as the block takes."""
        self.keeper.hold(run_id, epoch, lambda _: None)
        try:
            yield
        finally:
            self.keeper.drop(run_id, epoch)

    @contextmanager
    def execute(self, run_id: UUID, epoch: int, flow_run_id: UUID) -> Iterator[ActiveRun]:
        """Hold a run that was taken just now by a flow run, for as long as the block takes."""
        loop = asyncio.get_running_loop()
        turns = Turns(self.settings.concurrency, self.places.get(flow_run_id))
        run = ActiveRun(run_id, epoch, turns, drained=self._drained)
        self.active[run_id] = run

        def stop(why: str) -> None:
            with suppress(RuntimeError):  # the event loop has come to its end, and the run with it
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
        """Do something last that a run need not wait for; the host does, before it closes."""
        task = asyncio.create_task(last)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def close(self) -> None:
        """Return once all that was to be done last is done."""
        await asyncio.gather(*self._finishing)

    def drain(self) -> None:
        """Begin no further step of any run."""
        self._drained = True
        for run in self.active.values():
            run.drain()

    def end(self, run_id: UUID) -> None:
        """Stop a run that has ended, if it is one of this process."""
        if run := self.active.get(run_id):
            run.stop(Stop.ENDED)

    def stop(self) -> None:
        """Stop all runs at once."""
        self._drained = True
        for run in self.active.values():
            run.stop(Stop.SHUTDOWN)


@asynccontextmanager
async def open_host(
    settings: Settings, *, pool_size: int | None = None, is_service: bool = False
) -> AsyncIterator[Host]:
    """Open the database that the settings name, to execute runs of it.

    Args:
        settings: where the database is, and the limits.
        pool_size: connections of the pool at most; where not given, the settings say.
        is_service: open at once what extends leases: a run may find a server without room for it.

    Raises:
        DatabaseUnavailableError: it can't be reached.
        SchemaMissingError: it has no pgflow schema, or an old one.
        ForeignInstallationError: it is a copy of a database that has been used with Prefect.
    """
    dsn = find_dsn(settings)
    async with open_store(settings, size=pool_size) as store, open_toolbox(settings) as toolbox:
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
            host = Host(settings, dsn, store, toolbox, watch, keeper, token, installation, Batch(store))
            try:
                yield host
            finally:
                watch.close()
                await host.close()
