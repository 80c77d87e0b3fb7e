"""Old runs go, with everything that is theirs, in batches that read no more than they delete; others stay."""

from datetime import timedelta
from typing import LiteralString
from uuid import UUID

import anyio
import psycopg
import pytest

from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.pruning import PrunableRuns
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import UsageError
from pgflow_prefect.models import Status
from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connect, Connection
from tests.engine import (
    CHAIN,
    DIAMOND,
    INVALID,
    claim,
    column,
    complete,
    define,
    fail,
    finish,
    refused,
    reopen,
    run_workflow,
    value,
    wait_until_blocked,
)
from tests.integration.conftest import TENURE

pytestmark = pytest.mark.anyio

MONTH = timedelta(days=30)
CHILDREN = (
    "pgflow.step_states",
    "pgflow.undone_steps",
    "pgflow.waiting_steps",
    "pgflow_prefect.airflow_claims",
    "pgflow_prefect.airflow_waits",
    "pgflow_prefect.owners",
    "pgflow_prefect.flow_runs",
    "pgflow_prefect.task_runs",
    "pgflow_prefect.external_claims",
    "pgflow_prefect.set_aside_runs",
    "pgflow_prefect.shadow_reports",
    "pgflow_api.requests",
)


def end_run(db: Connection, workflow: str, days: float, status: str = "completed") -> UUID:
    """Run a workflow to its end, so many days ago."""
    run_id = run_workflow(db, workflow).id
    if status == "failed":
        claim(db, run_id, "a")
        fail(db, run_id, "a")
    else:
        finish(db, run_id)
    db.execute(
        "UPDATE pgflow.runs SET finished_at = finished_at - make_interval(secs => %s) WHERE id = %s",
        [days * 86400, run_id],
    )
    return run_id


def own(db: Connection, run_id: UUID, lease: str, *, settled: bool) -> None:
    db.execute(
        "INSERT INTO pgflow_prefect.owners (run_id, epoch, held_by, lease_until, settled) VALUES (%s, 1, 'x', %s, %s)",
        [run_id, lease, settled],
    )


def prune(db: Connection, *arguments: object) -> object:
    return value(db, f"SELECT pgflow_prefect.prune_runs('30 days'{', %s' * len(arguments)})", *arguments)


def run_ids(db: Connection) -> set[object]:
    return {*column(db, "SELECT id FROM pgflow.runs")}


@pytest.fixture
def chain(db: Connection) -> str:
    define(db, "chain", CHAIN)
    return "chain"


def test_only_runs_that_ended_before_then_go(db: Connection, chain: str) -> None:
    young = {end_run(db, chain, 29), end_run(db, chain, 29, "failed")}
    pending = run_workflow(db, chain).id
    db.execute(
        "UPDATE pgflow.runs SET created_at = created_at - interval '1 year', finished_at = created_at WHERE id = %s",
        [pending],
    )
    old = {end_run(db, chain, 31), end_run(db, chain, 31, "failed")}
    by_hand = end_run(db, chain, 31)
    db.execute("UPDATE pgflow.runs SET finished_at = NULL WHERE id = %s", [by_hand])
    assert prune(db) == len(old)
    assert run_ids(db) == {*young, pending, by_hand}, "the time at which the last one ended is unknown"


def test_what_a_run_has_left_in_any_table_goes_with_it(db: Connection, chain: str) -> None:
    db.execute(shipped_path("sql", "supabase/api.sql").read_bytes())
    define(db, "diamond", DIAMOND)
    run_id, kept = (run_workflow(db, "diamond").id for _ in range(2))
    for each in (run_id, kept):
        complete(db, each, "a")
        complete(db, each, "b")  # and the join waits for c
        own(db, each, "-infinity", settled=True)
        for table, columns, values in (
            ("flow_runs", "run_id, epoch, flow_run_id", "%s, 1, gen_random_uuid()"),
            (
                "mirrored_runs",
                "run_id, workflow_slug, source_id, source_run_id, source_mark, mirrored_at",
                "%s, 'diamond', 1, gen_random_uuid(), '', '2000-01-01'",
            ),
            ("task_runs", "run_id, step_slug, task_run_id, state_name", "%s, 'a', gen_random_uuid(), 'Completed'"),
            ("external_claims", "run_id, step_slug, attempt, claimed_until", "%s, 'a', 1, 'infinity'"),
            ("set_aside_runs", "run_id, epoch, reason", "%s, 1, 'a trigger'"),
            ("airflow_claims", "run_id, step_slug, attempt, try_number", "%s, 'a', 1, 1"),
            ("airflow_waits", "run_id, step_slug, try_number", "%s, 'a', 1"),
            ("shadow_reports", "run_id, workflow_slug, step_slug, outcome, seconds", "%s, 'diamond', 'a', 'same', 1"),
        ):
            db.execute(f"INSERT INTO pgflow_prefect.{table} ({columns}) VALUES ({values})", [each])  # noqa: S608
        db.execute("INSERT INTO pgflow_api.requests (run_id, action) VALUES (%s, 'reopen')", [each])
        db.execute("INSERT INTO pgflow.undone_steps VALUES (%s, 'd', 1)", [each])
    referring = column(
        db,
        """SELECT DISTINCT conrelid::regclass::text FROM pg_constraint
           WHERE confrelid = 'pgflow.runs'::regclass ORDER BY 1""",
    )
    assert referring == sorted(CHILDREN), "a new table: does it cascade?"
    db.execute("SELECT pgflow.cancel_run(%s)", [run_id])
    db.execute("UPDATE pgflow.runs SET finished_at = now() - interval '31 days' WHERE id = %s", [run_id])

    assert prune(db) == 1
    for table in CHILDREN:
        assert {*column(db, f"SELECT DISTINCT run_id FROM {table}")} == {kept}, table  # noqa: S608


