"""Many small runs: a worker, the one of a former version, and the same work by hand and with DBOS."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks.commands import HANDLERS, Site, open_site
from benchmarks.costs import Cost, measure_cost
from benchmarks.engine import chain, define
from benchmarks.measure import Report, Row, Sample, Target, ratio
from pgflow_prefect.database.connection import create_database

FORMER = os.environ.get("BENCHMARK_FORMER", "b1a8665")
"""The commit that the worker is compared with."""

SIDES = [
    each
    for each in os.environ.get("BENCHMARK_SIDES", "ours,unshown,hundredth,tenth,former,by_hand,dbos").split(",")
    if each
]
STEPS = [int(each) for each in os.environ.get("BENCHMARK_STEPS", "5,1").split(",")]
AT_ONCE = [int(each) for each in os.environ.get("BENCHMARK_AT_ONCE", "10,50").split(",")]
WORKFLOWS = int(os.environ.get("BENCHMARK_WORKFLOWS", "5"))
RUNS = int(os.environ.get("BENCHMARK_RUNS", "150"))
REPETITIONS = int(os.environ.get("BENCHMARK_REPETITIONS", "3"))
WARM_UP = 20  # runs: modules are loaded, connections opened
LATENCY_RUNS = 10  # one after the other, each time
PAUSE = 0.2  # seconds: what the last run left to do, for Prefect, is not the next one's

REPOSITORY = Path(__file__).parent.parent
COUNTED = Path(__file__).parent / "counted"

NAMES = {
    "ours": "pgflow-prefect",
    "unshown": "pgflow-prefect, recorded later: none shown",
    "hundredth": "pgflow-prefect, recorded later: one in 100 shown",
    "tenth": "pgflow-prefect, recorded later: one in 10 shown",
    "former": "pgflow-prefect, former version",
    "by_hand": "by hand: one process, one client",
    "dbos": "DBOS",
}
LATER = {"unshown": "", "hundredth": "100", "tenth": "10"}
"""Of the sides whose runs Prefect hears of later: one in how many it hears of."""

LATER_TARGETS = {"unshown": (2.0, 5), "hundredth": (1.5, 7), "tenth": (1.0, 15)}
"""Of those sides: the rate beside DBOS, at least, and the milliseconds of CPU that all together use for a run."""

WORKERS = ("ours", "former", *LATER)
FAST = ("dbos", *LATER)
FACTOR = 4
"""So many times as many runs have those sides, which are through with a few of them too soon to be measured."""

COMPLETED = "SELECT /* benchmark */ count(*) FROM pgflow.runs WHERE status = 'completed'"
BEGIN = "SELECT /* benchmark */ count(pgflow.run_workflow('small-' || n %% %s, '{}')) FROM generate_series(1, %s) n"
LATENCY = """
    SELECT /* benchmark */
           percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM s.began_at - r.created_at))::float
    FROM (SELECT id, created_at FROM pgflow.runs ORDER BY created_at DESC LIMIT %s) r
    JOIN LATERAL (SELECT min(started_at) AS began_at FROM pgflow.step_states WHERE run_id = r.id) s ON true
