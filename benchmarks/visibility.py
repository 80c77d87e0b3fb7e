"""How soon a run's tasks show in Prefect's API: on a server as we start it, and on one with default settings."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import httpx

from benchmarks.commands import Site, open_site
from benchmarks.measure import Report, Row, Sample, Target, ratio
from benchmarks.processes import SideProcess, find_postmaster, side_process, wait_until_quiet
from benchmarks.shapes import SHAPES
from benchmarks.workflows import REPETITIONS, WARM_UP
from pgflow_prefect.database.connection import create_database
from pgflow_prefect.deployment.prefect_server import RECORDER_SETTINGS, prefect_server

SHAPE = "1,000 wide"

COMPLETED = {"task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
GLANCE = 0.05  # seconds between two questions
PATIENCE = 300.0  # seconds


@dataclass(frozen=True)
class Watched:
    """A Prefect server, and who executes runs on it."""

    site: Site
    side: SideProcess

    def measure(self) -> tuple[float, float]:
        """Run the graph and return the seconds until all of it shows: from the run's start, and from its end."""
        self.side.prepare(SHAPE, "nothing")
        expected = self.count() + len(SHAPES[SHAPE])
        begun = time.perf_counter()
        self.side.measure(SHAPE, "nothing")
        ended = time.perf_counter()
        self.wait_for(expected)
        shown = time.perf_counter()
        return shown - begun, shown - ended

    def warm_up(self) -> None:
        """Run a small graph, and wait until it shows: its tasks are not to be taken for the next one's."""
        self.side.measure(WARM_UP, "nothing")
        self.wait_for(len(SHAPES[WARM_UP]))

    def wait_for(self, expected: int) -> None:
        """Return once so many task runs show as completed."""
        deadline = time.perf_counter() + PATIENCE
        while self.count() < expected:
            assert time.perf_counter() < deadline, "Prefect never showed all of it"
            time.sleep(GLANCE)

    def count(self) -> int:
        """Return how many task runs show as completed."""
        return int(
            httpx.post(f"{self.site.api_url}/task_runs/count", json=COMPLETED, timeout=60).raise_for_status().json()
        )


def measure_visibility(server: str) -> Iterator[Report]:
    """Measure both in turn; both servers are there all the time."""
    taken: dict[str, list[tuple[float, float]]] = {"ours": [], "default": []}
    with ExitStack() as stack:
        site = stack.enter_context(open_site(server))
        postmaster = find_postmaster(site)
        url = stack.enter_context(default_server(server))
        watched = {}
        for name, each in {"ours": site, "default": replace(site, api_url=url)}.items():
            watched[name] = Watched(each, stack.enter_context(side_process(each, "ours", each.dsn, server, name)))
            watched[name].warm_up()
        for repetition in range(REPETITIONS):
            for name in [*taken][:: -1 if repetition % 2 else 1]:
                wait_until_quiet(postmaster)
                taken[name].append(watched[name].measure())
    rows = []
    for place, since in enumerate(("its start", "its end")):
        ours, default = (Sample(tuple(each[place] for each in taken[name]), "s") for name in taken)
        rows += [
            Row(f"from {since}: as `demo` and `serve` start it", ours),
            Row(f"from {since}: default settings", default),
            Row(f"from {since}: ratio", ratio(ours, default), Target(at_most=0.4)),
        ]
    yield Report(f"Visibility: until all tasks of a run of {SHAPE} are Completed in Prefect's API", rows)


@contextmanager
def default_server(server: str) -> Iterator[str]:
    """Run a Prefect server that is like ours but for the settings of its recorder; yield the URL of its API."""
    with TemporaryDirectory(prefix="pgflow-", ignore_cleanup_errors=True) as home, ExitStack() as stack:
        with patch.dict(RECORDER_SETTINGS, clear=True):
            dsn = create_database(server, "prefect_default")
            url = stack.enter_context(prefect_server(Path(home), dsn))
        yield url
