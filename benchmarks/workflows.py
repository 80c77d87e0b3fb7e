"""Whole workflows on a real Prefect server: pgflow-prefect beside flows written by hand, and beside other engines."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

from rich.console import Console
from rich.progress import Progress

from benchmarks.commands import Site, open_site
from benchmarks.measure import Report, Row, Sample, Target, ratio
from benchmarks.processes import Measurement, SideProcess, find_postmaster, side_process, wait_until_quiet
from benchmarks.shapes import SHAPES
from pgflow_prefect.database.connection import create_database

REPETITIONS = int(os.environ.get("BENCHMARK_REPETITIONS", "5"))
ONLY = re.compile(os.environ.get("BENCHMARK_ONLY", ""))  # "wide, nothing": for trying something out

OURS, OURS_SYNC = "ours", "ours_sync"
BY_HAND = ("submitted", "awaited")
SIDES = {
    OURS: "pgflow-prefect",
    OURS_SYNC: "pgflow-prefect, sync handlers",
    "submitted": "(a) Prefect by hand, submit and wait_for",
    "awaited": "(b) Prefect by hand, the fastest",
    "engine_alone": "(c) the engine alone, a bare loop",
    "dbos_steps": "(d) DBOS",
    "pgqueuer_jobs": "(d) pgqueuer",
}
"""By their modules, the name of each in the tables."""

OURS_MAP = "ours_map"
MAPS_BY_HAND = ("task_map", "task_map_bare")
MAP_SIDES = {
    OURS_MAP: "pgflow-prefect",
    "ours_map_shown": "pgflow-prefect, each item shown as a task run",
    "task_map": "(a) Prefect's task.map",
    "task_map_bare": "(b) Prefect's task.map, without results and caches",
}
"""Those that execute a map."""

WARM_UP, MAP_WARM_UP = "3 layers of 3", "map of 9"


@dataclass(frozen=True)
class Case:
    """One graph with one kind of handlers, and who executes it."""

    shape: str
    handler: str
    sides: tuple[str, ...]
    target: Target | None = None
    by_hand: tuple[str, ...] = BY_HAND
    fewer: Target | None = None  # statements a step

    @property
    def ours(self) -> str:
        """The side that is compared."""
        return self.sides[0]

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(SHAPES[self.shape])

    def __str__(self) -> str:
        return f"{self.shape}, {self.handler}"


DEEP, WIDE = Target(at_most=1.0), Target(at_most=1.25)
FEWER = {"1,000 wide": Target(at_most=1.99)}
WHO = {"nothing": tuple(SIDES), "sleep": tuple(name for name in SIDES if name != OURS_SYNC)}
CASES = [
    Case(shape, handler, sides, target, fewer=FEWER.get(shape))
    for handler, sides in WHO.items()
    for shape, target in {
        "chain of 100": DEEP,
        "10 layers of 10": DEEP,
        "1 to 100 to 1": WIDE,
        "1,000 wide": WIDE,
    }.items()
]
CASES += [Case("100 wide", "nothing", (OURS,)), Case("chain of 1,000", "nothing", (OURS,))]
CASES += [Case("map of 1,000", handler, (*MAP_SIDES,), Target(at_most=0.5), MAPS_BY_HAND) for handler in WHO]
GROWTH = {"chain": ("chain of 100", "chain of 1,000"), "wide": ("100 wide", "1,000 wide")}

Found = dict[tuple[str, str, str], list[Measurement]]
"""By shape, handler and side."""


def measure_workflows(server: str) -> Iterator[Report]:
    """Measure all sides in turn on the same servers, each graph several times."""
    with ExitStack() as stack:
        site = stack.enter_context(open_site(server))
        cases = [case for case in CASES if ONLY.search(str(case))]
        sides = {
            name: stack.enter_context(side_process(site, name, find_dsn(site, server, name), server))
            for name in dict.fromkeys(name for case in cases for name in case.sides)
        }
        found = measure_all(site, sides, cases)
    for case in cases:
        if case.target is not None:
            yield compare(case, found)
    if rows := [row for kind in GROWTH for row in compare_sizes(kind, found)]:
        yield Report("Workflows: what a step costs as a run grows", rows)


def find_dsn(site: Site, server: str, name: str) -> str:
    """Return the database of a side: what is no part of this project gets one of its own."""
    return create_database(server, f"benchmark_{name}") if name in {"dbos_steps", "pgqueuer_jobs"} else site.dsn


def measure_all(site: Site, sides: dict[str, SideProcess], cases: list[Case]) -> Found:
    """Measure every case, repetition by repetition, every other one backwards."""
    postmaster = find_postmaster(site)
    for name, side in sides.items():
        side.measure(MAP_WARM_UP if name in MAP_SIDES else WARM_UP, "nothing")
    wait_until_quiet(postmaster)
    turns = [(case, name) for case in cases for name in case.sides]
    found: Found = {}
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=REPETITIONS * len(turns))
        for repetition in range(REPETITIONS):
            for case, name in turns[:: -1 if repetition % 2 else 1]:
                progress.update(task, advance=1, description=f"{case.shape}, {case.handler}: {name}")
                sides[name].prepare(case.shape, case.handler)
                used = sides[name].cpu
                measured = sides[name].measure(case.shape, case.handler)
                wait_until_quiet(postmaster)
                measured = replace(measured, cpu=sides[name].cpu - used)
                found.setdefault((case.shape, case.handler, name), []).append(measured)
    return found


def compare(case: Case, found: Found) -> Report:
    """Return what the sides took for a graph, and ours beside the better one of those by hand."""
    measured = {name: found[case.shape, case.handler, name] for name in case.sides}
    took = {name: to_sample(case.steps, [each.seconds for each in measured[name]]) for name in case.sides}
    used = {name: to_sample(case.steps, [each.cpu for each in measured[name]]) for name in case.sides}
    names = SIDES | MAP_SIDES
    better = min(case.by_hand, key=lambda name: took[name].median)
    rows = []
    for name in case.sides:
        rows.append(Row(names[name], took[name]))
        rows.append(Row("  CPU of its process, until it is quiet again", used[name]))
    rows.append(
        Row(
            f"pgflow-prefect / the better one by hand, {names[better][:3]}",
            ratio(took[case.ours], took[better]),
            case.target,
        )
    )
    statements = [each.statements / case.steps for each in measured[case.ours]]
    rows.append(Row("PostgreSQL's statements a step, with the run's own", Sample(tuple(statements), ""), case.fewer))
    work = "nothing" if case.handler == "nothing" else "50 ms of sleep"
    return Report(f"Workflows: {case.shape}, {case.steps:,} steps, handlers that do {work}", rows)


def compare_sizes(kind: str, found: Found) -> Iterator[Row]:
    """Yield what a step costs in a small run and in a large one, where both were measured."""
    small, large = GROWTH[kind]
    few, many = found.get((small, "nothing", OURS)), found.get((large, "nothing", OURS))
    if few is None or many is None:
        return
    costs = {
        shape: to_sample(len(SHAPES[shape]), [each.seconds for each in measured])
        for shape, measured in {small: few, large: many}.items()
    }
    yield from (Row(shape, sample) for shape, sample in costs.items())
    yield Row(f"{kind}: {large} / {small}", ratio(costs[large], costs[small]), Target(at_most=1.2))
    # Rounded: the run's lease is extended every few seconds, which is no step's.
    more = len(SHAPES[large]) - len(SHAPES[small])
    added = [round((b.statements - a.statements) / more, 2) for a, b in zip(few, many, strict=True)]
    yield Row(f"{kind}: PostgreSQL's statements for each further step", Sample(tuple(added), ""), Target(at_most=2))


def to_sample(steps: int, seconds: list[float]) -> Sample:
    """Return milliseconds a step."""
    return Sample(tuple(each * 1000 / steps for each in seconds), "ms/step")
