"""`init` on two million task runs and two million ended runs keeps no claim waiting for longer than about a second.

It runs by command: `python -m pytest tests/faults/test_big_upgrade.py --big`.
"""

import threading
import time
from uuid import UUID

import anyio
import psycopg
import pytest

from pgflow_prefect.database.connection import connect as connect_product
from pgflow_prefect.database.schema import install_schema
from tests.engine import define, run_workflow
from tests.former import install_former

RUNS, STEPS = 20_000, 100
PAST = 2_000_000
"""Further runs, of which each 20th has failed and each 200th was cancelled."""
LONGEST = 3.0
"""Seconds that a claim may take. A key that is built under a lock takes more; without one, about a second is usual."""

FILL = """
    INSERT INTO pgflow.runs (workflow_slug, id, status, payload, remaining, epoch, finished_at)
    SELECT 'wide', gen_random_uuid(), 'completed', '{}', 0, 1, clock_timestamp() FROM generate_series(1, %(runs)s);
"""
FILL_STEPS = """
    INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug, status, attempts, started_at, finished_at)
    SELECT 'wide', r.id, 's' || n, 'completed', 1, clock_timestamp(), clock_timestamp()
    FROM pgflow.runs r, generate_series(1, %(steps)s) AS n WHERE r.workflow_slug = 'wide'
"""
FILL_PAST = """
    INSERT INTO pgflow.runs (workflow_slug, id, status, payload, remaining, epoch, finished_at, error_message)
    SELECT 'past', gen_random_uuid(), CASE WHEN n %% 20 = 0 THEN 'failed' ELSE 'completed' END,
           jsonb_build_object('text', repeat('x', 200)), 0, 1, clock_timestamp(),
           CASE WHEN n %% 200 = 0 THEN 'cancelled' WHEN n %% 20 = 0 THEN 'step "a" failed: broken' END
    FROM generate_series(1, %(past)s) AS n
"""
FILL_TASKS = """
    INSERT INTO pgflow_prefect.task_runs (run_id, step_slug, task_run_id, state_name)
    SELECT s.run_id, s.step_slug, gen_random_uuid(), 'Completed' FROM pgflow.step_states s
"""
CLAIM = """
    SELECT status FROM pgflow_prefect.claim_step(
        %s, 'a', 0, gen_random_uuid(), NULL, true, 'python', true, 'python')
"""


@pytest.mark.skipif("not config.getoption('--big')", reason="two million rows: name this file, and say --big")
def test_an_upgrade_of_two_million_rows_keeps_no_claim_waiting(
    empty_dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    install_former(empty_dsn)
    with psycopg.connect(empty_dsn, autocommit=True) as db:
        define(db, "wide", {f"s{n}": [] for n in range(1, STEPS + 1)})
        define(db, "live", {"a": []})
        db.execute("SET synchronous_commit = off; SET session_replication_role = replica")
        define(db, "past", {"a": []})
        for fill in (FILL, FILL_STEPS, FILL_PAST, FILL_TASKS):
            db.execute(fill, {"runs": RUNS, "steps": STEPS, "past": PAST})
        db.execute("RESET session_replication_role")
        db.execute("VACUUM ANALYZE")
        run = run_workflow(db, "live", {}).id
        took, upgraded = measure(empty_dsn, run)
        noted = db.execute("SELECT count(*) FROM pgflow.runs WHERE ended_as = 'cancelled'").fetchone()
    with capsys.disabled():
        told = f"{RUNS * STEPS:,} task runs: upgraded in {upgraded:.1f} s"
        print(f"\n{told}; the longest of {len(took):,} claims took {max(took):.2f} s")
    assert max(took) < LONGEST
    assert noted == (PAST // 200,)


def measure(dsn: str, run: UUID) -> tuple[list[float], float]:
    """Return how long each claim took while `init` upgraded, and how long that took, in seconds."""
    took: list[float] = []
    over = threading.Event()

    def claim() -> None:
        with psycopg.connect(dsn, autocommit=True) as worker:
            while not over.is_set():
                began = time.monotonic()
                assert worker.execute(CLAIM, [run]).fetchone() == ("pending",)
                took.append(time.monotonic() - began)

    async def init() -> None:
        async with await connect_product(dsn, timeout=10) as connection:
            await install_schema(connection)

    worker = threading.Thread(target=claim)
    worker.start()
    began = time.monotonic()
    try:
        anyio.run(init)
        upgraded = time.monotonic() - began
    finally:
        over.set()
        worker.join()
    return took, upgraded
