"""Pending runs as they come, so many at a time: what worker and bridge have in common."""

import logging
import random
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskGroup

from pgflow_prefect.database.notifications import Bell
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError, PrefectUnavailableError
from pgflow_prefect.models import TakenRun

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds for which nothing is taken after Prefect did not answer

_logger = logging.getLogger(__name__)


@dataclass
class Intake:
    """Takes pending runs while there are free slots, and has each one handled.

    Attributes:
        store: the database.
        handle: does something with a run that was taken; raises `PrefectUnavailableError` after handing it back
            where Prefect does not answer.
        slots: runs at the same time.
        sweep_interval: seconds after which to look without having been woken.
        adopt: take pending runs that are older than their workflow's enabling, too.
        workflow_slugs: whose runs to take; may change.
        bell: wakes it.
    """

    store: Store
    handle: Callable[[TakenRun], Awaitable[None]]
    slots: int
    sweep_interval: float
    adopt: bool
    workflow_slugs: Collection[str]
    bell: Bell
    busy: int = 0
    stopping: anyio.Event = field(default_factory=anyio.Event, init=False)
    _pause: float = field(default=0, init=False)

    @property
    def free(self) -> int:
        """Slots that nothing occupies."""
        return max(0, self.slots - self.busy)

    @property
    def stopped(self) -> bool:
        """Whether nothing more is to be taken."""
        return self.stopping.is_set()

    def stop(self) -> None:
        """Take nothing more."""
        self.stopping.set()
        self.bell.ring()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Occupy a slot."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self.bell.ring()

    async def run(self, group: TaskGroup) -> None:
        """Take runs until `stop`; what was taken is handled in the group."""
        while not self.stopped:
            if self._pause:
                await anyio.sleep(self._pause)
            for taken in await self._take():
                self.busy += 1  # here: the next look must not count the slot as free
                group.start_soon(self._handle, taken)
            await self.bell.wait(self.sweep_interval)

    async def _take(self) -> list[TakenRun]:
        if self.stopped or not self.free or not self.workflow_slugs:
            return []
        slugs = random.sample([*self.workflow_slugs], len(self.workflow_slugs))  # none has to wait for all others
        try:
            return await self.store.take_runs(slugs, self.free, adopt=self.adopt)
        except DatabaseUnavailableError as error:
            _logger.warning("no runs taken: %s", error)
            await self.store.drop_broken_connections()
            return []

    async def _handle(self, taken: TakenRun) -> None:
        try:
            await self.handle(taken)
            self._pause = 0
        except PrefectUnavailableError as error:
            self._pause = min(max(2 * self._pause, _SHORTEST_PAUSE), _LONGEST_PAUSE)
            _logger.warning("run %s: %s; trying again in %.1f s", taken.run_id, error, self._pause)
        except PgflowPrefectError as error:
            _logger.warning("run %s: %s", taken.run_id, error)  # its lease runs out, and somebody takes it again
        finally:
            self.busy -= 1
            self.bell.ring()