"""


@dataclass(frozen=True)
class Shape:
    """What is run.

    Attributes:
        steps: of each run, one after the other.
        at_once: runs at the same time.
        workflows: that the runs are of, in turn.
    """

    steps: int
    at_once: int
    workflows: int = 1

    def __str__(self) -> str:
        kind = "single steps" if self.steps == 1 else f"chains of {self.steps} steps"
        among = f" of {self.workflows} workflows" if self.workflows > 1 else ""
        return f"{kind}{among}, {self.at_once} at a time"


Costs = Mapping[str, Sequence[Cost]]
"""By side, one for each repetition."""


def measure_small_runs(server: str) -> Iterator[Report]:
    """Measure every side with chains of five steps and with single steps, at each number of runs at the same time.

    At last, workers execute runs of several workflows at once.
    """
    if "dbos" in SIDES and find_spec("dbos") is None:
        raise SystemExit(
            "DBOS is not installed: pip install -e '.[benchmarks]', or BENCHMARK_SIDES=ours,former,by_hand"
        )
    shapes = [Shape(steps, at_once) for steps in STEPS for at_once in AT_ONCE]
    with former_version() as former:
        for shape in shapes:
            yield report({side: measure_side(server, side, former, shape) for side in SIDES}, shape)
        if WORKFLOWS > 1:
            several = Shape(STEPS[0], AT_ONCE[0], WORKFLOWS)
            workers = [side for side in SIDES if side in WORKERS]
            yield report({side: measure_side(server, side, former, several) for side in workers}, several)


@contextmanager
def former_version() -> Iterator[Path]:
    """Take the former version out of the repository, for as long as the block takes.

    Raises:
        SystemExit: the repository does not have it.
    """
    with tempfile.TemporaryDirectory(prefix="pgflow-") as directory:
        if "former" in SIDES:
            archive = subprocess.run(["git", "archive", FORMER], cwd=REPOSITORY, check=False, capture_output=True)
            if archive.returncode != 0:
                raise SystemExit(
                    f"the former version, commit {FORMER}, can't be taken out of {REPOSITORY}: "
                    f"{archive.stderr.decode().strip()}. Run this in a whole clone (`git fetch --unshallow`), name "
                    "another commit with BENCHMARK_FORMER, or leave that side out: BENCHMARK_SIDES=ours,by_hand,dbos"
                )
            subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True)
        yield Path(directory)


def measure_side(server: str, side: str, former: Path, shape: Shape) -> list[Cost]:
    """Measure one side on a site of its own, several times."""
    sources = former if side == "former" else REPOSITORY
    with open_site(server, sources) as site:
        site.db.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
        runs = RUNS * FACTOR if side in FAST else RUNS
        if side in WORKERS:
            return [*measure_worker(site, sources, shape, runs, LATER.get(side))]
        return [*measure_script(site, server, side, shape, runs)]


def add_workflows(site: Site, shape: Shape) -> None:
    """Define the workflows that are run, and write their handlers."""
    for number in range(shape.workflows):
        slug = f"small-{number}"
        define(site.db, slug, chain(shape.steps))
        text = HANDLERS.format(slug=slug, steps=[*chain(shape.steps)])
        (site.directory / "flows" / f"small_{number}.py").write_text(text)


def measure_worker(site: Site, sources: Path, shape: Shape, measured: int, one_in: str | None = None) -> Iterator[Cost]:
    """Measure a worker that finds all runs waiting, and then one run after the other."""
    add_workflows(site, shape)
    requests = site.directory / "requests"
    environment = {"PYTHONPATH": f"{COUNTED}{os.pathsep}{sources}", "BENCHMARK_REQUESTS": str(requests)}
    if one_in is not None:
        slugs = [f"small-{number}" for number in range(shape.workflows)]
        environment["PGFLOW_RECORD_LATER"] = ",".join(f"{slug}:{one_in}:3600" for slug in slugs)
    with site.service("worker", "--concurrency", str(shape.at_once), **environment) as process:

        def work(runs: int) -> None:
            completed = site.ask(COMPLETED) + runs
            site.ask(BEGIN, shape.workflows, runs)
            site.wait_until(lambda: site.ask(COMPLETED) >= completed)

        work(WARM_UP)
        for _ in range(REPETITIONS):
            cost = measure_cost(site, process.pid, requests, site.ask("SELECT current_database()"), work, runs=measured)
            for _ in range(LATENCY_RUNS):
                work(1)
                time.sleep(PAUSE)
            yield replace(cost, latency=float(site.ask(LATENCY, LATENCY_RUNS)))


def measure_script(site: Site, server: str, side: str, shape: Shape, measured: int) -> Iterator[Cost]:
    """Measure a script that does the same work in one process."""
    name = f"benchmark_{side}_{shape.steps}_{shape.at_once}_{os.getpid()}"
    dsn = create_database(server, name) if side == "dbos" else site.dsn
    requests = site.directory / "requests"
    environment = {"PYTHONPATH": f"{COUNTED}{os.pathsep}{REPOSITORY}", "BENCHMARK_REQUESTS": str(requests)}
    with (
        (site.directory / f"{side}.log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sides.small_runs", side, dsn, str(shape.steps), str(shape.at_once)],
            env={**site.environment, **environment},
            cwd=site.directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None

        def work(runs: int) -> None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{runs}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n", (site.directory / f"{side}.log").read_text()[-5000:]

        try:
            work(WARM_UP)
            for _ in range(REPETITIONS):
                yield measure_cost(site, process.pid, requests, name, work, runs=measured)
        finally:
            process.stdin.close()


def report(costs: Costs, shape: Shape) -> Report:
    """Return what each side took, and ours beside the others."""
    rows = []
    for side, taken in costs.items():
        rows.append(Row(NAMES[side], sample(taken, lambda cost: 1 / cost.seconds, "runs/s")))
        rows.append(Row("  CPU of its process", sample(taken, lambda cost: cost.cpu * 1000, "ms/run")))
        rows.append(Row("  CPU of Prefect's server", sample(taken, lambda cost: cost.server * 1000, "ms/run")))
        rows.append(Row("  CPU of PostgreSQL", sample(taken, lambda cost: cost.postgres * 1000, "ms/run")))
        rows.append(Row("  requests", sample(taken, lambda cost: cost.requests, "a run")))
        rows.append(Row("  statements of its own", sample(taken, lambda cost: cost.statements, "a run")))
        if taken[0].latency is not None:
            rows.append(Row("  from the commit to the first step", sample(taken, find_latency, "ms")))
    return Report(
        f"Small runs: {REPETITIONS} times {RUNS} {shape} ({FACTOR} times as many on fast sides)",
        [*rows, *compare(costs, shape)],
    )


def compare(costs: Costs, shape: Shape) -> Iterator[Row]:
    """Yield ours beside the others, with the targets."""
    ours, former, by_hand, dbos = (costs.get(side) for side in ("ours", "former", "by_hand", "dbos"))
    for side in LATER:
        if (later := costs.get(side)) is not None:
            yield from judge_later(side, later, former, dbos)
    if ours is None:
        return
    if shape.at_once == max(AT_ONCE):  # with fewer, there are fewer to go together
        yield Row("requests a run", sample(ours, lambda cost: cost.requests, ""), Target(at_most=0.3))
        yield Row("statements a run", sample(ours, lambda cost: cost.statements, ""), Target(at_most=1.5))
    if by_hand is not None:
        yield Row("rate: ours / by hand", divide(by_hand, ours, find_seconds), Target(at_least=2.0))
    if dbos is not None:
        yield Row("rate: ours / DBOS", divide(dbos, ours, find_seconds))
    if former is not None:
        yield Row("rate: ours / former", divide(former, ours, find_seconds), Target(at_least=3.0))
        yield Row("CPU of the worker: ours / former", divide(ours, former, find_cpu), Target(at_most=0.2))
        yield Row("latency: ours / former", divide(ours, former, find_latency), Target(at_most=0.4))


def judge_later(
    side: str, later: Sequence[Cost], former: Sequence[Cost] | None, dbos: Sequence[Cost] | None
) -> Iterator[Row]:
    """Yield a side whose runs Prefect hears of later beside the others."""
    rate, cpu = LATER_TARGETS[side]
    yield Row(f"CPU in all: {side}", sample(later, find_whole_cpu, "ms/run"), Target(at_most=cpu))
    if dbos is not None:
        yield Row(f"rate: {side} / DBOS", divide(dbos, later, find_seconds), Target(at_least=rate))
    if former is not None:
        yield Row(f"latency: {side} / former", divide(later, former, find_latency), Target(at_most=0.15))


def find_whole_cpu(cost: Cost) -> float:
    """Return the milliseconds of CPU that a run takes in all processes."""
    return 1000 * (cost.cpu + cost.server + cost.postgres)


def find_seconds(cost: Cost) -> float:
    """Return the time of a run."""
    return cost.seconds


def find_cpu(cost: Cost) -> float:
    """Return the CPU time that the process took for a run."""
    return cost.cpu


def find_latency(cost: Cost) -> float:
    """Return the milliseconds from the commit to the first step."""
    assert cost.latency is not None
    return cost.latency * 1000


def sample(costs: Sequence[Cost], find: Callable[[Cost], float], unit: str) -> Sample:
    """Return one figure of each repetition."""
    return Sample(tuple(map(find, costs)), unit)


def divide(costs: Sequence[Cost], reference: Sequence[Cost], find: Callable[[Cost], float]) -> Sample:
    """Divide one figure by that of another side; of sides that are too noisy, the ratio is shown and not judged."""
    return ratio(sample(costs, find, ""), sample(reference, find, ""))
