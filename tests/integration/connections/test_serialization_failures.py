"""Serialization failures of a step's transaction: the step is executed again."""

from typing import LiteralString

import anyio
import psycopg
import pytest
from psycopg import sql
from psycopg.errors import SerializationFailure

from pgflow_prefect import AsyncStepContext, StepContext, Workflow
from pgflow_prefect.errors import RunFailedError
from tests.conftest import Connection
from tests.integration.conftest import Define, make_slug, read_steps
from tests.integration.connections.writers import INSERT, add_writer, raise_once, read_attempts

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

ISOLATE: LiteralString = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"


COUNT: LiteralString = "UPDATE counted SET n = n + 1"


async def test_after_a_serialization_failure_in_a_sync_handler_it_is_executed_again(
    db: Connection, workflow: Workflow
) -> None:
    @workflow.step
    def write(context: StepContext) -> int:
        context.connection.execute(ISOLATE)
        context.connection.execute(INSERT, (context.attempt,))
        if context.attempt == 1:
            db.execute(COUNT)
        with context.connection.transaction():  # what is lost in a savepoint is lost as a whole
            context.connection.execute(COUNT)
        return context.attempt

    assert await workflow.flow() == {"write": 2}
    assert read_attempts(db) == [2]
    assert db.execute("SELECT n FROM counted").fetchone() == (2,)


async def test_after_a_serialization_failure_in_an_async_handler_it_is_executed_again(
    db: Connection, workflow: Workflow
) -> None:
    @workflow.step
    async def write(context: AsyncStepContext) -> int:
        await context.connection.execute(ISOLATE)
        await context.connection.execute(INSERT, (context.attempt,))
        if context.attempt == 1:
            db.execute(COUNT)
        await context.connection.execute(COUNT)
        return context.attempt

    assert await workflow.flow() == {"write": 2}
    assert read_attempts(db) == [2]
    assert db.execute("SELECT n FROM counted").fetchone() == (2,)


async def test_after_a_serialization_failure_of_the_completion_the_step_is_executed_again(
    db: Connection, workflow: Workflow
) -> None:
    @workflow.step
    def write(context: StepContext) -> int:
        context.connection.execute(ISOLATE)
        context.connection.execute(INSERT, (context.attempt,))
        if context.attempt == 1:  # as when another step completes
            db.execute("UPDATE pgflow.runs SET remaining = remaining")
        return context.attempt

    assert await workflow.flow() == {"write": 2}
    assert read_attempts(db) == [2]


@pytest.mark.parametrize("isolation", ["serializable", "repeatable read"])
async def test_of_two_parallel_branches_under_another_isolation_one_is_executed_once_more_and_uses_no_retry(
    db: Connection, define: Define, isolation: str
) -> None:
    """The later one can't complete on its snapshot: the first one's completion has changed the run."""
    workflow = Workflow(make_slug())
    define(workflow.slug, ["a", "b", "c", "d"], [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")])
    name = sql.Identifier(db.info.dbname)
    db.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_isolation = {}").format(name, isolation))
    begun = {"b": anyio.Event(), "c": anyio.Event()}

    async def write(context: AsyncStepContext) -> str:
        await context.connection.execute(INSERT, (context.attempt,))
        begun[context.step_slug].set()
        for each in begun.values():
            await each.wait()
        return context.step_slug

    @workflow.step
    async def a() -> None:
        pass

    @workflow.step
    async def b(context: AsyncStepContext) -> str:
        return await write(context)

    @workflow.step
    async def c(context: AsyncStepContext) -> str:
        return await write(context)

    @workflow.step
    async def d(b: str, c: str) -> list[str]:
        return [b, c]

    with anyio.fail_after(180):
        assert await workflow.flow() == {"d": ["b", "c"]}
    assert read_attempts(db) == [1, 2], "each has written once"
    steps = read_steps(db)
    assert sorted(steps[each][1] for each in "bc") == [1, 2]
    assert {each[0] for each in steps.values()} == {"completed"}


async def test_serialization_failures_without_an_end_fail_the_step(
    db: Connection, workflow: Workflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: StepContext | AsyncStepContext) -> None:
        raise SerializationFailure("again and again")

    monkeypatch.setenv("PGFLOW_REPORT_TIMEOUT", "2")
    add_writer(workflow, "sync", fail)
    with anyio.fail_after(180), pytest.raises(RunFailedError, match="again and again"):
        await workflow.flow()
    assert read_attempts(db) == []
    status, attempts, _, message = read_steps(db)["write"]
    assert (status, message) == ("failed", "SerializationFailure: again and again")
    assert attempts > 1


async def test_an_error_of_the_moment_of_another_database_is_the_handlers_own(
    db: Connection, workflow: Workflow
) -> None:
    add_writer(workflow, "sync", raise_once(psycopg.OperationalError("the other one is gone")))
    with pytest.raises(RunFailedError, match="the other one"):
        await workflow.flow()
    assert read_attempts(db) == []
    assert read_steps(db)["write"][:2] == ("failed", 1)
