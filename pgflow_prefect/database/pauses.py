"""The pauses between the tries of one thing: ever longer, spread at random, and at an end when they are no use."""

import random
from collections.abc import Iterator
from time import monotonic

_SHORTEST, _LONGEST = 0.1, 5.0  # seconds


def make_pauses(patience: float) -> Iterator[float]:
    """Yield the seconds to wait before each further try, for `patience` seconds from the first of them."""
    deadline = monotonic() + patience
    pause = _SHORTEST
    while monotonic() + pause <= deadline:
        # A server that comes back should not meet everybody at once.
        yield pause * random.uniform(0.7, 1.3)  # noqa: S311  no secret
        pause = min(2 * pause, _LONGEST)
