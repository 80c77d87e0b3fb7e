"""A database that was made with pgflow's first five tables, and has rows in them, takes the script."""

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connection
from tests.engine import (
    CHAIN,
    DIAMOND,
    INVALID,
    column,
    complete,
    define,
    finish,
    get_run,
    get_state,
    refused,
    reopen,
    repair,
    run_workflow,
    start_step,
    statuses,
)

SEED = Path(__file__).with_name("seed.sql").read_bytes()
ENGINE = shipped_path("sql", "pgflow.sql").read_bytes()

COMPLETED, FAILED, MIDWAY, JOINING, UNTOUCHED = (UUID(int=number) for number in range(1, 6))
RUNS = [
    (COMPLETED, "chain", "completed", {"a": "completed", "b": "completed", "c": "completed"}),
    (FAILED, "chain", "failed", {"a": "completed", "b": "failed"}),
    (MIDWAY, "chain", "pending", {"a": "completed", "b": "pending"}),
    (JOINING, "diamond", "pending", {"a": "completed", "b": "completed", "c": "pending"}),
    (UNTOUCHED, "chain", "pending", {}),
]
PENDING = [MIDWAY, JOINING, UNTOUCHED]


@pytest.fixture
def seed_db(empty_dsn: str) -> Iterator[Connection]:
    """A database with the seed's tables, two workflows, and runs in every state."""
    with psycopg.connect(empty_dsn, autocommit=True) as db:
        db.execute(SEED)
        db.execute("RESET search_path")
        define(db, "chain", CHAIN)
        define(db, "diamond", DIAMOND)
        for run_id, workflow, status, states in RUNS:
            db.execute("INSERT INTO pgflow.runs VALUES (%s, %s, %s, '{}')", [workflow, run_id, status])
            for step, state in states.items():
                result = '"kept"' if state == "completed" else None
                row = [workflow, run_id, step, state, result]
                db.execute("INSERT INTO pgflow.step_states VALUES (%s, %s, %s, %s, %s)", row)
        yield db


@pytest.fixture
def upgraded(seed_db: Connection) -> Connection:
    seed_db.execute(ENGINE)
    return seed_db


def original_rows(db: Connection) -> list[list[tuple[object, ...]]]:
    """Return all rows, in the columns that the seed has."""
    return [
        db.execute("SELECT slug FROM pgflow.workflows ORDER BY 1").fetchall(),
        db.execute("SELECT workflow_slug, slug FROM pgflow.steps ORDER BY 1, 2").fetchall(),
        db.execute("SELECT workflow_slug, from_step_slug, to_step_slug FROM pgflow.deps ORDER BY 1, 2, 3").fetchall(),
        db.execute("SELECT workflow_slug, id, status, payload FROM pgflow.runs ORDER BY 2").fetchall(),
        db.execute(
            "SELECT workflow_slug, run_id, step_slug, status, step_result FROM pgflow.step_states ORDER BY 2, 3"
        ).fetchall(),
    ]


def catalog(db: Connection) -> dict[str, list[object]]:
    """Describe all that the schema holds, without what differs by history: its ids."""
    return {
        "columns": column(
            db,
            """SELECT concat_ws(' ', attrelid::regclass, attnum, attname, format_type(atttypid, atttypmod), attnotnull,
                                attidentity, pg_get_expr(adbin, adrelid))
               FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
               JOIN pg_class c ON c.oid = attrelid AND c.relkind = 'r'
               WHERE c.relnamespace = 'pgflow'::regnamespace AND attnum > 0 ORDER BY 1""",
        ),
        "tables": column(
            db,
            """SELECT concat_ws(' ', oid::regclass, relkind, reloptions::text)
               FROM pg_class WHERE relnamespace = 'pgflow'::regnamespace ORDER BY 1""",
        ),
        "constraints": column(
            db,
            """SELECT concat_ws(' ', conrelid::regclass, conname, pg_get_constraintdef(oid))
               FROM pg_constraint WHERE connamespace = 'pgflow'::regnamespace ORDER BY 1""",
        ),
        "indexes": column(db, "SELECT indexdef FROM pg_indexes WHERE schemaname = 'pgflow' ORDER BY 1"),
        "triggers": column(
            db,
            """SELECT pg_get_triggerdef(t.oid) FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
               WHERE c.relnamespace = 'pgflow'::regnamespace AND NOT tgisinternal ORDER BY 1""",
        ),
        "functions": column(
            db,
            """SELECT concat_ws(' ', pg_get_functiondef(oid), proacl::text, obj_description(oid))
               FROM pg_proc WHERE pronamespace = 'pgflow'::regnamespace ORDER BY 1""",
        ),
    }


