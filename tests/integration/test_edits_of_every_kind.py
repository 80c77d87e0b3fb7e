"""Edits in other ways than by one INSERT: as a replica, with further columns, against the first run, by a restore."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connect, Connection
from tests.engine import (
    CHAIN,
    NOT_READY,
    cancel,
    complete,
    define,
    finish,
    refused,
    run_workflow,
    start_run,
    statuses,
    value,
    wait_until_blocked,
)

# In the order of a dump: a table after those that it refers to.
RESTORED = (
    "pgflow.workflows",
    "pgflow.steps",
    "pgflow.deps",
    "pgflow.definitions",
    "pgflow.definition_steps",
    "pgflow.definition_deps",
    "pgflow.runs",
    "pgflow.step_states",
    "pgflow_prefect.installation",
)


@pytest.mark.parametrize(
    ("edit", "steps"),
    [
        ("INSERT INTO pgflow.steps VALUES ('chain', 'd')", ["a", "d", "b", "c"]),
        ("INSERT INTO pgflow.deps VALUES ('chain', 'a', 'c')", ["a", "b", "c"]),
        ("DELETE FROM pgflow.deps WHERE to_step_slug = 'c'", ["a", "c", "b"]),
        ("DELETE FROM pgflow.deps WHERE to_step_slug = 'c'; DELETE FROM pgflow.steps WHERE slug = 'c'", ["a", "b"]),
    ],
)
def test_an_edit_as_a_replica_counts_from_the_next_run(db: Connection, edit: str, steps: list[str]) -> None:
    finish(db, start_run(db, "chain", CHAIN))
    db.execute("DELETE FROM pgflow.step_states; DELETE FROM pgflow.runs")
    before = value(db, "SELECT version FROM pgflow.workflows")
    db.execute(f"SET session_replication_role = replica; {edit}; RESET session_replication_role".encode())
    after = value(db, "SELECT version FROM pgflow.workflows")
    assert isinstance(before, int)
    assert isinstance(after, int)
    assert after > before
    assert finish(db, run_workflow(db, "chain").id) == steps


def test_a_cycle_that_was_loaded_as_a_replica_is_refused_by_the_next_run(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    db.execute("SET session_replication_role = replica")
    db.execute("INSERT INTO pgflow.deps VALUES ('chain', 'c', 'a')")
    db.execute("DELETE FROM pgflow.steps WHERE slug = 'c'")
    db.execute("INSERT INTO pgflow.steps VALUES ('chain', 'c')")
    db.execute("RESET session_replication_role")
    with refused("22023", "has a cycle: a -> b -> c -> a"):
        run_workflow(db, "chain")
    assert finish(db, run_id) == ["a", "b", "c"]


def test_an_older_installation_gets_triggers_that_fire_always(db: Connection) -> None:
    db.execute("ALTER TABLE pgflow.steps ENABLE TRIGGER ALL; ALTER TABLE pgflow.deps DISABLE TRIGGER edited_by_insert")
    db.execute(shipped_path("sql", "pgflow.sql").read_bytes())
    triggers = "SELECT tgenabled::text FROM pg_trigger WHERE tgrelid = %s::regclass AND tgname LIKE 'edited_by_%%'"
    assert {row[0] for row in db.execute(triggers, ["pgflow.steps"])} == {"A"}
    assert {row[0] for row in db.execute(triggers, ["pgflow.deps"])} == {"A", "D"}, "what was disabled stays so"


def test_steps_with_a_further_column_can_be_truncated_and_deleted(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    db.execute("ALTER TABLE pgflow.steps ADD COLUMN note text, ADD COLUMN made_at timestamptz DEFAULT now()")
    db.execute("ALTER TABLE pgflow.deps ADD COLUMN note text")
    with refused(NOT_READY, 'step "[abc]" of workflow "chain" can\'t be deleted'):
        db.execute("TRUNCATE pgflow.steps CASCADE")
    assert finish(db, run_id) == ["a", "b", "c"]
    db.execute("UPDATE pgflow.steps SET note = 'x'")
    db.execute("DELETE FROM pgflow.step_states; DELETE FROM pgflow.deps; DELETE FROM pgflow.steps WHERE slug = 'c'")
    db.execute("TRUNCATE pgflow.steps CASCADE")
    assert value(db, "SELECT count(*) FROM pgflow.steps") == 0


def test_an_edit_that_inserts_and_deletes_does_not_deadlock_with_the_first_run(
    db: Connection, connect: Connect
) -> None:
    define(db, "chain", CHAIN)
    edit, starting = connect(), connect()
    with ThreadPoolExecutor(1) as pool:
        edit.execute("BEGIN")
        edit.execute("INSERT INTO pgflow.steps VALUES ('chain', 'd')")
        run = pool.submit(run_workflow, starting, "chain")  # the first of a version: it waits for the edit
        wait_until_blocked(db, starting.info.backend_pid)
        edit.execute("DELETE FROM pgflow.deps WHERE to_step_slug = 'c'")
        edit.execute("DELETE FROM pgflow.steps WHERE slug = 'c'")
        edit.execute("COMMIT")
        assert finish(db, run.result().id) == ["a", "d", "b"]


def test_a_run_that_meets_a_deletion_begins_with_the_new_definition(db: Connection, connect: Connect) -> None:
    complete(db, start_run(db, "chain", CHAIN), "a")
    edit, starting = connect(), connect()
    db.execute("DELETE FROM pgflow.step_states; DELETE FROM pgflow.runs")
    with ThreadPoolExecutor(1) as pool:
        edit.execute("BEGIN")
        edit.execute("DELETE FROM pgflow.deps WHERE to_step_slug = 'c'")
        edit.execute("DELETE FROM pgflow.steps WHERE slug = 'c'")
        run = pool.submit(run_workflow, starting, "chain")
        wait_until_blocked(db, starting.info.backend_pid)
        edit.execute("INSERT INTO pgflow.steps VALUES ('chain', 'd')")
        edit.execute("COMMIT")
        started = run.result().id
    assert statuses(db, started) == {"a": "pending", "d": "pending"}
    assert finish(db, started) == ["a", "d", "b"]


def test_a_deletion_behind_two_first_runs_at_once_waits_for_no_lock_and_respects_both(
    db: Connection, connect: Connect
) -> None:
    define(db, "chain", CHAIN)
    first, second = connect(), connect()
    for each in (first, second):
        each.execute("SET lock_timeout = '1ms'")
    first.execute("BEGIN")
    cancel(first, run_workflow(first, "chain").id)
    other = run_workflow(second, "chain").id
    first.execute("DELETE FROM pgflow.deps WHERE to_step_slug = 'c'; SAVEPOINT before")
    with refused(NOT_READY, 'step "c" of workflow "chain" can\'t be deleted'):
        first.execute("DELETE FROM pgflow.steps WHERE slug = 'c'")
    first.execute("ROLLBACK TO before")
    assert finish(db, other) == ["a", "b", "c"]
    db.execute("DELETE FROM pgflow.step_states WHERE step_slug = 'c'")
    first.execute("DELETE FROM pgflow.steps WHERE slug = 'c'; COMMIT")
    assert finish(db, run_workflow(db, "chain").id) == ["a", "b"]
    assert value(db, "SELECT count(*) FROM pgflow.definitions") == 3


def test_a_snapshot_amid_edits_is_of_one_version(db: Connection, connect: Connect) -> None:
    define(db, "chain", CHAIN)
    editor = connect()

    def grow() -> None:
        for n in range(100):
            with editor.transaction():
                editor.execute("INSERT INTO pgflow.steps VALUES ('chain', %s)", [f"s{n}"])
                editor.execute("INSERT INTO pgflow.deps VALUES ('chain', 'c', %s)", [f"s{n}"])

    with ThreadPoolExecutor(1) as pool:
        edits = pool.submit(grow)
        while not edits.done():
            run_workflow(db, "chain")
        edits.result()
    run_workflow(db, "chain")
    mixed = """
        SELECT d.version FROM pgflow.definitions d
        WHERE d.step_count <> (SELECT count(*) FROM pgflow.definition_steps s WHERE s.definition_id = d.id)
           OR d.step_count - 1 <> (SELECT count(*) FROM pgflow.definition_deps e WHERE e.definition_id = d.id)
    """
    assert db.execute(mixed).fetchall() == []
    assert value(db, "SELECT max(step_count) FROM pgflow.definitions") == 103


def test_data_can_be_restored_into_an_installed_database(
    db: Connection, template: str, make_database: Callable[[str | None], str]
) -> None:
    run_id = start_run(db, "chain", CHAIN)
    complete(db, run_id, "a")
    with psycopg.connect(make_database(template), autocommit=True) as restored:
        for table in RESTORED:
            copy(db, restored, table)
        installation = "SELECT id FROM pgflow_prefect.installation"
        assert restored.execute(installation).fetchall() == db.execute(installation).fetchall()
        assert finish(restored, run_id) == ["b", "c"]


def copy(source: Connection, target: Connection, table: str) -> None:
    """Copy a table's rows as a dump of the data has them."""
    with (
        source.cursor().copy(f"COPY {table} TO STDOUT".encode()) as rows,
        target.cursor().copy(f"COPY {table} FROM STDIN".encode()) as written,
    ):
        for row in rows:
            written.write(row)
