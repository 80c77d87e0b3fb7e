"""The items of a map that another program was given to report."""

from collections.abc import Collection
from time import monotonic

_KEPT_FOR = 60.0  # seconds after an item's time, for clocks that differ


class HandedOver:
    """The items that this process has handed over, and that it may claim again because their time is up.

    Only PostgreSQL knows whether the time is up. An item can also be claimed again because its program gave it back.
    """

    def __init__(self, timeout: float | None) -> None:
        """Note the items of one map.

        Args:
            timeout: seconds that a program has for an item. None for no limit: then no item is late, and none is kept.
        """
        self._timeout = timeout
        self._until: dict[int, float] = {}  # by item; those that were handed over first are first

    def __len__(self) -> int:
        return len(self._until)

    def add(self, items: Collection[int]) -> None:
        """Note items once PostgreSQL has stored that another program reports them."""
        if self._timeout is None:
            return
        until = monotonic() + self._timeout
        for each in items:
            self._until.pop(each, None)  # to be the last one
            self._until[each] = until

    def take(self, claimed: Collection[int], *, were_all: bool) -> list[int]:
        """Forget the claimed items, and return those of them that were handed over.

        Args:
            claimed: the indexes of the items.
            were_all: no other item could be claimed. So an item whose time was up long ago has ended.
        """
        taken = [each for each in claimed if self._until.pop(each, None) is not None]
        now = monotonic()
        while were_all and self._until:
            oldest = next(iter(self._until))
            if now < self._until[oldest] + _KEPT_FOR:
                break
            del self._until[oldest]
        return taken