def test_no_row_changes_in_its_original_columns(seed_db: Connection) -> None:
    before = original_rows(seed_db)
    seed_db.execute(ENGINE)
    assert original_rows(seed_db) == before


def test_old_rows_get_no_invented_times(upgraded: Connection) -> None:
    assert get_run(upgraded, COMPLETED).created_at is None
    state = get_state(upgraded, COMPLETED, "a")
    assert (state.created_at, state.finished_at, state.attempts) == (None, None, 0)


def test_an_upgraded_schema_equals_a_fresh_one(
    upgraded: Connection, make_database: Callable[[str | None], str]
) -> None:
    with psycopg.connect(make_database(None), autocommit=True) as fresh:
        fresh.execute(ENGINE)
        assert catalog(upgraded) == catalog(fresh)


def test_a_run_with_finished_steps_goes_on_to_its_end(upgraded: Connection) -> None:
    complete(upgraded, MIDWAY, "b")
    assert finish(upgraded, MIDWAY) == ["c"]
    assert get_run(upgraded, MIDWAY).status == "completed"
    assert get_state(upgraded, MIDWAY, "a").step_result == "kept"


def test_a_run_that_waits_at_a_join_goes_on_to_its_end(upgraded: Connection) -> None:
    complete(upgraded, JOINING, "c")
    assert finish(upgraded, JOINING) == ["d"]
    assert get_run(upgraded, JOINING).status == "completed"


def test_a_run_without_any_state_begins_at_its_first_transition(upgraded: Connection) -> None:
    assert start_step(upgraded, UNTOUCHED, "a").status == "pending"
    assert finish(upgraded, UNTOUCHED) == ["a", "b", "c"]
    assert get_run(upgraded, UNTOUCHED).status == "completed"


@pytest.mark.parametrize("run_id", PENDING)
def test_repair_run_brings_any_pending_run_on_its_way(upgraded: Connection, run_id: UUID) -> None:
    assert repair(upgraded, run_id).status == "pending"
    finish(upgraded, run_id)
    assert get_run(upgraded, run_id).status == "completed"


def test_a_failed_run_can_be_reopened(upgraded: Connection) -> None:
    assert reopen(upgraded, FAILED).status == "pending"
    assert statuses(upgraded, FAILED) == {"a": "completed", "b": "pending"}
    assert finish(upgraded, FAILED) == ["b", "c"]
    assert get_run(upgraded, FAILED).status == "completed"


def test_a_workflow_that_has_a_cycle_already_is_kept_but_not_run(seed_db: Connection) -> None:
    define(seed_db, "round", {"x": ["z"], "y": ["x"], "z": ["y"], "before": [], "after": ["x"]})
    seed_db.execute(ENGINE)
    with refused(INVALID, r'workflow "round" has a cycle: x -> y -> z -> x'):
        run_workflow(seed_db, "round")
    seed_db.execute("DELETE FROM pgflow.deps WHERE workflow_slug = 'round' AND to_step_slug = 'x'")
    run_id = run_workflow(seed_db, "round").id
    assert finish(seed_db, run_id) == ["before", "x", "after", "y", "z"]
