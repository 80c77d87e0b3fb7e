"""The script may be run again at any time: on a live database, in any role's session."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import psycopg

from pgflow_prefect.database.schema import ENGINE_VERSION
from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connect, Connection
from tests.engine import CHAIN, finish, get_run, refused, start_run, value

ENGINE = shipped_path("sql", "pgflow.sql").read_bytes()

# Every row of the catalog that describes a table of ours, with the transaction that wrote it.
CATALOG_ROWS = """
    WITH ours AS (SELECT oid FROM pg_class WHERE relnamespace = 'pgflow'::regnamespace)
    SELECT 'class', oid, 0, xmin::text FROM pg_class WHERE oid IN (TABLE ours)
    UNION ALL SELECT 'attribute', attrelid, attnum, xmin::text FROM pg_attribute WHERE attrelid IN (TABLE ours)
    UNION ALL SELECT 'trigger', oid, 0, xmin::text FROM pg_trigger WHERE tgrelid IN (TABLE ours)
    UNION ALL SELECT 'constraint', oid, 0, xmin::text FROM pg_constraint WHERE conrelid IN (TABLE ours)
    ORDER BY 1, 2, 3
"""
TABLES = (
    "pgflow.workflows, pgflow.steps, pgflow.deps, pgflow.runs, pgflow.step_states, "
    "pgflow.definitions, pgflow.definition_steps, pgflow.definition_deps, pgflow.waiting_steps"
)


def settings(db: Connection) -> list[tuple[object, ...]]:
    """Return all settings but those of languages, which appear with their first use."""
    return db.execute("SELECT name, setting FROM pg_settings WHERE name NOT LIKE '%.%' ORDER BY name").fetchall()


def functions(db: Connection) -> list[tuple[object, ...]]:
    statement = """SELECT oid::regprocedure::text, pg_get_functiondef(oid), proacl::text, obj_description(oid)
                   FROM pg_proc WHERE pronamespace = 'pgflow'::regnamespace ORDER BY 1"""
    return db.execute(statement).fetchall()


def test_running_it_again_changes_nothing(db: Connection) -> None:
    before = db.execute(CATALOG_ROWS).fetchall(), functions(db)
    db.execute(ENGINE)
    assert (db.execute(CATALOG_ROWS).fetchall(), functions(db)) == before


def test_running_it_again_does_not_wait_for_writers(db: Connection, connect: Connect) -> None:
    with connect().transaction() as writing:
        writing.connection.execute("LOCK TABLE " + TABLES + " IN ROW EXCLUSIVE MODE")
        db.execute(ENGINE.replace(b"lock_timeout = '10s'", b"lock_timeout = '1ms'"))


def test_running_it_again_keeps_the_rows_and_the_runs(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    db.execute(ENGINE)
    assert finish(db, run_id) == ["a", "b", "c"]
    assert get_run(db, run_id).status == "completed"


def test_an_administrators_grants_survive_it(db: Connection) -> None:
    db.execute("GRANT EXECUTE ON FUNCTION pgflow.take_run(uuid) TO PUBLIC")
    before = functions(db)
    db.execute(ENGINE)
    assert functions(db) == before


def test_it_leaves_the_sessions_settings_alone(db: Connection) -> None:
    db.execute("SET search_path = pg_catalog; SET lock_timeout = '7s'; SET client_min_messages = log")
    before = settings(db)
    db.execute(ENGINE)
    assert settings(db) == before


def test_it_says_nothing_when_there_is_nothing_to_do(db: Connection) -> None:
    notices: list[str | None] = []
    db.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    db.execute(ENGINE)
    assert notices == []


def test_a_first_run_gives_up_where_a_table_stays_locked(empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn, autocommit=True) as db, psycopg.connect(empty_dsn) as reader:
        db.execute("CREATE SCHEMA pgflow; CREATE TABLE pgflow.workflows (slug TEXT PRIMARY KEY NOT NULL)")
        reader.execute("TABLE pgflow.workflows")
        with refused("55P03"):
            db.execute(ENGINE.replace(b"lock_timeout = '10s'", b"lock_timeout = '10ms'"))
        db.rollback()
        assert value(db, "SELECT to_regclass('pgflow.runs')") is None


def test_two_first_runs_at_once_take_turns(make_database: Callable[[str | None], str]) -> None:
    dsn = make_database(None)
    ready = Barrier(2)

    def install() -> object:
        with psycopg.connect(dsn, autocommit=True) as connection:
            ready.wait()
            connection.execute(ENGINE)
            return value(connection, "SELECT pgflow.engine_version()")

    with ThreadPoolExecutor(2) as pool:
        assert [task.result() for task in [pool.submit(install) for _ in range(2)]] == [ENGINE_VERSION, ENGINE_VERSION]
