"""Waits for external steps: one poller checks all of them."""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import UUID

import anyio

from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import DatabaseUnavailableError
from pgflow_prefect.models import AwaitedStep, StepEnd
from pgflow_prefect.waiting import Pauses, Wakeup

_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 0.1, 1.0  # seconds between two polls; they grow while nothing changes

_logger = logging.getLogger(__name__)


@dataclass
class _Wait:
    step: AwaitedStep
    over: anyio.Event = field(default_factory=anyio.Event)
    end: StepEnd | None = None


class Watch:
    """Polls all awaited steps with one statement, on one connection of the pool.

    PostgreSQL could notify of each step, but each NOTIFY takes a database-wide lock at commit.
    """

    def __init__(self, store: Store) -> None:
        """Prepare to watch. The poller runs only while a step is awaited."""
        self._store = store
        self._waits: dict[UUID, _Wait] = {}
        self._news = Wakeup()
        self._poller: asyncio.Task[None] | None = None

    async def wait(self, step: AwaitedStep) -> StepEnd:
        """Wait for a step, and return how the wait ended."""
        wait = self._waits[step.task_run_id] = _Wait(step)
        self._news.wake()
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        try:
            await wait.over.wait()
        finally:
            if self._waits.get(step.task_run_id) is wait:
                del self._waits[step.task_run_id]
        assert wait.end is not None
        return wait.end

    def close(self) -> None:
        """Stop polling."""
        if self._poller is not None:
            self._poller.cancel()

    async def _poll(self) -> None:
        intervals = Pauses(_SHORTEST_INTERVAL, _LONGEST_INTERVAL, factor=1.5)
        while self._waits:
            known = len(self._waits)
            if await self._look() or len(self._waits) > known:
                intervals.reset()
            # One poll serves all steps that begin to wait, or end, during this pause.
            await anyio.sleep(_SHORTEST_INTERVAL)
            await self._news.wait(max(0.0, intervals.draw() - _SHORTEST_INTERVAL))

    async def _look(self) -> bool:
        try:
            ends = await self._store.watch_steps([wait.step for wait in self._waits.values()])
        except DatabaseUnavailableError as error:
            _logger.warning("not looking at %d external steps: %s", len(self._waits), error)
            with suppress(Exception):  # the next poll comes in any case
                await self._store.drop_broken_connections()
            return False
        except Exception:  # no error may leave the waiting steps without a poller
            _logger.exception("not looking at %d external steps", len(self._waits))
            return False
        for end in ends:
            if wait := self._waits.get(end.task_run_id):
                wait.end = end
                wait.over.set()
        return bool(ends)
