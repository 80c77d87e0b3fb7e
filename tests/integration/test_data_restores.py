"""The data of a database, as `pg_dump --data-only` writes it, goes into one where the schemas are installed."""

from collections.abc import Callable, Iterator
from uuid import UUID

import psycopg
import pytest

from pgflow_prefect.database.connection import connect as connect_product
from pgflow_prefect.database.schema import install_schema
from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connection
from tests.copying import restore_data
from tests.engine import CHAIN, column, complete, finish, run_workflow, start_run, value

pytestmark = pytest.mark.anyio

ROWS = """
    INSERT INTO pgflow.workflows (slug, when_failed) VALUES ('orders', 'continue'), ('shipping', 'stop');
    INSERT INTO pgflow.steps (workflow_slug, slug) VALUES ('shipping', 'ship'), ('orders', 'list'), ('orders', 'tell');
    INSERT INTO pgflow.steps (workflow_slug, slug, step_type, map_over) VALUES ('orders', 'check', 'map', 'list');
    INSERT INTO pgflow.steps (workflow_slug, slug, child_workflow) VALUES ('orders', 'send', 'shipping');
    INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug)
    VALUES ('orders', 'list', 'check'), ('orders', 'check', 'tell'), ('orders', 'check', 'send');
    SELECT pgflow.start_backfill('chain', dates => ARRAY['2026-01-01'::timestamptz, '2026-01-02']);
    UPDATE pgflow.limits SET result_bytes = 67108864, depth = 150;
    SELECT pgflow_prefect.enable_workflow('chain');
    INSERT INTO pgflow_prefect.binding_requests (workflow_slug, step_slug, action, kind, target)
    VALUES ('chain', 'b', 'bind', 'sql', 'public.do_it');
    INSERT INTO pgflow_prefect.heartbeats (beats) VALUES (ARRAY[gen_random_uuid()]);
    INSERT INTO pgflow_prefect.schedules (id, workflow_slug, name, payload)
    VALUES (gen_random_uuid(), 'chain', 'nightly', '{"full": true}');
    INSERT INTO pgflow_prefect.mirrors (workflow_slug) VALUES ('shipping');
    INSERT INTO pgflow_prefect.airflow_dags (workflow_slug) VALUES ('chain');
"""
"""Rows of what there is once in a database."""

ROWS_OF_RUN = {
    "owners": ("run_id, epoch, flow_run_id, held_by, lease_until", "%s, 1, gen_random_uuid(), 'a worker', 'infinity'"),
    "flow_runs": ("run_id, epoch, flow_run_id", "%s, 1, gen_random_uuid()"),
    "mirrored_runs": (
        "run_id, workflow_slug, source_id, source_run_id, source_mark, mirrored_at",
        "%s, 'chain', 1, gen_random_uuid(), '', '2000-01-01'",
    ),
    "task_runs": ("run_id, step_slug, task_run_id, state_name", "%s, 'a', gen_random_uuid(), 'Completed'"),
    "external_claims": ("run_id, step_slug, attempt, claimed_until", "%s, 'b', 1, 'infinity'"),
    "set_aside_runs": ("run_id, epoch, reason", "%s, 1, 'a trigger'"),
    "cached_results": ("run_id, step_slug, cache_key, finished_at", "%s, 'a', repeat('0', 64), now()"),
    "airflow_claims": ("run_id, step_slug, attempt, try_number", "%s, 'a', 1, 1"),
    "airflow_waits": ("run_id, step_slug, try_number", "%s, 'a', 1"),
    "shadow_reports": ("run_id, workflow_slug, step_slug, outcome, seconds", "%s, 'chain', 'a', 'same', 1"),
}


@pytest.fixture
def target(template: str, make_database: Callable[[str | None], str]) -> str:
    """A database with both schemas and no rows of a user."""
    return make_database(template)


@pytest.fixture
def restored(target: str) -> Iterator[Connection]:
    with psycopg.connect(target, autocommit=True) as connection:
        yield connection


def fill(db: Connection) -> UUID:
    """Fill the tables, and return a run of which one of three steps is done."""
    run_id = start_run(db, "chain", CHAIN)
    complete(db, run_id, "a")
    db.execute(ROWS.encode())
    for table, (columns, values) in ROWS_OF_RUN.items():
        db.execute(f"INSERT INTO pgflow_prefect.{table} ({columns}) VALUES ({values})".encode(), [run_id])  # noqa: S608
    order = run_workflow(db, "orders").id
    complete(db, order, "list", [1, 2])
    db.execute("SELECT pgflow.claim_items(%s, 'check', 2)", [order])
    db.execute("SELECT pgflow.complete_items(%s, 'check', ARRAY[0, 1], '[true, false]')", [order])
    return run_id


def read_rows(db: Connection) -> dict[str, list[object]]:
    tables = column(
        db,
        """SELECT oid::regclass::text FROM pg_class WHERE relkind IN ('r', 'p')
           AND relnamespace IN ('pgflow'::regnamespace, 'pgflow_prefect'::regnamespace) ORDER BY 1""",
    )
    return {
        str(each): column(db, f"SELECT to_jsonb(t) - 'version' - 'edited_in' FROM {each} t ORDER BY 1")  # noqa: S608
        for each in tables
    }


@pytest.mark.parametrize("program", ["psql", "pg_restore"])
def test_every_row_of_a_dump_is_restored(
    db: Connection, dsn: str, target: str, restored: Connection, program: str
) -> None:
    if program == "pg_restore" and db.info.server_version < 170000:
        pytest.skip("the programs of these tests have a setting that this server does not know")
    run_id = fill(db)
    rows = read_rows(db)
    assert len([name for name, found in rows.items() if found]) > 25, "else this test shows little"
    restore_data(dsn, target, program)
    assert read_rows(restored) == rows
    assert finish(restored, run_id) == ["b", "c"]
    assert finish(restored, run_workflow(restored, "chain").id) == ["a", "b", "c"]
    assert value(restored, "SELECT max(id) FROM pgflow.definitions") == len(rows["pgflow.definitions"]) + 1


async def test_a_restore_without_triggers_works_as_the_guide_says_and_init_enables_them_for_every_session(
    db: Connection, dsn: str, target: str, restored: Connection
) -> None:
    always = "SELECT tgname::text FROM pg_trigger WHERE tgenabled = 'A' ORDER BY 1"
    run_id = fill(db)
    before = column(restored, always)
    restored.execute("DELETE FROM pgflow.limits; DELETE FROM pgflow_prefect.installation")
    restore_data(dsn, target, "psql", "--disable-triggers")
    assert read_rows(restored) == read_rows(db)
    async with await connect_product(target, timeout=10) as connection:
        await install_schema(connection)
    assert column(restored, always) == before
    assert value(restored, "SELECT depth FROM pgflow.limits") == 150
    assert finish(restored, run_id) == ["b", "c"]


def test_a_script_that_is_run_again_keeps_the_owners_limits(db: Connection) -> None:
    db.execute("UPDATE pgflow.limits SET digits = 2000")
    db.execute(shipped_path("sql", "pgflow.sql").read_bytes())
    assert value(db, "SELECT digits FROM pgflow.limits") == 2000
