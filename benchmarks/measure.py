"""The harness: both sides in turn, several times, medians and spread, ratios pair by pair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from rich.table import Table

Side = Callable[[], float]


def written(value: float) -> str:
    """Write a number with the digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


@dataclass(frozen=True)
class Sample:
    """What the repetitions of one measurement gave."""

    values: tuple[float, ...]
    unit: str

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
        """Whether there is a target, and it was not met."""
        return self.target is not None and not self.target.is_met_by(self.sample)


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
        for heading in ("measured", "median", "spread", "target", ""):
            table.add_column(heading, justify="right" if heading in {"median", "spread"} else "left")
        for row in self.rows:
            verdict = "" if row.target is None else "[red]missed" if row.is_missed else "[green]met"
            table.add_row(row.name, str(row.sample), row.sample.spread, str(row.target or ""), verdict)
        return table


def interleave(sides: Mapping[str, Side], unit: str, repetitions: int) -> dict[str, Sample]:
    """Measure all sides in turn, every other time backwards, so that a slower minute slows them all."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(repetitions):
        for name in [*sides][:: -1 if repetition % 2 else 1]:
            values[name].append(sides[name]())
    return {name: Sample(tuple(measured), unit) for name, measured in values.items()}


def ratio(sample: Sample, reference: Sample) -> Sample:
    """Divide pair by pair: what was measured in the same repetition shared the machine's mood."""
    pairs = zip(sample.values, reference.values, strict=True)
    return Sample(tuple(value / other for value, other in pairs), "")


def seconds(act: Callable[[], object]) -> float:
    """Return how long it takes, in seconds."""
    begun = perf_counter()
    act()
    return perf_counter() - begun
