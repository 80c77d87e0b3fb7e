"""The pauses between the tries of one thing: ever longer, spread at random, and at an end when they are no use."""

import random
from collections.abc import Iterator
from time import monotonic

_SHORTEST, _LONGEST = 0.1, 5.0  # seconds


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
