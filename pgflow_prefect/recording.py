"""When Prefect hears of a workflow's runs: of each while it is executed, or of some runs later."""

from dataclasses import dataclass
from uuid import UUID
from zlib import crc32

LONGER_THAN = 10.0
"""By default, the seconds after which an unshown run is shown."""


@dataclass(frozen=True)
class RecordLater:
    """Executes a workflow's runs in PostgreSQL only, and shows those in Prefect that matter.

    Failed and cancelled runs are always shown, soon after their end. A run that takes longer than `longer_than` seconds
    is shown from that moment on. `pgflow-prefect record` shows any other run later.

    Example: `Workflow("orders", record=RecordLater(one_in=100))`

    Attributes:
        one_in: of the other runs, one in so many is shown after its end; None for no other run.
        longer_than: seconds after which a run is shown while it is executed.
    """

    one_in: int | None = None
    longer_than: float = LONGER_THAN

    def __post_init__(self) -> None:
        if self.one_in is not None and self.one_in < 1:
            raise ValueError(f"one_in is {self.one_in}: give 1 to show each run, or 100 to show one in a hundred")
        if not self.longer_than > 0:
            raise ValueError(f"longer_than is {self.longer_than:g}: give a number of seconds above 0")

    def wants(self, run_id: UUID, seconds: float | None) -> bool:
        """Tell whether to show a completed run. The answer is the same each time and in each process.

        Args:
            run_id: the run.
            seconds: how long it took; None if that is not known.
        """
        if seconds is not None and seconds > self.longer_than:
            return True
        return self.one_in is not None and crc32(run_id.bytes) % self.one_in == 0


def parse_recordings(text: str) -> dict[str, RecordLater]:
    """Return how workflows are recorded, by slug, from `orders,uploads:100,reports:10:30`.

    The numbers after the slug are `one_in` and `longer_than`. By default, they are those of `RecordLater`.

    Raises:
        ValueError: the text has another form.
    """
    found: dict[str, RecordLater] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        slug, *numbers = part.split(":")
        try:
            one_in, longer_than = [*numbers, "", ""][: max(2, len(numbers))]
            found[slug] = RecordLater(
                int(one_in) if one_in else None, float(longer_than) if longer_than else LONGER_THAN
            )
        except ValueError as error:
            raise ValueError(f"{part!r} is not SLUG, SLUG:ONE_IN or SLUG:ONE_IN:SECONDS: {error}") from error
    return found
