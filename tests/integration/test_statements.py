"""What a step costs on the Postgres side: in autocommit, a statement is a transaction, and PostgreSQL counts those."""

from itertools import pairwise
from uuid import uuid4

import anyio
import psycopg
import pytest

from pgflow_prefect import StepContext, Workflow
from tests.integration.conftest import insert_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

OTHERS = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
COMMITS = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"


async def count_commits(dsn: str) -> int:
    """Return the number of transactions so far; a session adds its own when it ends, so all have to."""
    with psycopg.connect(dsn, autocommit=True) as connection, anyio.fail_after(60):
        while connection.execute(OTHERS).fetchone() is not None:
            await anyio.sleep(0.01)
        row = connection.execute(COMMITS).fetchone()
    assert row is not None
    return int(row[0])


async def count_statements(dsn: str, steps: int, failures: int) -> int:
    """Run a chain of steps, each of which fails so many times first, and return the statements that it took."""
    workflow = Workflow(f"chain-{uuid4().hex[:8]}")
    slugs = [f"s{number}" for number in range(steps)]
    for slug in slugs:

        @workflow.step(slug, retries=failures)
        async def work(context: StepContext) -> None:
            if context.attempt <= failures:
                raise ValueError("not yet")

    with psycopg.connect(dsn, autocommit=True) as connection:
        insert_workflow(connection, workflow.slug, slugs, pairwise(slugs))
    before = await count_commits(dsn)
    await workflow.flow()
    looked = await count_commits(dsn)
    return looked - before


async def test_a_step_of_a_chain_takes_one_statement_and_a_failed_attempt_one_more(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_LEASE", "600")  # or a slow machine extends it meanwhile
    short = await count_statements(dsn, steps=2, failures=0)
    long = await count_statements(dsn, steps=22, failures=0)
    shaky = await count_statements(dsn, steps=22, failures=1)
    # What completes one claims the next one. Looking takes a few, and so does what a slow machine has time for.
    assert abs((long - short) - 20) <= 8, (short, long)
    assert abs((shaky - long) - 22) <= 8, (long, shaky)