def test_a_run_that_is_held_or_that_prefect_may_not_show_yet_stays_a_day_longer(db: Connection, chain: str) -> None:
    def end_three(days: float) -> list[UUID]:
        held, unsettled, settled = (end_run(db, chain, days) for _ in range(3))
        own(db, held, "infinity", settled=True)
        own(db, unsettled, "-infinity", settled=False)
        own(db, settled, "-infinity", settled=True)
        return [held, unsettled, settled]

    end_three(31.5)
    *left, _ = end_three(30.5)
    assert prune(db) == 4
    assert run_ids(db) == {*left}


async def test_counting_tells_what_pruning_would_do(store: Store, db: Connection, chain: str) -> None:
    end_run(db, chain, 31)
    own(db, end_run(db, chain, 30.5), "-infinity", settled=False)
    end_run(db, chain, 31, "failed")
    end_run(db, chain, 1)
    assert await store.count_prunable(MONTH) == [
        PrunableRuns(workflow_slug=chain, status=Status.COMPLETED, runs=1, kept=1),
        PrunableRuns(workflow_slug=chain, status=Status.FAILED, runs=1, kept=0),
    ]
    assert await store.prune_runs(MONTH, at_most=10, status=Status.FAILED) == 1
    assert await store.prune_runs(MONTH, at_most=10, workflow_slugs=["another"]) == 0
    assert await store.prune_runs(MONTH, at_most=10, workflow_slugs=[chain]) == 1
    assert [(each.runs, each.kept) for each in await store.count_prunable(MONTH)] == [(0, 1)]


def test_a_batch_takes_the_oldest_first_and_no_more_than_it_may(db: Connection, chain: str) -> None:
    ages = {days: end_run(db, chain, days) for days in (40, 45, 35, 50)}
    assert prune(db, 2) == 2
    assert run_ids(db) == {ages[40], ages[35]}
    assert [prune(db, 2), prune(db, 2)] == [2, 0]


def test_nothing_and_less_than_nothing_are_refused(db: Connection, chain: str) -> None:
    for wrong in ("'0 days'", "'-1 day'", "NULL", "'30 days', 0", "'30 days', 1, NULL, 'pending'"):
        with refused(INVALID):
            db.execute(f"SELECT pgflow_prefect.prune_runs({wrong})")


async def test_the_stores_pruning_refuses_them_as_a_usage_error(store: Store) -> None:
    with pytest.raises(UsageError):
        await store.prune_runs(timedelta(0), at_most=1)


def test_two_that_prune_at_once_share_the_work_and_neither_waits(connect: Connect, db: Connection, chain: str) -> None:
    for _ in range(6):
        end_run(db, chain, 31)
    first, second = connect(), connect()
    second.execute("SET lock_timeout = '5s'")
    with first.transaction():
        assert prune(first, 4) == 4
        assert prune(second, 4) == 2
    assert run_ids(db) == set()


async def test_many_that_prune_at_once_delete_each_run_once(dsn: str, db: Connection, chain: str) -> None:
    for _ in range(60):
        end_run(db, chain, 31)
    counts: list[int] = []

    async def prune_all(store: Store) -> None:
        while found := await store.prune_runs(MONTH, at_most=7):
            counts.append(found)

    async with open_pool(dsn, size=4, timeout=10) as pool, anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(prune_all, Store(pool, TENURE))
    assert sum(counts) == 60
    assert run_ids(db) == set()


