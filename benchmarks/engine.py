"""The engine beside the least that any engine on PostgreSQL does, and its cost as a run grows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from uuid import UUID, uuid4

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from benchmarks.measure import Report, Row, Sample, Target, interleave, ratio, seconds
from pgflow_prefect.shipped import shipped_path

Connection = psycopg.Connection[tuple[object, ...]]
Graph = dict[str, list[str]]

CHAIN_STEPS = 5
RUNS = 200
REPETITIONS = 5
SIZES = (100, 1_000, 10_000)
STEPS_A_SIZE = 1_000  # small runs are repeated until there are so many steps
SIZE_REPETITIONS = 3

# What a step costs at the least: its status changes, if it is still the one expected, in a transaction of its own.
FLOOR_TABLE = """
    CREATE TABLE floor (run int, step int, status text, result jsonb, PRIMARY KEY (run, step)) WITH (fillfactor = 70)
"""
FLOOR_ROWS = (
    "INSERT INTO floor SELECT run, step, 'pending' FROM generate_series(1, %s) run, generate_series(1, %s) step"
)
FLOOR_UPDATE = """
    UPDATE floor SET status = 'completed', result = '{"ok": true}' WHERE run = %s AND step = %s AND status = 'pending'
"""


@contextmanager
def fresh_database(server: str) -> Iterator[Connection]:
    """Create a database with the engine, never analyzed, and connect to it; drop it in the end."""
    name = sql.Identifier(f"benchmark_{uuid4().hex[:12]}")
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(name))
        with psycopg.connect(make_conninfo(server, dbname=name.as_string().strip('"')), autocommit=True) as connection:
            connection.execute(shipped_path("sql", "pgflow.sql").read_bytes())
            warm_up(connection)
            yield connection
        admin.execute(sql.SQL("DROP DATABASE {}").format(name))


def warm_up(connection: Connection) -> None:
    """Load the catalogs, and make the plans while the tables are empty: the worst that a session may have."""
    graph = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}
    define(connection, "warm-up", graph)
    for _ in range(6):
        run(connection, "warm-up", graph, claims=True)


def define(connection: Connection, workflow: str, graph: Graph) -> None:
    """Insert a workflow; `graph` gives each step with the steps that it waits for."""
    deps = [(upstream, step) for step, upstreams in graph.items() for upstream in upstreams]
    connection.execute("INSERT INTO pgflow.workflows VALUES (%s)", [workflow])
    connection.execute("INSERT INTO pgflow.steps SELECT %s, unnest(%s::text[])", [workflow, [*graph]])
    connection.execute(
        "INSERT INTO pgflow.deps SELECT %s, * FROM unnest(%s::text[], %s::text[])",
        [workflow, [upstream for upstream, _ in deps], [step for _, step in deps]],
    )


def run(connection: Connection, workflow: str, graph: Graph, *, claims: bool = False) -> UUID:
    """Run the workflow from its start to its end; the steps of `graph` are in an order that it can take."""
    [run_id] = connection.execute("SELECT id FROM pgflow.run_workflow(%s, '{}')", [workflow]).fetchone() or [None]
    assert isinstance(run_id, UUID)
    for step in graph:
        if claims:
            connection.execute("SELECT * FROM pgflow.claim_step(%s, %s)", [run_id, step])
        connection.execute("""SELECT * FROM pgflow.complete_step(%s, %s, '{"ok": true}')""", [run_id, step])
    return run_id


def chain(length: int) -> Graph:
    """Return steps in a row."""
    return {f"s{n}": [f"s{n - 1}"] if n else [] for n in range(length)}


def join(width: int) -> Graph:
    """Return steps side by side, and one that waits for them all."""
    steps = [f"s{n}" for n in range(width)]
    return {step: [] for step in steps} | {"join": steps}


def set_commit(connection: Connection, *, synchronous: bool) -> None:
    """Set whether a commit waits for the disk."""
    connection.execute("SELECT set_config('synchronous_commit', %s, false)", ["on" if synchronous else "off"])


def engine_rate(server: str, *, claims: bool, synchronous: bool) -> float:
    """Return how many steps of short chains complete in a second."""
    graph = chain(CHAIN_STEPS)
    with fresh_database(server) as connection:
        define(connection, "chain", graph)
        set_commit(connection, synchronous=synchronous)
        took = seconds(lambda: [run(connection, "chain", graph, claims=claims) for _ in range(RUNS)])
    return RUNS * CHAIN_STEPS / took


def floor_rate(server: str, *, claims: bool, synchronous: bool) -> float:
    """Return the same for single-row updates, one a step, or two where steps are claimed as well."""
    commits = CHAIN_STEPS * (2 if claims else 1)

    def update_all(connection: Connection) -> None:
        for number in range(RUNS):
            for step in range(commits):
                connection.execute(FLOOR_UPDATE, [number + 1, step + 1])

    with fresh_database(server) as connection:
        connection.execute(FLOOR_TABLE)
        connection.execute(FLOOR_ROWS, [RUNS, commits])
        set_commit(connection, synchronous=synchronous)
        took = seconds(lambda: update_all(connection))
    return RUNS * CHAIN_STEPS / took


def compare_with_floor(server: str, name: str, target: Target | None, *, claims: bool, synchronous: bool) -> list[Row]:
    """Measure engine and floor in turn; the target is for their ratio."""
    measured = interleave(
        {
            "engine": partial(engine_rate, server, claims=claims, synchronous=synchronous),
            "floor": partial(floor_rate, server, claims=claims, synchronous=synchronous),
        },
        "steps/s",
        REPETITIONS,
    )
    return [
        Row(f"{name}: engine", measured["engine"]),
        Row(f"{name}: floor", measured["floor"]),
        Row(f"{name}: ratio", ratio(measured["engine"], measured["floor"]), target),
    ]


def measure_throughput(server: str) -> Report:
    """Measure completed steps a second, on one connection, beside one guarded single-row UPDATE a commit."""
    return Report(
        f"Engine: {RUNS} runs of {CHAIN_STEPS}-step chains, one connection, a commit a call",
        [
            *compare_with_floor(server, "completions", Target(at_least=0.4), claims=False, synchronous=True),
            *compare_with_floor(server, "with claims", None, claims=True, synchronous=True),
            *compare_with_floor(server, "asynchronous commit", Target(at_least=0.35), claims=False, synchronous=False),
        ],
    )


def cost_of_step(server: str, graph: Graph) -> float:
    """Return the milliseconds a step of first runs, their snapshots included; no disk hides what the engine does."""
    runs = max(1, STEPS_A_SIZE // len(graph))
    with fresh_database(server) as connection:
        set_commit(connection, synchronous=False)
        workflows = [f"workflow {number}" for number in range(runs)]
        for workflow in workflows:
            define(connection, workflow, graph)
        took = seconds(lambda: [run(connection, workflow, graph) for workflow in workflows])
    return took * 1000 / (runs * len(graph))


def measure_growth(server: str, shape: str, make: Callable[[int], Graph]) -> Report:
    """Measure what a step costs as its run grows: the same, whatever the size."""
    sides = {str(size): partial(cost_of_step, server, make(size)) for size in SIZES}
    measured: dict[str, Sample] = interleave(sides, "ms/step", SIZE_REPETITIONS)
    small, *_, large = (str(size) for size in SIZES)
    grown = ratio(measured[large], measured[small])
    return Report(
        f"Engine: {shape} of growing size, run creation included, synchronous_commit off",
        [
            *(Row(f"{shape} of {int(size):,}", sample) for size, sample in measured.items()),
            Row(f"{shape}: {int(large):,} / {int(small):,}", grown, Target(at_most=1.5)),
        ],
    )


def measure_engine(server: str) -> Iterator[Report]:
    """Measure the engine on a server that `server` connects to."""
    yield measure_throughput(server)
    yield measure_growth(server, "join", join)
    yield measure_growth(server, "chain", chain)
