"""The harness: both sides in turn, several times, medians and spread, ratios pair by pair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

from rich.table import Table

Side = Callable[[], float]

NOISY = 0.25
"""The interquartile range, as a share of the median, beyond which a row is too noisy for a ratio to mean anything."""

FEWEST = 3
"""Values of which it can be told whether they are noisy."""


HEADINGS = ("measured", "median", "spread", "target", "")
COLOURS = {"met": "green", "missed": "red"}


def written(value: float) -> str:
    """Write a number with the digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


@dataclass(frozen=True)
class Sample:
    """What the repetitions of one measurement gave."""

    values: tuple[float, ...]
    unit: str
    refused: str = ""
    """Why this can't be held against a target: of a ratio, that what was divided was too noisy."""

    @property
    def noise(self) -> float:
        """The interquartile range, as a share of the median."""
        if len(self.values) < 2:
            return 0.0
        low, _, high = quantiles(self.values, n=4, method="inclusive")
        return (high - low) / self.median

    @property
    def median(self) -> float:
        """The middle value."""
        return median(self.values)

    def __str__(self) -> str:
        return f"{written(self.median)} {self.unit}".rstrip()

    @property
    def spread(self) -> str:
        """The lowest and the highest value."""
        return f"{written(min(self.values))} to {written(max(self.values))}"


@dataclass(frozen=True)
class Target:
    """A bound that a measurement's median has to keep."""

    at_least: float = float("-inf")
    at_most: float = float("inf")

    def is_met_by(self, sample: Sample) -> bool:
        """Return whether the sample's median lies within the bounds."""
        return self.at_least <= sample.median <= self.at_most

    def __str__(self) -> str:
        return f"at most {self.at_most:g}" if self.at_least == float("-inf") else f"at least {self.at_least:g}"


@dataclass(frozen=True)
class Row:
    """A line of the table: what was measured, and the target if there is one."""

    name: str
    sample: Sample
    target: Target | None = None

    @property
    def is_missed(self) -> bool:
        """Whether there is a target, and it was not met; of what was too noisy, neither is said."""
        return self.target is not None and not self.sample.refused and not self.target.is_met_by(self.sample)

    @property
    def verdict(self) -> str:
        """What became of the target: nothing where there is none."""
        if self.target is None:
            return ""
        return self.sample.refused or ("missed" if self.is_missed else "met")

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """What it was, the median, the spread, the target, and what became of it."""
        return self.name, str(self.sample), self.sample.spread, str(self.target or ""), self.verdict


@dataclass(frozen=True)
class Report:
    """All that one subject's benchmark found."""

    title: str
    rows: Sequence[Row]

    @property
    def is_missed(self) -> bool:
        """Whether a target was missed."""
        return any(row.is_missed for row in self.rows)

    def table(self) -> Table:
        """Return the rows as a table for the terminal."""
        table = Table(title=self.title, title_justify="left")
        for heading in HEADINGS:
            table.add_column(heading, justify="right" if heading in {"median", "spread"} else "left")
        for row in self.rows:
            *cells, verdict = row.cells
            table.add_row(*cells, f"[{COLOURS.get(verdict, 'yellow')}]{verdict}" if verdict else "")
        return table

    def markdown(self) -> str:
        """Return the rows as a section of a document."""
        lines = [f"### {self.title}", "", f"| {' | '.join(HEADINGS)} |", "|---|---:|---:|---|---|"]
        return "\n".join([*lines, *(f"| {' | '.join(row.cells)} |" for row in self.rows)])


def interleave(sides: Mapping[str, Side], unit: str, repetitions: int) -> dict[str, Sample]:
    """Measure all sides in turn, every other time backwards, so that a slower minute slows them all."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(repetitions):
        for name in [*sides][:: -1 if repetition % 2 else 1]:
            values[name].append(sides[name]())
    return {name: Sample(tuple(measured), unit) for name, measured in values.items()}


def ratio(sample: Sample, reference: Sample) -> Sample:
    """Divide pair by pair: what was measured in the same repetition shared the machine's mood.

    Of rows that are too noisy, or too few to tell, the ratio is shown, and never met nor missed.
    """
    pairs = zip(sample.values, reference.values, strict=True)
    return Sample(tuple(value / other for value, other in pairs), "", refused=_find_refusal(sample, reference))


def _find_refusal(*samples: Sample) -> str:
    if any(sample.noise > NOISY for sample in samples):
        return "too noisy"
    return "too few" if any(len(sample.values) < FEWEST for sample in samples) else ""


def seconds(act: Callable[[], object]) -> float:
    """Return how long it takes, in seconds."""
    begun = perf_counter()
    act()
    return perf_counter() - begun
