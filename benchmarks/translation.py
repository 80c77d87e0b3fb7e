"""From rows to a Prefect flow: load a definition, validate it with its handlers, sort it, make the flow."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from time import perf_counter
from uuid import uuid4

import anyio
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from pydantic import JsonValue

from benchmarks.measure import Report, Row, Sample, Target, ratio
from pgflow_prefect import Workflow
from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.schema import SCRIPTS
from pgflow_prefect.database.store import Store, make_lease_terms
from pgflow_prefect.definitions.graph import build_graph, sort_steps
from pgflow_prefect.settings import Settings
from pgflow_prefect.shipped import shipped_path

SIZES = (10_000, 100_000)
DEPS_A_STEP = 5
WIDTH = 100  # steps side by side; each waits for some of those of the layer before
REPETITIONS = 5

PHASES = ("load", "validate", "build and sort", "make the flow")

INSERT_STEPS = "INSERT INTO pgflow.steps SELECT %(slug)s, 'step_' || n FROM generate_series(0, %(steps)s - 1) n"
# The first layer waits for nothing; as many of the last steps have a dep more, so that the number is round.
INSERT_DEPS = """
    INSERT INTO pgflow.deps
    SELECT %(slug)s, 'step_' || (n / %(width)s - 1) * %(width)s + (n + place) %% %(width)s, 'step_' || n
    FROM generate_series(%(width)s, %(steps)s - 1) n,
         generate_series(1, %(deps)s + (n >= %(steps)s - %(deps)s * %(width)s)::int) place
"""


def fill(dsn: str) -> None:
    """Install the schemas and insert a workflow of each size; nothing is ever analyzed."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for script in SCRIPTS:
            connection.execute(shipped_path("sql", script).read_bytes())
        connection.execute("SET session_replication_role = replica")  # no checks: these rows are known to be good
        for steps in SIZES:
            parameters = {"slug": f"{steps} steps", "steps": steps, "width": WIDTH, "deps": DEPS_A_STEP}
            connection.execute("INSERT INTO pgflow.workflows VALUES (%(slug)s)", parameters)
            connection.execute(INSERT_STEPS, parameters)
            connection.execute(INSERT_DEPS, parameters)


@contextmanager
def filled_database(server: str) -> Iterator[str]:
    """Create a database with the workflows, and drop it in the end."""
    name = f"benchmark_{uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        dsn = make_conninfo(server, dbname=name)
        fill(dsn)
        yield dsn
        admin.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(name)))


def make_handlers(steps: int) -> Workflow:
    """Register a handler for each step: what a user's module does when it is imported."""
    workflow = Workflow(f"{steps} steps")

    async def handle(upstream: dict[str, JsonValue]) -> JsonValue:
        return len(upstream)

    for number in range(steps):
        workflow.step(f"step_{number}")(handle)
    return workflow


async def translate(dsn: str, steps: int) -> list[float]:
    """Return the seconds that each of `PHASES` takes, over a connection that is open already."""
    workflow = make_handlers(steps)
    async with open_pool(dsn, size=1, timeout=10) as pool:
        await pool.wait()
        gc.collect()  # what was left over before is none of this one's business
        times = [perf_counter()]
        definition = await Store(pool, make_lease_terms(Settings())).load_definition(workflow.slug)
        times.append(perf_counter())
        assert not workflow.find_problems(definition)
        times.append(perf_counter())
        assert len(sort_steps(build_graph(definition))) == steps
        times.append(perf_counter())
        workflow.make_flow()
        times.append(perf_counter())
    assert len(definition.deps) == steps * DEPS_A_STEP
    return [end - begin for begin, end in pairwise(times)]


def measure_translation(server: str) -> Iterator[Report]:
    """Measure both sizes in turn, every other time backwards."""
    taken: dict[int, list[list[float]]] = {steps: [] for steps in SIZES}
    with filled_database(server) as dsn:
        for repetition in range(REPETITIONS):
            for steps in SIZES[:: -1 if repetition % 2 else 1]:
                taken[steps].append(anyio.run(translate, dsn, steps))

    totals = {steps: Sample(tuple(map(sum, phases)), "s") for steps, phases in taken.items()}
    small, large = SIZES
    targets = {small: Target(at_most=2)}
    rows = []
    for steps, phases in taken.items():
        rows.append(Row(f"{steps:,} steps, {steps * DEPS_A_STEP:,} deps", totals[steps], targets.get(steps)))
        rows += [
            Row(f"  {phase}", Sample(values, "s"))
            for phase, values in zip(PHASES, zip(*phases, strict=True), strict=True)
        ]
    grown = ratio(totals[large], totals[small])
    rows.append(Row(f"{large:,} / {small:,} steps", grown, Target(at_most=15)))
    yield Report("Translation: from the database to a Prefect flow, with a handler a step", rows)
