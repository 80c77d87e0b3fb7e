"""Fetches pending runs for worker and bridge while there are free slots."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic
from uuid import UUID

import anyio
from anyio.abc import TaskGroup

from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import (
    DatabaseUnavailableError,
    PgflowPrefectError,
    PrefectUnavailableError,
    RunHeldError,
    RunNotPendingError,
    SupersededError,
)
from pgflow_prefect.execution.process.slots import Slot
from pgflow_prefect.models import TakenRun
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.waiting import Pauses, Wakeup

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds without taking runs after Prefect did not answer

_LAST_ANSWER = 5.0  # seconds

_logger = logging.getLogger(__name__)


@dataclass
class RunFetcher:
    """Takes pending runs while there are free slots, and lets a function handle each.

    Attributes:
        store: the database.
        handle: handles a taken run in its slot. If Prefect does not answer, it hands the run back and raises
            `PrefectUnavailableError`.
        slots: the most runs at the same time.
        sweep_interval: seconds after which it looks without a wake-up.
        adopt: also take pending runs that began before their workflow was enabled.
        workflow_slugs: takes the runs of these workflows; may change.
        wakeup: wakes it.
        executing: returns the runs that this process executes. It never takes them.
    """

    store: Store
    handle: Callable[[TakenRun, Slot], Awaitable[None]]
    slots: int
    sweep_interval: float
    adopt: bool
    workflow_slugs: Collection[str]
    wakeup: Wakeup
    executing: Callable[[], Collection[UUID]] = tuple
    stopping: anyio.Event = field(default_factory=anyio.Event, init=False)
    _pause: float = field(default=0, init=False)
    _pauses: Pauses = field(default_factory=lambda: Pauses(_SHORTEST_PAUSE, _LONGEST_PAUSE), init=False)
    _next_look: float = field(default=0, init=False)
    _more_expired: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._limiter = anyio.CapacityLimiter(self.slots)
        self._taking = anyio.CancelScope()
        self._passed_at = monotonic()

    @property
    def free(self) -> int:
        """The number of free slots, without those that waiting runs will occupy again."""
        return int(self._limiter.available_tokens)

    @property
    def busy(self) -> int:
        """The number of occupied slots."""
        return self._limiter.borrowed_tokens

    @property
    def passed_at(self) -> float:
        """The last time at which it looked for pending runs or had no free slot, by the monotonic clock."""
        return self._passed_at

    @property
    def stopped(self) -> bool:
        """Whether it takes no more runs."""
        return self.stopping.is_set()

    def stop(self) -> None:
        """Take no more runs. A sweep that has begun gets a little time for its answer."""
        self.stopping.set()
        self.wakeup.wake()
        self._taking.deadline = min(self._taking.deadline, asyncio.get_running_loop().time() + _LAST_ANSWER)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """Occupy a slot, once one is free."""
        slot = Slot(self._limiter, self.wakeup.wake)
        await slot.take()
        try:
            yield slot
        finally:
            slot.leave()

    async def run(self, group: TaskGroup) -> None:
        """Take runs until `stop`, and handle them in the group."""
        while not self.stopped:
            self._passed_at = monotonic()
            if self._pause:
                await anyio.sleep(self._pause)
            if self.free and self.workflow_slugs and not self.stopped:
                await self._take(group)
            await self.wakeup.wait(self.sweep_interval)

    async def _take(self, group: TaskGroup) -> None:
        # Before the request, because a run that goes on after waiting may need a slot meanwhile.
        with self._occupy(self.free) as places:
            slugs = random.sample(
                [*self.workflow_slugs], len(self.workflow_slugs)
            )  # no workflow always waits for the others
            try:
                with anyio.CancelScope() as self._taking:
                    if self.stopped:
                        return
                    runs = await self._look(slugs, len(places))
                if self._taking.cancelled_caught:
                    _logger.warning("no answer to the last sweep: its runs are free when their leases expire")
                    return
            except DatabaseUnavailableError as error:
                _logger.warning("no runs taken: %s", error)
                await self.store.drop_broken_connections()
                return
            except PgflowPrefectError as error:  # for example a revoked right, which may be granted again
                _logger.warning("no runs taken: %s", error)
                return
            for taken in runs:
                group.start_soon(self._handle, taken, places.pop())

    async def _look(self, slugs: Sequence[str], wanted: int) -> list[TakenRun]:
        """Take free runs. Look for dead owners only once a sweep, not after each wake-up."""
        if expired := anyio.current_time() >= self._next_look:
            await self.store.expire_dead_holders()
        runs = await self.store.take_runs(
            slugs, wanted, adopt=self.adopt, besides=self.executing(), expired=expired or self._more_expired
        )
        if expired:
            self._next_look = anyio.current_time() + self.sweep_interval
        # If many owners died and few slots are free, all runs of dead owners come first.
        self._more_expired = any(each.was_held for each in runs)
        return runs

    @contextmanager
    def _occupy(self, slots: int) -> Iterator[list[Slot]]:
        """Occupy free slots, and give back those that are still in the list at the end."""
        places: list[Slot] = []
        with suppress(anyio.WouldBlock):
            for _ in range(slots):
                slot = Slot(self._limiter, self.wakeup.wake)
                slot.take_nowait()
                places.append(slot)
        try:
            yield places
        finally:
            for slot in places:
                slot.leave(quietly=True)  # without a wake-up: these slots were free before

    async def _handle(self, taken: TakenRun, slot: Slot) -> None:
        try:
            await self.handle(taken, slot)
            self._pause = 0
            self._pauses.reset()
        except PrefectUnavailableError as error:
            self._pause = self._pauses.draw()
            _logger.warning("run %s: %s; trying again in %.1f s", taken.run_id, error, self._pause)
        except (DatabaseUnavailableError, SupersededError, RunHeldError, RunNotPendingError) as error:
            _logger.warning("run %s: %s", taken.run_id, error)  # its lease runs out, and a process takes it again
        except PgflowPrefectError as error:  # a trigger of a user's refuses that it fails or is cancelled, say
            await self._put_off(taken, str(error))
        except Exception as error:
            await self._put_off(taken, f"{type(error).__name__}: {describe_error(error)}")
            _logger.debug("run %s", taken.run_id, exc_info=error)
        finally:
            slot.leave()

    async def _put_off(self, taken: TakenRun, reason: str) -> None:
        """Set aside a run that this process can't begin. A process tries it again, after longer and longer pauses."""
        _logger.error("run %s of %r can't be begun: %s", taken.run_id, taken.workflow_slug, reason)
        try:
            if await self.store.put_off_run(taken.run_id, taken.epoch, reason):
                _logger.error("run %s of %r is set aside", taken.run_id, taken.workflow_slug)
        except PgflowPrefectError as error:
            _logger.warning("run %s: %s", taken.run_id, error)  # its lease runs out
