"""Limits the steps of a run and the runs of a process that work at the same time; those that only wait don't count."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
from anyio import CapacityLimiter, WouldBlock
from anyio.lowlevel import checkpoint_if_cancelled


class Slot:
    """The place of one run among those that a process executes at the same time."""

    def __init__(self, limiter: CapacityLimiter, on_leave: Callable[[], None]) -> None:
        """Have no place yet: `take` or `take_nowait` gets one.

        Args:
            limiter: the number of places.
            on_leave: called when a place is free again.
        """
        self._limiter = limiter
        self._on_leave = on_leave
        self._changing = anyio.Lock()
        self.taken = False

    def take_nowait(self) -> None:
        """Take a free place.

        Raises:
            WouldBlock: no place is free.
        """
        self._limiter.acquire_on_behalf_of_nowait(self)
        self.taken = True

    async def take(self) -> None:
        """Take a place as soon as one is free; the run that has waited longest is first."""
        if self.taken:
            return
        async with self._changing:  # several steps of a run may call this at the same time
            if not self.taken:
                await self._limiter.acquire_on_behalf_of(self)
                self.taken = True

    def leave(self, *, quietly: bool = False) -> None:
        """Give the place to another run."""
        if self.taken:
            self.taken = False
            self._limiter.release_on_behalf_of(self)
            if not quietly:
                self._on_leave()


class Turns:
    """The steps of one run that work at the same time."""

    def __init__(self, at_most: int, slot: Slot | None = None) -> None:
        """Limit the steps that work at once.

        Args:
            at_most: the number of steps.
            slot: the run's slot, which it leaves while none of its steps works.
        """
        self._limiter = CapacityLimiter(at_most)
        self._place = slot
        self._working: set[str] = set()
        self._pausing = 0
        self._waiting = 0

    def count_next(self) -> int:
        """Return how many steps could begin at once if one of the working steps ended."""
        if self._place is not None and self._pausing:
            return 0  # the run may have to leave its place before they begin
        return int(self._limiter.available_tokens) - self._waiting + 1

    @asynccontextmanager
    async def take(self, step: str) -> AsyncIterator[None]:
        """Work on a step when it is its turn."""
        await self._begin(step)
        try:
            yield
        finally:
            self._end(step)

    @asynccontextmanager
    async def pause(self, step: str) -> AsyncIterator[None]:
        """Only wait, and let other steps work; then wait for the next turn, unless the wait itself has failed."""
        self._pausing += 1
        self._end(step)
        try:
            yield
        finally:
            self._pausing -= 1
        await self._begin(step)

    async def _begin(self, step: str) -> None:
        await checkpoint_if_cancelled()
        try:
            self._limiter.acquire_on_behalf_of_nowait(step)  # does not let other steps go first
        except WouldBlock:
            self._waiting += 1
            try:
                await self._limiter.acquire_on_behalf_of(step)
            finally:
                self._waiting -= 1
        self._working.add(step)
        if self._place is not None:
            await self._place.take()

    def _end(self, step: str) -> None:
        if step in self._working:
            self._working.discard(step)
            self._limiter.release_on_behalf_of(step)
            if self._place is not None and self._pausing and not self._working:
                self._place.leave()
