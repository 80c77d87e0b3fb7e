"""How this package waits: pauses that grow between tries, and a wake-up that ends a wait early."""

import logging
import random
from collections.abc import Iterator
from time import monotonic

import anyio

_SHORTEST, _LONGEST = 0.1, 5.0  # seconds

_logger = logging.getLogger(__name__)


class Pauses:
    """The seconds to wait before each further try of one thing: longer each time, until it has worked.

    Attributes:
        shortest: the first pause, and the first one after `reset`.
        longest: no pause is longer.
        factor: by which pauses grow.
    """

    def __init__(self, shortest: float = _SHORTEST, longest: float = _LONGEST, *, factor: float = 2.0) -> None:
        self.shortest, self.longest, self.factor = shortest, longest, factor
        self._next = shortest

    def draw(self) -> float:
        """Return the next pause, spread at random: a server that comes back should not meet all clients at once."""
        pause, self._next = self._next, min(self.factor * self._next, self.longest)
        return pause * random.uniform(0.7, 1.3)  # noqa: S311  no secret

    def reset(self) -> None:
        """Begin with the shortest pause again."""
        self._next = self.shortest


def make_pauses(patience: float) -> Iterator[float]:
    """Yield the seconds to wait before each further try, for `patience` seconds from the first of them."""
    deadline = monotonic() + patience
    pauses = Pauses()
    while monotonic() + (pause := pauses.draw()) <= deadline:
        yield pause


class Wakeup:
    """Ends a wait early. If no task is waiting, the next wait returns at once."""

    def __init__(self) -> None:
        self._woken = anyio.Event()

    def wake(self) -> None:
        """End the present wait, or the next one."""
        self._woken.set()

    async def wait(self, at_most: float) -> None:
        """Return when it is woken, or after so many seconds."""
        with anyio.move_on_after(at_most):
            await self._woken.wait()
        self._woken = anyio.Event()


class Backoff:
    """The pauses between the tries of one thing: ever longer, and at an end when they are no use.

    Attributes:
        has_begun: this is not the first try.
    """

    def __init__(self, patience: float, of: str) -> None:
        """Begin to count with the first pause.

        Args:
            patience: seconds for which it is tried again.
            of: what it is for, to be named in the log.
        """
        self._of = of
        self._pauses = make_pauses(patience)
        self.has_begun = False

    async def pause(self, error: Exception) -> bool:
        """Wait for the next try, after this error; False at once where there should be none."""
        self.has_begun = True
        pause = next(self._pauses, None)
        if pause is None:
            return False
        _logger.warning("%s: %s; trying again in about %.1f s", self._of, error, pause)
        await anyio.sleep(pause)
        return True
