"""When something goes wrong during the storm."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from types import TracebackType
from typing import Self

_RUNS, _LONGEST_PAUSE = 3, 60.0


class Chaos:
    """Deals cards, one after the other, in a thread of its own; what they have begun is over when the block ends.

    The first cards are one of each kind, whatever they are.

    The seed decides which trouble comes, in which order and after which pauses; where that meets the runs differs from
    time to time, as it must between processes. On a slow machine it waits for some runs to end between two troubles:
    where everything is killed before it has begun to work, nothing is tested.
    """

    def __init__(
        self,
        random: Random,
        cards: Sequence[str],
        troubles: Mapping[str, Callable[[], None]],
        pauses: tuple[float, float],
        count_ended: Callable[[], int],
    ) -> None:
        self._random = random
        self._cards = cards
        self._troubles = troubles
        self._pauses = pauses
        self._count_ended = count_ended
        self._over = threading.Event()
        self._happened = 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="chaos")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure

    def wait(self, seconds: float) -> bool:
        """Return after so many seconds, or when it is all over: whether it is."""
        return self._over.wait(seconds)

    def check(self) -> None:
        """Raise what has ended the chaos before its time."""
        if self._failure is not None:
            raise self._failure

    def has_shown_all(self) -> bool:
        """Return whether everything that can go wrong has gone wrong, and is in order again."""
        return self._happened >= len({*self._cards})

    def _work(self) -> None:
        try:
            for card in self._deal():
                if self._pause(self._random.uniform(*self._pauses)):
                    return
                self._troubles[card]()
                self._happened += 1
        except BaseException as error:  # noqa: BLE001  raised again, in the main thread
            self._failure = error

    def _pause(self, seconds: float) -> bool:
        """Wait for so many seconds and some runs, and return whether it is all over."""
        enough, deadline = self._count_ended() + _RUNS, time.monotonic() + _LONGEST_PAUSE
        is_over = self.wait(seconds)
        while not is_over and self._count_ended() < enough and time.monotonic() < deadline:
            is_over = self.wait(0.1)
        return is_over

    def _deal(self) -> Iterator[str]:
        deck = sorted({*self._cards})
        while deck:
            yield from self._random.sample(deck, len(deck))
            deck = [*self._cards]
