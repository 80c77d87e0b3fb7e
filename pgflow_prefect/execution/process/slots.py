"""How many steps of a run work at the same time, and how many runs of a process: those that only wait do not count."""

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
            limiter: how many there are.
            on_leave: hears that one is free.
        """
        self._limiter = limiter
        self._on_leave = on_leave
        self._changing = anyio.Lock()
        self.taken = False

    def take_nowait(self) -> None:
        """Take a place that is free.

        Raises:
            WouldBlock: none is.
        """
        self._limiter.acquire_on_behalf_of_nowait(self)
        self.taken = True

    async def take(self) -> None:
        """Take a place, once one is free; who has waited longest is first."""
        if self.taken:
            return
        async with self._changing:  # several steps of a run may go on at the same time
            if not self.taken:
                await self._limiter.acquire_on_behalf_of(self)
                self.taken = True

    def leave(self, *, quietly: bool = False) -> None:
        """Let another run have it."""
        if self.taken:
            self.taken = False
            self._limiter.release_on_behalf_of(self)
            if not quietly:
                self._on_leave()


class Turns:
    """The steps of one run that work at the same time."""

    def __init__(self, at_most: int, slot: Slot | None = None) -> None:
        """Let so many steps work at once.

        Args:
            at_most: steps.
            slot: the run's, which it leaves while none of its steps works.
        """
        self._limiter = CapacityLimiter(at_most)
        self._place = slot
        self._working: set[str] = set()
        self._pausing = 0
        self._waiting = 0

    def count_next(self) -> int:
        """Return how many steps could begin at once if one that works now were done."""
        if self._place is not None and self._pausing:
            return 0  # the run may have to leave its place before them
        return int(self._limiter.available_tokens) - self._waiting + 1

    @asynccontextmanager
    async def take(self, step: str) -> AsyncIterator[None]:
        """Work on a step, once it is its turn."""
        await self._begin(step)
        try:
            yield
        finally:
            self._end(step)

    @asynccontextmanager
    async def pause(self, step: str) -> AsyncIterator[None]:
        """Only wait, and let others work; then wait for the next turn, unless the waiting itself has failed."""
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
            self._limiter.acquire_on_behalf_of_nowait(step)  # does not have others go first
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
