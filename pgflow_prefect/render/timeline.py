"""When each step of a run worked: the rows of a Gantt chart, and its bars for a terminal."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from pgflow_prefect.definitions.graph import Graph, sort_steps
from pgflow_prefect.render.labels import clean, format_instant, format_seconds
from pgflow_prefect.render.progress import Mark, Progress

COLUMNS = ("step", "start", "seconds", "attempts", "state", "critical")
"""The columns of the table."""

_EARLIER = "┄"
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Row:
    """A step of the chart.

    Attributes:
        slug: the step.
        mark: its progress.
        start: when its latest attempt began, in seconds since the run began; None if it has no bar.
        end: when that attempt ended, or now.
        first_start: when the first attempt began, if there was an earlier one; None if that is not known.
        is_critical: whether the step is on the run's critical path.
    """

    slug: str
    mark: Mark
    start: float | None
    end: float | None
    first_start: float | None
    is_critical: bool

    @property
    def beginning(self) -> float | None:
        """When the first bar of the row begins, in seconds since the run began."""
        return self.start if self.first_start is None else self.first_start


@dataclass(frozen=True)
class Timeline:
    """A run's chart.

    Attributes:
        progress: the run.
        rows: its steps by their beginning, then those without a bar.
        first: when the first bar begins, in seconds since the run began.
        last: when the last bar ends.
    """

    progress: Progress
    rows: tuple[Row, ...]
    first: float
    last: float

    @property
    def span(self) -> float:
        """The time that the bars take, in seconds; never 0."""
        return max(self.last - self.first, 1e-6)

    def take_longest(self, number: int) -> "Timeline":
        """Return the chart of the steps that took longest only."""
        longest = sorted(self.rows, key=lambda row: row.mark.seconds or 0.0, reverse=True)[:number]
        chosen = {row.slug for row in longest}
        return Timeline(self.progress, tuple(row for row in self.rows if row.slug in chosen), self.first, self.last)


def make_timeline(graph: Graph, progress: Progress) -> Timeline:
    """Return the chart of a run."""
    began = _find_beginning(progress)
    rows = [_make_row(slug, progress, began) for slug in sort_steps(graph)]
    rows.sort(key=lambda row: (row.beginning is None, row.beginning or 0.0))
    starts = [row.beginning for row in rows if row.beginning is not None]
    ends = [row.end for row in rows if row.start is not None and row.end is not None]
    return Timeline(progress, tuple(rows), min(starts, default=0.0), max(ends, default=0.0))


def _find_beginning(progress: Progress) -> datetime:
    """Return when the run began; rows that are older than this package do not have that time."""
    starts = [mark.started_at for mark in progress.marks.values() if mark.started_at is not None]
    return progress.run.created_at or min(starts, default=progress.now)


def _make_row(slug: str, progress: Progress, began: datetime) -> Row:
    mark = progress.marks[slug]
    start = end = first_start = None
    if mark.started_at is not None and mark.seconds is not None:
        start = (mark.started_at - began).total_seconds()
        end = start + mark.seconds
        if mark.first_started_at is not None and mark.first_started_at < mark.started_at:
            first_start = (mark.first_started_at - began).total_seconds()
    return Row(slug, mark, start, end, first_start, slug in progress.critical_steps)


def draw_bar(row: Row, timeline: Timeline, width: int) -> tuple[str, str]:
    """Return the part before the latest attempt's bar, and the bar, for a row of this many characters.

    A bar has at least one character. The part before it shows earlier attempts as a dotted line.
    """
    if row.start is None or row.end is None:
        return "", ""
    scale = width / timeline.span
    left = min(int((row.start - timeline.first) * scale), width - 1)
    eighths = max(round(((row.end - timeline.first) * scale - left) * 8), 1)
    full, part = divmod(min(eighths, (width - left) * 8), 8)
    earlier = 0 if row.first_start is None else left - min(int((row.first_start - timeline.first) * scale), left)
    return " " * (left - earlier) + _EARLIER * earlier, "█" * full + _EIGHTHS[part].strip()


def draw_axis(timeline: Timeline, width: int) -> str:
    """Return the line above the bars, with their begin and end since the run's start."""
    apart = timeline.span / 10
    first, last = format_instant(timeline.first, apart), format_instant(timeline.last, apart)
    return f"{first}{last.rjust(max(width - len(first), len(last) + 1))}"


def write_rows(timeline: Timeline) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a table with `COLUMNS`: times in seconds, and empty fields for missing times."""
    for row in timeline.rows:
        start = "" if row.start is None else f"{row.start:.3f}"
        seconds = "" if row.mark.seconds is None else f"{row.mark.seconds:.3f}"
        critical = "yes" if row.is_critical else "no"
        yield clean(row.slug), start, seconds, str(row.mark.attempts), str(row.mark.look), critical


def describe_timeline(timeline: Timeline) -> Iterable[str]:
    """Return the facts about the run as a whole, a line each."""
    progress = timeline.progress
    yield progress.summary
    if timeline.last:
        worked = sum(progress.marks[slug].seconds or 0.0 for slug in progress.critical)
        yield (
            f"its steps worked from {format_seconds(timeline.first)} to {format_seconds(timeline.last)} after its "
            f"beginning, those of the critical path for {format_seconds(worked)}"
        )


def list_rows(timeline: Timeline) -> dict[str, object]:
    """Return the chart as JSON values; times in seconds.

    They are `run`, `status`, `ended_as`, `now`, `critical_path` and `steps`.
    """
    progress = timeline.progress
    return {
        "run": str(progress.run.id),
        "workflow": progress.run.workflow_slug,
        "status": str(progress.run.status),
        "ended_as": progress.run.ended_as,
        "now": progress.now.isoformat(),
        "critical_path": list(progress.critical),
        "steps": [
            {
                "step": row.slug,
                "start": row.start,
                "first_start": row.beginning,
                "seconds": row.mark.seconds,
                "attempts": row.mark.attempts,
                "state": str(row.mark.look),
                "critical": row.is_critical,
            }
            for row in timeline.rows
        ],
    }
