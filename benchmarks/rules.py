"""Maps and skips in the engine alone: what an item costs as its map grows, and a skip as more is below it."""

from collections.abc import Callable, Iterator
from functools import partial
from uuid import UUID

import psycopg

from benchmarks.costs import STATEMENTS
from benchmarks.engine import SIZE_REPETITIONS, Connection, Graph, chain, define, fresh_database, set_commit
from benchmarks.measure import Report, Row, Sample, Target, interleave, ratio, seconds

BATCH = 100
MAPS = (1_000, 10_000, 100_000)
CASCADES = (100, 1_000, 10_000)
STEPS_A_SIZE = 10_000  # small cascades are repeated until there are so many steps

_CLAIM = "SELECT item_index FROM pgflow.claim_items(%s, 'work', %s)"
_COMPLETE = "SELECT pgflow.complete_items(%s, 'work', %s, to_jsonb(%s::int[]))"


def fan(width: int) -> Graph:
    """Return one step, and steps that wait for it."""
    return {"first": [], **{f"s{number}": ["first"] for number in range(width)}}


def start(connection: Connection, workflow: str, payload: str) -> UUID:
    """Start a run."""
    [run_id] = connection.execute("SELECT id FROM pgflow.run_workflow(%s, %s)", [workflow, payload]).fetchone() or [
        None
    ]
    assert isinstance(run_id, UUID)
    return run_id


def run_map(connection: Connection, size: int) -> None:
    """Run a map from the start of its run to its end: claims and reports in batches."""
    run_id = start(connection, "map", str([*range(size)]))
    while claimed := [int(str(index)) for (index,) in connection.execute(_CLAIM, [run_id, BATCH])]:
        connection.execute(_COMPLETE, [run_id, claimed, claimed])
    ended = "SELECT status, jsonb_array_length(step_result) FROM pgflow.step_states WHERE run_id = %s"
    assert connection.execute(ended, [run_id]).fetchone() == ("completed", size)


def define_map(connection: Connection) -> None:
    """Insert the workflow of one map over its payload."""
    define(connection, "map", {"work": []})
    connection.execute("UPDATE pgflow.steps SET step_type = 'map' WHERE workflow_slug = 'map'")


def cost_of_item(server: str, size: int) -> float:
    """Return the microseconds an item of a map, in a database that was never analyzed."""
    with fresh_database(server) as connection:
        set_commit(connection, synchronous=False)
        define_map(connection)
        return seconds(lambda: run_map(connection, size)) * 1e6 / size


def count_statements(server: str, size: int) -> float:
    """Return how many statements an item of a map takes."""
    with fresh_database(server) as connection, psycopg.connect(server, autocommit=True) as statistics:
        define_map(connection)

        def count() -> int:
            [number] = statistics.execute(STATEMENTS, [connection.info.dbname]).fetchone() or [0]
            return int(str(number))

        before = count()
        run_map(connection, size)
        return (count() - before) / size


def cost_of_skip(server: str, graph: Graph) -> float:
    """Return the microseconds for each step that is skipped with the first one."""
    runs = max(1, STEPS_A_SIZE // len(graph))
    first = next(iter(graph))
    with fresh_database(server) as connection:
        set_commit(connection, synchronous=False)
        define(connection, "cascade", graph)
        run_ids = [start(connection, "cascade", "{}") for _ in range(runs)]

        def skip_all() -> None:
            for run_id in run_ids:
                connection.execute("SELECT pgflow.skip_step(%s, %s)", [run_id, first])

        took = seconds(skip_all)
        ended = "SELECT count(*) FROM pgflow.step_states WHERE skip_reason IS NOT NULL"
        assert connection.execute(ended).fetchone() == (runs * len(graph),)
    return took * 1e6 / (runs * len(graph))


def cost_of_cascade(server: str, make: Callable[[int], Graph], size: int) -> float:
    """Return the microseconds for each skipped step of a graph of this size."""
    return cost_of_skip(server, make(size))


def compare_sizes(name: str, sizes: tuple[int, ...], measure: Callable[[int], float], unit: str) -> list[Row]:
    """Measure all sizes in turn; the target is for the largest one beside the smallest."""
    sides = {str(size): partial(measure, size) for size in sizes}
    measured: dict[str, Sample] = interleave(sides, unit, SIZE_REPETITIONS)
    small, *_, large = (str(size) for size in sizes)
    return [
        *(Row(f"{name} of {int(size):,}", sample) for size, sample in measured.items()),
        Row(
            f"{name}: {int(large):,} / {int(small):,}",
            ratio(measured[large], measured[small]),
            Target(at_most=1.5),
        ),
    ]


def measure_rules(server: str) -> Iterator[Report]:
    """Measure maps and skip cascades on a server that counts statements."""
    rows = compare_sizes("map", MAPS, partial(cost_of_item, server), "\u00b5s/item")
    counted = Sample(tuple(count_statements(server, MAPS[1]) for _ in range(SIZE_REPETITIONS)), "")
    rows.append(Row("statements an item", counted, Target(at_most=0.05)))
    yield Report(f"Engine: maps of growing size, in batches of {BATCH}, synchronous_commit off", rows)
    shapes: dict[str, Callable[[int], Graph]] = {"chain": chain, "fan-out": fan}
    rows = []
    for shape, make in shapes.items():
        rows += compare_sizes(shape, CASCADES, partial(cost_of_cascade, server, make), "\u00b5s/step")
    yield Report("Engine: skip cascades of growing size, synchronous_commit off", rows)