def test_a_run_that_is_being_reopened_stays(connect: Connect, db: Connection, chain: str) -> None:
    run_id = end_run(db, chain, 31, "failed")
    other = connect()
    with other.transaction():
        reopen(other, run_id)
        assert prune(db) == 0
    assert prune(db) == 0
    assert run_ids(db) == {run_id}


def test_a_session_that_reopens_a_run_that_is_just_pruned_hears_that_it_is_gone(
    connect: Connect, db: Connection, chain: str
) -> None:
    run_id = end_run(db, chain, 31, "failed")
    other = connect()
    backend = other.info.backend_pid
    errors: list[psycopg.Error] = []

    async def try_to_reopen() -> None:
        def reopen_it() -> None:
            try:
                reopen(other, run_id)
            except psycopg.Error as error:
                errors.append(error)

        await anyio.to_thread.run_sync(reopen_it)

    async def race() -> None:
        async with anyio.create_task_group() as group:
            with db.transaction():
                assert prune(db) == 1
                group.start_soon(try_to_reopen)
                await anyio.to_thread.run_sync(wait_until_blocked, connect(), backend)

    anyio.run(race)
    assert [error.sqlstate for error in errors] == ["P0002"]


ROWS_READ = """
    SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint FROM pg_stat_xact_user_tables
    WHERE schemaname ~ '^pgflow'
"""


# Autovacuum may have looked at none of the tables, at one, or at both.
@pytest.mark.parametrize(
    "maintain",
    [
        "SELECT",
        "ANALYZE pgflow.runs",
        "ANALYZE pgflow.step_states",
        "ANALYZE",
        "VACUUM pgflow.runs",
        "VACUUM ANALYZE pgflow.step_states",
    ],
)
def test_a_batch_reads_what_it_deletes_among_however_many_runs(
    db: Connection, chain: str, maintain: LiteralString
) -> None:
    for other in ("another", "a third"):
        define(db, other, CHAIN)
    db.execute(
        """
        INSERT INTO pgflow.runs (workflow_slug, id, payload, status, finished_at)
        SELECT (ARRAY['chain', 'another', 'a third'])[i %% 3 + 1], gen_random_uuid(), '{}',
               CASE WHEN i %% 7 = 0 THEN 'failed' ELSE 'completed' END, now() - make_interval(mins => 5 * i)
        FROM generate_series(1, %s) i
        """,
        [17280],  # sixty days, a run every five minutes
    )
    db.execute(
        """
        INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug, status)
        SELECT workflow_slug, id, 'a', status FROM pgflow.runs
        """
    )
    db.execute(maintain)

    def count_read(*arguments: object) -> int:
        with db.transaction():
            before = value(db, ROWS_READ) or 0
            assert prune(db, *arguments) == 100
            after = value(db, ROWS_READ)
            assert isinstance(before, int)
            assert isinstance(after, int)
            return after - before

    # Of each run: looked at, locked, deleted, and its step. Of each workflow and status: the oldest.
    assert count_read(100) < 100 * 6 + 50
    assert count_read(100, ["a third"]) < 100 * 6 + 50
    assert count_read(100, None, "failed") < 100 * 6 + 50


def test_snapshots_that_no_run_refers_to_go_a_day_after_a_newer_one_came(db: Connection, chain: str) -> None:
    def edit(step: str) -> None:
        db.execute("INSERT INTO pgflow.steps VALUES (%s, %s)", [chain, step])

    unused = end_run(db, chain, 40)
    edit("d")
    referred = end_run(db, chain, 1)
    edit("e")
    db.execute("SELECT pgflow.snapshot(%s)", [chain])
    [first, second, current] = column(db, "SELECT id FROM pgflow.definitions ORDER BY id")
    statement = "SELECT pgflow_prefect.prune_definitions()"

    assert prune(db) == 1
    assert unused not in run_ids(db)
    assert value(db, statement) == 0, "a session may have read the version before it was edited"
    db.execute("UPDATE pgflow.definitions SET created_at = created_at - interval '2 days'")
    assert value(db, "SELECT pgflow_prefect.prune_definitions('{another}')") == 0
    assert value(db, statement) == 1
    assert column(db, "SELECT id FROM pgflow.definitions ORDER BY id") == [second, current]
    assert column(db, "SELECT DISTINCT definition_id FROM pgflow.definition_steps ORDER BY 1") == [second, current]
    db.execute("DELETE FROM pgflow.step_states WHERE run_id = %s", [referred])
    db.execute("DELETE FROM pgflow.runs WHERE id = %s", [referred])
    assert value(db, statement) == 1
    assert finish(db, run_workflow(db, chain).id), "the current one is whole"
    assert first != current
