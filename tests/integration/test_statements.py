"""What a step costs on the Postgres side: in autocommit, a statement is a transaction."""

from itertools import pairwise
from uuid import uuid4

import psycopg
import pytest

from pgflow_prefect import AsyncStepContext, Workflow
from pgflow_prefect.cli.run import run
from tests.conftest import Connection
from tests.integration.conftest import insert_workflow, read_run
from tests.statement_counter import StatementCounter

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]


async def count_of_chain(counter: StatementCounter, db: Connection, steps: int, failures: int) -> int:
    """Run a chain of steps, each of which fails so many times first, and return the statements that it took."""
    workflow = Workflow(f"chain-{uuid4().hex[:8]}")
    slugs = [f"s{number}" for number in range(steps)]
    for slug in slugs:

        @workflow.step(slug, retries=failures)
        async def work(context: AsyncStepContext) -> None:
            if context.attempt <= failures:
                raise ValueError("not yet")

    insert_workflow(db, workflow.slug, slugs, pairwise(slugs))
    before = counter.count
    await workflow.flow()
    return counter.count - before


async def test_a_step_of_a_chain_takes_one_statement_and_a_failed_attempt_one_more(
    counter: StatementCounter, db: Connection
) -> None:
    short = await count_of_chain(counter, db, steps=2, failures=0)
    long = await count_of_chain(counter, db, steps=22, failures=0)
    shaky = await count_of_chain(counter, db, steps=22, failures=1)
    # What completes one claims the next one. A slow machine has time for a few more, such as looks at the run.
    assert abs((long - short) - 20) <= 8, (short, long)
    assert abs((shaky - long) - 22) <= 8, (long, shaky)


def count_reads(counter: StatementCounter) -> tuple[int, int, int]:
    """Return how often workflows, definitions of runs and bindings were read so far."""
    load, load_of_run, bindings = map(counter.count_calls, ("load_definitions", "load_run_definition", "list_bindings"))
    return load, load_of_run, bindings


def test_the_command_run_reads_each_definition_and_the_bindings_once(counter: StatementCounter, db: Connection) -> None:
    slug, reads = f"bound-{uuid4().hex[:8]}", []
    insert_workflow(db, slug, ["first", "last"], [("first", "last")])
    db.execute("CREATE SCHEMA app")
    db.execute("CREATE FUNCTION app.f(jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT '1'::jsonb $$")
    db.execute("CREATE FUNCTION app.g(jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT (1 / 0)::text::jsonb $$")
    for step, function in (("first", "app.f"), ("last", "app.g")):
        db.execute("SELECT pgflow_prefect.bind_step(%s, %s, 'sql', %s, '{}')", [slug, step, function])

    assert run(slug, json=True) == 1
    reads.append(count_reads(counter))
    db.execute("CREATE OR REPLACE FUNCTION app.g(jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT '1'::jsonb $$")
    run_id = str(read_run(db)[-1])
    assert run(resume=run_id, json=True) == 0
    reads.append(count_reads(counter))

    # A new run: the workflow, to check it, and then what the run began with, for an edit may come between.
    assert reads == [(1, 1, 1), (1, 2, 2)]


def test_each_statement_of_each_client_is_counted_once(counter: StatementCounter) -> None:
    for autocommit, expected in ((True, 4), (False, 6)):  # a transaction has a BEGIN and a COMMIT
        before = counter.count
        with psycopg.connect(counter.dsn, autocommit=autocommit) as connection:
            connection.execute("SELECT 1")
            connection.execute("SELECT %s", [1])
            connection.execute("SELECT length(%s)", ["x" * 300_000])  # in several pieces
            connection.execute("SELECT 1; SELECT 2")
        assert counter.count - before == expected
