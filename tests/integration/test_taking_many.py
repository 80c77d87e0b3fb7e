"""What taking a batch reads, and how processes share, where many runs are taken and many wait."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, LiteralString
from uuid import UUID

import pytest

from tests.conftest import Connect, Connection
from tests.engine import CHAIN, column, define, value
from tests.integration.test_ownership import LONG_UP

MANY = 10_000
BATCH = 50

TAKE = """
    SELECT run_id FROM pgflow_prefect.take_runs(
        workflow_slugs => ARRAY['chain'], wanted => %s, adopt => false, held_by => 'the tests', lease => 600,
        max_recoveries => 3, besides => '{}', expired => false)
"""
WAITING = """
    INSERT INTO pgflow.runs (workflow_slug, id, payload, definition_id, remaining)
    SELECT 'chain', gen_random_uuid(), '{}', d.id, d.step_count FROM pgflow.definitions d, generate_series(1, %s)
"""
TAKEN = """
    WITH taken AS (
        INSERT INTO pgflow.runs (workflow_slug, id, payload, definition_id, remaining, epoch, taken_in, created_at)
        SELECT 'chain', gen_random_uuid(), '{}', d.id, d.step_count, 1, 1, clock_timestamp() + %s
        FROM pgflow.definitions d, generate_series(1, %s) RETURNING id
    ) INSERT INTO pgflow_prefect.owners (run_id, epoch, held_by, lease_until)
    SELECT id, 1, 'another process', 'infinity' FROM taken
"""
ROWS_READ = """
    SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint FROM pg_stat_xact_user_tables
    WHERE schemaname IN ('pgflow', 'pgflow_prefect')
"""
MAINTENANCE = (
    *("SELECT", "ANALYZE", "VACUUM", "VACUUM ANALYZE", "ANALYZE pgflow.runs", "ANALYZE pgflow_prefect.owners"),
    *("VACUUM pgflow.runs", "VACUUM ANALYZE pgflow.runs"),
)
"""Autovacuum may have looked at none of the tables, at one, or at all of them."""


@pytest.fixture
def db_with_plans(db: Connection) -> Connection:
    """A connection that has made its plans while there were few runs."""
    define(db, "chain", CHAIN)
    db.execute("SELECT pgflow_prefect.enable_workflow('chain')")
    db.execute(LONG_UP)
    db.execute("SELECT pgflow.run_workflow('chain', '{}')")
    for _ in range(6):
        db.execute(TAKE, [BATCH])
    return db


def count_rows(db: Connection) -> int:
    """Take a batch, and return how many rows that reads."""

    def count() -> int:
        return int(str(value(db, ROWS_READ)))

    with db.transaction():  # within one, the statistics are not handed on
        before = count()
        assert len(column(db, TAKE, BATCH)) == BATCH
        return count() - before


def count_pages(db: Connection) -> int:
    """Take a batch, and return how many pages that touches."""
    plans: Any = value(db, "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)" + TAKE, BATCH)
    plan = plans[0]["Plan"]
    assert plan["Actual Rows"] == BATCH
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


@pytest.mark.parametrize("maintain", MAINTENANCE)
@pytest.mark.parametrize("age", ["-1 hour", "1 hour"], ids=["older", "newer"])
def test_a_batch_reads_no_run_that_is_taken(db_with_plans: Connection, maintain: LiteralString, age: str) -> None:
    db = db_with_plans
    db.execute(WAITING, [MANY])
    db.execute(maintain)
    rows, pages = count_rows(db), count_pages(db)
    db.execute(TAKEN, [age, MANY])
    db.execute(maintain)
    assert count_rows(db) <= rows + BATCH
    assert count_pages(db) <= 1.5 * pages


def test_the_hundredth_batch_reads_what_the_first_one_does(db_with_plans: Connection) -> None:
    """What was taken leaves dead entries in the index: each is read once, and not by each later batch."""
    db = db_with_plans
    db.execute("ALTER TABLE pgflow.runs SET (autovacuum_enabled = false)")
    db.execute(WAITING, [201 * BATCH])
    first = count_pages(db)
    for _ in range(100):
        db.execute(TAKE, [BATCH])
    # While an analysis of another table is open, dead entries stay: a later batch tells.
    assert any(count_pages(db) <= 1.5 * first for _ in range(100))


def test_two_connections_share_what_waits_and_neither_waits_for_the_other(
    db_with_plans: Connection, connect: Connect
) -> None:
    db, others = db_with_plans, [connect(), connect()]
    db.execute(WAITING, [MANY])
    waiting = set(column(db, "SELECT id FROM pgflow.runs WHERE taken_in IS NULL"))
    start = Barrier(2)

    def take_all(other: Connection) -> Sequence[UUID]:
        other.execute("SET lock_timeout = '60s'")  # the first transaction stays open for as long as they take
        start.wait(60)
        taken: list[UUID] = []
        while batch := column(other, TAKE, 100):
            taken += batch  # type: ignore[arg-type]
        return taken

    with db.transaction():
        held = column(db, TAKE, 100)
        with ThreadPoolExecutor(2) as threads:
            taken = list(threads.map(take_all, others))
    # Each may have found the runs locked that the other was about to take, and looked no more.
    rest = column(db, TAKE, MANY)
    everything = [*held, *taken[0], *taken[1], *rest]
    assert len(everything) == MANY
    assert set(everything) == waiting
