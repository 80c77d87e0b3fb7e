"""How work grows with its size, as a statement that holds on any machine: no bound in seconds."""

from collections.abc import Callable
from time import process_time

ATTEMPTS = 5
ROOM = 3
"""How many times more than in proportion still counts as linear: caches, and what else runs on this machine."""


def is_linear(act: Callable[[int], object], small: int, factor: int, clock: Callable[[], float] = process_time) -> bool:
    """Return whether work on so many times as much takes about so many times as long.

    One attempt of several is enough: what else runs makes one of the two measurements longer, and not always the same.

    Args:
        act: does the work of a size.
        small: the smaller size.
        factor: by which the other size is larger. Quadratic work takes its square as long: it has to exceed `ROOM`.
        clock: in seconds.
    """
    assert factor > ROOM

    def measure(size: int) -> float:
        begun = clock()
        act(size)
        return clock() - begun

    act(small)  # what only the first one does
    return any(measure(small * factor) < ROOM * factor * measure(small) for _ in range(ATTEMPTS))
