"""Handlers that end their transaction themselves, pass over its errors, or leave it open."""

import asyncio
import logging
from collections.abc import Callable
from threading import Event
from typing import Any, LiteralString
from uuid import UUID

import anyio
import psycopg
import pytest

from pgflow_prefect import AsyncStepContext, StepContext, Workflow
from pgflow_prefect.database import step_transaction
from pgflow_prefect.errors import RunFailedError, UsageError
from tests.conftest import Connection
from tests.integration.conftest import read_run, read_steps
from tests.integration.connections.writers import INSERT, add_writer, read_attempts
from tests.integration.waiting import TIMEOUT

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

TRANSACTIONS: LiteralString = """
    SELECT FROM pg_stat_activity
    WHERE datname = current_database() AND xact_start IS NOT NULL AND pid <> pg_backend_pid()
"""


async def test_commit_and_rollback_are_refused_by_psycopg(db: Connection, workflow: Workflow) -> None:
    @workflow.step
    async def write(context: AsyncStepContext) -> None:
        connection = await context.connection
        await connection.execute(INSERT, (1,))
        with pytest.raises(psycopg.ProgrammingError, match="forbidden"):
            await connection.commit()
        with pytest.raises(psycopg.ProgrammingError, match="forbidden"):
            await connection.rollback()

    await workflow.flow()
    assert read_attempts(db) == [1]


@pytest.mark.parametrize("end", [lambda connection: connection.execute("ROLLBACK"), psycopg.Connection.close])
async def test_a_handler_that_ends_the_transaction_itself_fails(
    db: Connection, workflow: Workflow, end: Callable[[Connection], object]
) -> None:
    add_writer(workflow, "sync", lambda context: end(context.connection) and None)
    with pytest.raises(RunFailedError, match="has ended the transaction"):
        await workflow.flow()
    assert read_attempts(db) == []
    assert read_steps(db)["write"][0] == "failed"


async def test_a_connection_that_is_closed_before_the_loop_has_heard_of_it_harms_no_loop(workflow: Workflow) -> None:
    loop = asyncio.get_running_loop()
    heard: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, happened: heard.append(happened))
    held, closed = Event(), Event()

    def hold() -> None:
        held.set()
        closed.wait(TIMEOUT)

    @workflow.step
    def write(context: StepContext) -> None:
        loop.call_soon_threadsafe(hold)
        held.wait(TIMEOUT)
        try:
            context.connection.close()
        finally:
            closed.set()

    with pytest.raises(RunFailedError, match="has ended the transaction"):
        await workflow.flow()
    assert heard == []


async def test_a_handler_that_passes_over_a_failed_statement_fails(db: Connection, workflow: Workflow) -> None:
    def fail(context: StepContext) -> None:
        with pytest.raises(psycopg.errors.DivisionByZero):
            context.connection.execute("SELECT 1 / 0")

    add_writer(workflow, "sync", fail)
    with pytest.raises(RunFailedError, match=r"a statement on context\.connection has failed"):
        await workflow.flow()
    assert read_attempts(db) == []


async def test_a_constraint_that_is_checked_at_commit_fails_the_step(db: Connection, workflow: Workflow) -> None:
    db.execute("CREATE TABLE known (attempt int PRIMARY KEY)")
    db.execute("ALTER TABLE written ADD FOREIGN KEY (attempt) REFERENCES known DEFERRABLE INITIALLY DEFERRED")
    add_writer(workflow, "sync")
    with pytest.raises(RunFailedError, match="violates foreign key constraint"):
        await workflow.flow()
    assert read_attempts(db) == []
    assert read_steps(db)["write"][0] == "failed"


class Ears(logging.Handler):
    """Hears a logger's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []
        self.hears = Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())
        self.hears.set()


async def test_a_transaction_that_stays_open_is_warned_of_once(
    db: Connection, workflow: Workflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_transaction, "OPEN_TOO_LONG", 0.05)
    ears = Ears()

    def listen(context: StepContext) -> None:
        assert isinstance(context.logger, logging.LoggerAdapter)
        context.logger.logger.addHandler(ears)
        assert ears.hears.wait(60)
        context.logger.logger.removeHandler(ears)

    add_writer(workflow, "sync", listen)
    await workflow.flow()
    (warning,) = ears.heard
    assert warning.startswith(f"run {read_run(db)[2]}, step 'write': ")
    assert "open for 0.05 s" in warning


class Abandoned:
    """A sync handler that takes too long, and tries to write when its step has ended."""

    def __init__(self) -> None:
        self.may_go_on = Event()
        self.has_ended = Event()
        self.errors: list[Exception] = []

    def write(self, context: StepContext, statement: LiteralString) -> None:
        connection = context.connection
        connection.execute(INSERT, (context.attempt,))
        attempts: list[Callable[[], object]] = [
            lambda: connection.execute(statement),
            lambda: connection.execute("COMMIT"),
            lambda: context.connection,
        ]
        for attempt in attempts:
            try:
                attempt()
            except (psycopg.Error, UsageError) as error:
                self.errors.append(error)
            self.may_go_on.wait(60)
        self.has_ended.set()


@pytest.mark.thorough
@pytest.mark.parametrize("statement", ["SELECT", "SELECT pg_sleep(600)"])
async def test_after_a_time_out_an_abandoned_thread_writes_nothing_more(
    db: Connection, workflow: Workflow, statement: LiteralString
) -> None:
    abandoned = Abandoned()

    @workflow.step("write", timeout_seconds=3)  # enough to connect on any machine
    def write(context: StepContext) -> None:
        abandoned.write(context, statement)

    with pytest.raises(RunFailedError, match="longer than 3 s"):
        await workflow.flow()
    with anyio.fail_after(180):
        while db.execute(TRANSACTIONS).fetchone() is not None:
            await anyio.sleep(0.01)
    abandoned.may_go_on.set()
    assert await anyio.to_thread.run_sync(abandoned.has_ended.wait, 60)

    *refused, gone = abandoned.errors
    assert refused
    assert all(isinstance(error, psycopg.Error) for error in refused)
    assert isinstance(gone, UsageError)
    assert "this execution of the step has ended" in str(gone)
    assert read_attempts(db) == []
    assert read_steps(db)["write"][0] == "failed"


async def test_a_time_out_of_an_async_handler_rolls_back(db: Connection, workflow: Workflow) -> None:
    # Enough retries for a machine that is too slow to connect within the time of one.
    @workflow.step(timeout_seconds=0.5, retries=100)
    async def write(context: AsyncStepContext) -> int:
        await context.connection.execute(INSERT, (context.attempt,))
        if context.attempt == 1:
            await context.connection.execute("SELECT pg_sleep(600)")
        return context.attempt

    with anyio.fail_after(180):
        written = (await workflow.flow())["write"]
    assert written > 1
    assert read_attempts(db) == [written]


def test_without_a_run_there_is_no_connection() -> None:
    context = StepContext(UUID(int=1), "workflow", "write", 1, logging.getLogger(__name__))
    with pytest.raises(UsageError, match="not available"):
        _ = context.connection
