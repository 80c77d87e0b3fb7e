"""The runs of a storm: started, no more of them at a time than keep the workers busy, and awaited."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from uuid import UUID

from tests.faults.database import Database
from tests.faults.fleet import Fleet

_POLL = 0.2  # seconds


class Traffic:
    """Starts the runs.

    Attributes:
        begun: those that were started, and their numbers.
        watch: is called every now and then; it may raise.
        is_enough: tells whether no more runs are needed than were asked for.
        is_over: tells whether all is known that there is to be known, whatever becomes of the runs.
    """

    def __init__(
        self,
        runs: int,
        most: int,
        patience: float,
        database: Database,
        fleet: Fleet,
        executions: Path,
        workflows: Sequence[str],
        random: Random,
        say: Callable[[str], None],
    ) -> None:
        """Prepare to start runs.

        Args:
            runs: how many; more, until it is enough.
            most: at a time.
            patience: seconds in which nothing has moved, and nothing will: no run has ended and no handler was called.
            database: the storm's.
            fleet: its workers, which are tended meanwhile.
            executions: grows with every call of a handler.
            workflows: to start runs of.
            random: chooses among them.
            say: writes a line.
        """
        self.begun: dict[UUID, int] = {}
        self.watch: Callable[[], None] = lambda: None
        self.is_enough: Callable[[], bool] = lambda: True
        self.is_over: Callable[[], bool] = lambda: False
        self._runs = runs
        self._most = most
        self._patience = patience
        self._database = database
        self._fleet = fleet
        self._executions = executions
        self._workflows = workflows
        self._random = random
        self._say = say
        self._ended = 0
        self._progress = (0, 0)
        self._progress_at = time.monotonic()

    def count_ended(self) -> int:
        return self._ended

    def start_runs(self) -> None:
        """Start them, and return when all are started or nothing moves any more."""
        self._progress_at = time.monotonic()
        while (wanted := self._count_wanted()) and not self._is_stalled(pending := self._look()):
            for _ in range(min(self._most - len(pending), wanted)):
                run_id = UUID(int=self._random.getrandbits(128), version=4)
                self.begun[run_id] = len(self.begun)
                self._database.start_run(self._random.choice(self._workflows), run_id, self.begun[run_id])
            time.sleep(_POLL)

    def _count_wanted(self) -> int:
        """Return how many runs have still to be started."""
        return 0 if self.is_over() else max(self._runs - len(self.begun), 0 if self.is_enough() else 1)

    def await_end(self) -> list[str]:
        """Return once no run is pending, or nothing moves any more: the runs that are left."""
        while (pending := self._look()) and not self.is_over():
            if self._is_stalled(pending):
                return [f"run {run_id}: pending, and nothing has moved for {self._patience:g} s" for run_id in pending]
            time.sleep(_POLL)
        return []

    def _look(self) -> list[UUID]:
        self._fleet.tend()
        self.watch()
        return self._database.list_pending()

    def _is_stalled(self, pending: list[UUID]) -> bool:
        ended = len(self.begun) - len(pending)
        if ended // 50 != self._ended // 50:
            self._say(f"{ended} runs have ended")
        self._ended = ended
        progress = ended, self._executions.stat().st_size
        if progress != self._progress:
            self._progress, self._progress_at = progress, time.monotonic()
        return time.monotonic() > self._progress_at + self._patience
