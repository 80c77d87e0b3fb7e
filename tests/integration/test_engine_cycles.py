"""A cycle is refused when its last dep is inserted, and loading many steps stays linear."""

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from time import perf_counter

import pytest

from tests.conftest import Connect, Connection
from tests.engine import CHAIN, INVALID, LATE, define, refused, value, wait_until_blocked
from tests.growth import is_linear

CLOSE_CHAIN = "INSERT INTO pgflow.deps VALUES ('chain', 'c', 'a')"


def count_deps(db: Connection) -> object:
    return value(db, "SELECT count(*) FROM pgflow.deps")


def test_the_dep_that_closes_a_cycle_is_refused_with_the_path(db: Connection) -> None:
    define(db, "chain", CHAIN)
    with refused(INVALID, 'workflow "chain" has a cycle: a -> b -> c -> a'):
        db.execute(CLOSE_CHAIN)
    assert count_deps(db) == 2


def test_a_cycle_of_two_is_refused(db: Connection) -> None:
    define(db, "pair", {"a": [], "b": ["a"]})
    with refused(INVALID, "has a cycle: a -> b -> a\n"):
        db.execute("INSERT INTO pgflow.deps VALUES ('pair', 'b', 'a')")


def test_a_step_that_waits_for_itself_is_refused(db: Connection) -> None:
    define(db, "chain", CHAIN)
    with refused("23514"):
        db.execute("INSERT INTO pgflow.deps VALUES ('chain', 'a', 'a')")


def test_a_cycle_within_one_statement_is_refused(db: Connection) -> None:
    define(db, "bare", {"x": [], "y": [], "z": [], "aside": []})
    with refused(INVALID, "has a cycle: x -> y -> z -> x\n"):
        db.execute("""INSERT INTO pgflow.deps VALUES
                      ('bare', 'aside', 'x'), ('bare', 'z', 'x'), ('bare', 'y', 'z'), ('bare', 'x', 'y')""")
    assert count_deps(db) == 0


def test_a_statement_on_several_workflows_is_checked_in_each(db: Connection) -> None:
    define(db, "chain", CHAIN)
    define(db, "twin", CHAIN)
    with refused(INVALID, 'workflow "twin" has a cycle'):
        db.execute("INSERT INTO pgflow.deps VALUES ('chain', 'a', 'c'), ('twin', 'c', 'a')")


def test_the_same_edges_in_two_workflows_make_no_cycle(db: Connection) -> None:
    define(db, "chain", CHAIN)
    define(db, "backwards", {"c": [], "b": ["c"], "a": ["b"]})
    assert count_deps(db) == 4


def test_an_update_that_closes_a_cycle_is_refused(db: Connection) -> None:
    define(db, "chain", CHAIN | {"d": ["c"]})
    with refused(INVALID, "has a cycle: a -> b -> c -> a"):
        db.execute("UPDATE pgflow.deps SET to_step_slug = 'a' WHERE to_step_slug = 'd'")
    with refused(INVALID, "has a cycle: b -> c -> d -> b"):
        db.execute(
            "UPDATE pgflow.deps SET from_step_slug = CASE to_step_slug WHEN 'b' THEN 'd' ELSE from_step_slug END"
        )


def test_turning_a_whole_chain_round_is_no_cycle(db: Connection) -> None:
    define(db, "chain", CHAIN)
    db.execute("UPDATE pgflow.deps SET from_step_slug = to_step_slug, to_step_slug = from_step_slug")
    assert value(db, "SELECT slug FROM pgflow.get_root_steps('chain')") == "c"


def test_a_dep_that_is_there_already_passes(db: Connection) -> None:
    define(db, "chain", CHAIN)
    db.execute("INSERT INTO pgflow.deps VALUES ('chain', 'a', 'b'), ('chain', 'b', 'c') ON CONFLICT DO NOTHING")
    db.execute("""INSERT INTO pgflow.deps VALUES ('chain', 'a', 'b')
                  ON CONFLICT (workflow_slug, from_step_slug, to_step_slug) DO UPDATE SET to_step_slug = 'b'""")
    assert count_deps(db) == 2


