"""What goes wrong during the storm, and when."""

import threading
import time
from collections.abc import Callable, Iterator
from random import Random
from types import TracebackType
from typing import Self

from tests.faults.fleet import Fleet
from tests.faults.servers import Postgres, Prefect

Say = Callable[[str], None]

_DECK = ("kill",) * 5 + ("postgres",) * 2 + ("prefect",)
"""As cards: dealt until there are none. The first three are one of each kind."""

_LEFT = 1  # workers
_RUNS, _LONGEST_PAUSE = 3, 15.0


class Chaos:
    """Breaks things one after the other, in a thread of its own, and has all of them in order when the block ends.

    The seed decides what is broken, in which order and after which pauses; where that meets the runs differs from
    time to time, as it must between processes. On a slow machine it waits for some runs to end between two events:
    where everything is killed before it has begun to work, nothing is tested.
    """

    def __init__(
        self,
        random: Random,
        fleet: Fleet,
        postgres: Postgres,
        prefect: Prefect,
        count_ended: Callable[[], int],
        say: Say,
    ) -> None:
        self._random = random
        self._count_ended = count_ended
        self._fleet = fleet
        self._postgres = postgres
        self._prefect = prefect
        self._say = say
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

    def check(self) -> None:
        """Raise what has ended the chaos before its time."""
        if self._failure is not None:
            raise self._failure

    def has_shown_all(self) -> bool:
        """Return whether everything that can go wrong has gone wrong, and is in order again."""
        return self._happened >= len({*_DECK})

    def _work(self) -> None:
        try:
            for event in self._deal():
                if self._pause(self._random.uniform(2.0, 6.0)):
                    return
                event()
                self._happened += 1
        except BaseException as error:  # noqa: BLE001  raised again, in the main thread
            self._failure = error

    def _pause(self, seconds: float) -> bool:
        """Wait for so many seconds and some runs, and return whether it is all over."""
        enough, deadline = self._count_ended() + _RUNS, time.monotonic() + _LONGEST_PAUSE
        is_over = self._over.wait(seconds)
        while not is_over and self._count_ended() < enough and time.monotonic() < deadline:
            is_over = self._over.wait(0.1)
        return is_over

    def _deal(self) -> Iterator[Callable[[], None]]:
        events = {"kill": self._kill, "postgres": self._restart_postgres, "prefect": self._interrupt_prefect}
        deck = [*events]
        while True:
            for card in self._random.sample(deck, len(deck)):
                yield events[card]
            deck = [*_DECK]

    def _kill(self) -> None:
        # On a slow machine, too, somebody has to be left who gets some work done until the next one dies.
        while self._fleet.count_ready() < _LEFT + 1:
            if self._over.wait(0.1):
                return
        self._say(f"killed {self._fleet.kill_one(self._random)}")

    def _restart_postgres(self) -> None:
        seconds = self._random.uniform(0, 2)
        self._say(f"PostgreSQL is down for {seconds:.1f} s")
        self._postgres.restart(seconds)

    def _interrupt_prefect(self) -> None:
        seconds = self._random.uniform(1, 6)
        self._say(f"Prefect is down for {seconds:.1f} s")
        self._prefect.stop()
        try:
            self._over.wait(seconds)
        finally:
            self._prefect.start()
        self._say("Prefect is back")
