"""What a transition reads grows with the step's own degree, not with the run, whatever the planner believes.

A session keeps the plans that it made while the tables were empty, and statistics lag behind a growing table.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from time import monotonic

import pytest

from tests.conftest import Connection
from tests.engine import (
    DIAMOND,
    claim,
    complete,
    define,
    fail,
    finish,
    reopen,
    repair,
    run_workflow,
    start_run,
    start_step,
    value,
)
from tests.growth import is_linear

# The rows that this transaction's statements have read so far.
ROWS_READ = """
    SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint FROM pg_stat_xact_user_tables
    WHERE schemaname = 'pgflow'
"""
WIDTH = 1000
STEPS: Mapping[str, Sequence[str]] = {"p": [], "q": [], "u": [], "v": [], "pair": ["u", "v"]} | {
    f"join{number}": ["p", "q"] for number in range(WIDTH)
}


@pytest.fixture(params=["never analyzed", "analyzed when small"])
def db_with_plans(request: pytest.FixtureRequest, db: Connection) -> Connection:
    """A connection whose plans were made on a few rows, with or without statistics of them."""
    define(db, "small", DIAMOND)
    finish(db, run_workflow(db, "small").id)
    if request.param == "analyzed when small":
        db.execute("ANALYZE")
    for _ in range(6):  # a plan for any parameters is made at the sixth time
        run_id = run_workflow(db, "small").id
        claim(db, run_id, "a")
        finish(db, run_id)
    db.execute("SET statement_timeout = '20s'")
    return db


def rows_read(db: Connection, act: Callable[[], object]) -> int:
    def count() -> int:
        read = value(db, ROWS_READ)
        assert isinstance(read, int)
        return read

    with db.transaction():  # within one, the statistics are not handed on
        before = count()
        act()
        return count() - before


@pytest.mark.thorough
def test_a_step_costs_its_own_degree_in_a_run_with_a_thousand_others(db_with_plans: Connection) -> None:
    db = db_with_plans
    run_id = start_run(db, "wide", STEPS)
    assert rows_read(db, lambda: complete(db, run_id, "p")) < 10 * WIDTH  # and a thousand joins begin to wait
    assert rows_read(db, lambda: claim(db, run_id, "u")) < 50
    assert rows_read(db, lambda: complete(db, run_id, "u")) < 50
    assert rows_read(db, lambda: complete(db, run_id, "v")) < 50
    assert rows_read(db, lambda: claim(db, run_id, "pair")) < 50
    assert rows_read(db, lambda: complete(db, run_id, "q")) < 20 * WIDTH  # and all of them start
    assert rows_read(db, lambda: complete(db, run_id, "join0")) < 50
    assert rows_read(db, lambda: claim(db, run_id, "join1")) < 50
    assert rows_read(db, lambda: start_step(db, run_id, "join1")) < 50
    assert rows_read(db, lambda: value(db, "SELECT pgflow.has_unmet_deps(%s, 'join1')", run_id)) < 50
    assert rows_read(db, lambda: fail(db, run_id, "join1")) < 50


@pytest.mark.thorough
def test_looking_at_a_whole_run_costs_its_size(db_with_plans: Connection) -> None:
    db = db_with_plans
    run_id = start_run(db, "wide", STEPS)
    complete(db, run_id, "p")

    def get_ready() -> None:
        db.execute("SELECT pgflow.get_ready_steps(%s)", [run_id])

    assert rows_read(db, get_ready) < 20 * WIDTH
    assert rows_read(db, lambda: repair(db, run_id)) < 30 * WIDTH
    complete(db, run_id, "q")
    fail(db, run_id, "join0")
    assert rows_read(db, lambda: reopen(db, run_id)) < 30 * WIDTH


def rows_read_at_join(db: Connection, width: int) -> int:
    """Return how many rows a completion reads, in the middle of all that a join of this width takes."""
    steps = [f"up{number}" for number in range(width)]
    run_id = start_run(db, f"join of {width}", dict.fromkeys(steps, ()) | {"join": steps})
    for step in steps[: width // 2]:
        complete(db, run_id, step)
    return rows_read(db, lambda: complete(db, run_id, steps[-1]))


def test_a_completion_reads_as_many_rows_below_a_wide_join_as_below_a_narrow_one(db_with_plans: Connection) -> None:
    narrow, wide = rows_read_at_join(db_with_plans, 50), rows_read_at_join(db_with_plans, 1000)
    assert wide <= narrow + 5
    assert wide < 50


@pytest.mark.parametrize("failed_by", ["leaves", pytest.param("steps", marks=pytest.mark.thorough)])
def test_the_first_run_of_a_workflow_costs_its_size(db: Connection, failed_by: str) -> None:
    """In time, not in rows that are read: those of a WITH query are counted nowhere."""

    def begin(steps: int) -> None:
        name = f"chain {next(numbers)}"
        define(db, name, {f"s{number}": [f"s{number - 1}"] if number else [] for number in range(steps)})
        db.execute("UPDATE pgflow.workflows SET failed_by = %s WHERE slug = %s", [failed_by, name])
        run_workflow(db, name)

    numbers = count()
    assert is_linear(begin, 2_000, 6, clock=monotonic)