def test_two_transactions_cannot_close_a_cycle_together(db: Connection, connect: Connect) -> None:
    define(db, "pair", {"a": [], "b": []})
    first, second = connect(), connect()
    with ThreadPoolExecutor(1) as pool:
        with first.transaction():
            first.execute("INSERT INTO pgflow.deps VALUES ('pair', 'a', 'b')")
            later = pool.submit(second.execute, "INSERT INTO pgflow.deps VALUES ('pair', 'b', 'a')")
            wait_until_blocked(db, second.info.backend_pid)
        with refused(INVALID, "has a cycle: a -> b -> a"):
            later.result()
    assert count_deps(db) == 1


def test_a_repeatable_read_transaction_cannot_close_one_either(db: Connection, connect: Connect) -> None:
    define(db, "pair", {"a": [], "b": []})
    late = connect()
    late.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    late.execute("TABLE pgflow.deps")
    db.execute("INSERT INTO pgflow.deps VALUES ('pair', 'a', 'b')")
    with refused(LATE):
        late.execute("INSERT INTO pgflow.deps VALUES ('pair', 'b', 'a')")


def test_two_transactions_that_edit_different_workflows_do_not_wait(db: Connection, connect: Connect) -> None:
    define(db, "chain", CHAIN)
    define(db, "pair", {"a": [], "b": []})
    db.execute("SET lock_timeout = '1ms'")
    with connect().transaction() as editing:
        editing.connection.execute("INSERT INTO pgflow.deps VALUES ('pair', 'a', 'b')")
        db.execute("INSERT INTO pgflow.deps VALUES ('chain', 'a', 'c')")


def path_of(error: BaseException) -> list[str]:
    """Return the cycle that the error's message tells."""
    return str(error).splitlines()[0].partition("has a cycle: ")[2].split(" -> ")


def test_any_cycle_in_a_random_graph_is_refused_with_a_path_that_exists(db: Connection) -> None:
    chance = random.Random(1)  # noqa: S311  a test
    steps = [f"s{number}" for number in range(12)]
    for workflow in ("first", "second", "third", "fourth", "fifth"):
        define(db, workflow, dict.fromkeys(steps, ()))
        edges = {tuple(chance.sample(steps, 2)) for _ in range(30)}
        with refused(INVALID, f'workflow "{workflow}" has a cycle') as caught:
            db.execute(
                "INSERT INTO pgflow.deps SELECT %s, * FROM unnest(%s::text[], %s::text[])",
                [workflow, [edge[0] for edge in edges], [edge[1] for edge in edges]],
            )
        path = path_of(caught.value)
        assert path[0] == path[-1]
        assert len(set(path)) == len(path) - 1
        assert set(pairwise(path)) <= edges


LOAD_CHAIN = """
    CREATE FUNCTION load_chain(workflow text, steps int, backwards boolean) RETURNS void LANGUAGE plpgsql AS $$
    DECLARE n int;
    BEGIN
        INSERT INTO pgflow.workflows VALUES (workflow);
        FOR i IN 0 .. steps LOOP
            INSERT INTO pgflow.steps VALUES (workflow, 's' || i);
        END LOOP;
        FOR i IN 1 .. steps LOOP
            n := CASE WHEN backwards THEN steps + 1 - i ELSE i END;
            INSERT INTO pgflow.deps VALUES (workflow, 's' || n - 1, 's' || n);
        END LOOP;
    END $$;
"""


@pytest.mark.thorough
@pytest.mark.parametrize("backwards", [False, True])
def test_loading_ten_thousand_steps_one_by_one_is_linear(db: Connection, backwards: bool) -> None:
    def load(steps: int) -> None:
        db.execute("SELECT load_chain(%s, %s, %s)", [f"chain {next(numbers)}", steps, backwards])

    numbers = count()
    db.execute(LOAD_CHAIN)
    assert is_linear(load, 2_000, 5, clock=perf_counter)  # the time of another process


def test_loading_ten_thousand_deps_in_one_statement_is_linear(db: Connection) -> None:
    def load(steps: int) -> None:
        define(db, f"long {next(numbers)}", {f"s{n}": [f"s{n - 1}"] if n else [] for n in range(steps)})

    numbers = count()
    assert is_linear(load, 2_000, 5, clock=perf_counter)
