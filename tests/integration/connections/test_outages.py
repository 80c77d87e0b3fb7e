"""A step's transaction when its connection breaks, or when the database is busy, full or read-only."""

import logging
from collections.abc import Iterator
from threading import Event
from typing import Any, LiteralString

import anyio
import psycopg
import pytest
from prefect.client.orchestration import PrefectClient
from psycopg import sql

from pgflow_prefect import AsyncStepContext, StepContext, Workflow
from pgflow_prefect.database import open_transaction
from pgflow_prefect.database.connection import Row
from pgflow_prefect.errors import RunFailedError
from tests.conftest import Connect, Connection, execute
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_run, read_steps
from tests.integration.connections.writers import INSERT, Meanwhile, add_writer, both_kinds, read_attempts

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]


def cut_in_first_attempt(db: Connection) -> Meanwhile:
    """Return what ends the session of `context.connection`, with what it has written so far."""
    statement: LiteralString = """
        SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
        WHERE datname = current_database() AND state = 'idle in transaction'
    """

    def cut(context: StepContext | AsyncStepContext) -> None:
        if context.attempt == 1:
            assert db.execute(statement).fetchall() == [(True,)]

    return cut


@both_kinds
async def test_a_step_whose_connection_is_cut_before_the_commit_is_executed_again(
    db: Connection, workflow: Workflow, kind: str
) -> None:
    add_writer(workflow, kind, cut_in_first_attempt(db))
    assert await workflow.flow() == {"write": 2}
    assert read_attempts(db) == [2]


async def test_a_step_whose_connection_is_cut_under_its_sync_handler_is_executed_again(
    db: Connection, workflow: Workflow
) -> None:
    cut = cut_in_first_attempt(db)

    @workflow.step
    def write(context: StepContext) -> int:
        context.connection.execute(INSERT, (context.attempt,))
        cut(context)
        context.connection.execute(INSERT, (context.attempt,))
        return context.attempt

    assert await workflow.flow() == {"write": 2}
    assert read_attempts(db) == [2, 2]


async def test_a_step_whose_connection_is_cut_under_its_async_handler_is_executed_again(
    db: Connection, workflow: Workflow
) -> None:
    cut = cut_in_first_attempt(db)

    @workflow.step
    async def write(context: AsyncStepContext) -> int:
        await context.connection.execute(INSERT, (context.attempt,))
        cut(context)
        await context.connection.execute(INSERT, (context.attempt,))
        return context.attempt

    assert await workflow.flow() == {"write": 2}
    assert read_attempts(db) == [2, 2]


class Doorkeeper(logging.Handler):
    """Lets connections in again once a step has said that it has to wait for its own."""

    def __init__(self, server_dsn: str, database: str) -> None:
        super().__init__(logging.WARNING)
        self._server_dsn = server_dsn
        self._database = sql.Identifier(database)
        self.heard: list[str] = []
        self._logger: logging.Logger | None = None

    def shut(self) -> None:
        execute(self._server_dsn, sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(self._database))

    def open(self) -> None:
        execute(self._server_dsn, sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(self._database))

    def emit(self, record: logging.LogRecord) -> None:
        if "has to wait" in record.getMessage():
            self.heard.append(record.getMessage())
            self.open()

    def listen(self, context: StepContext | AsyncStepContext) -> None:
        assert isinstance(context.logger, logging.LoggerAdapter)
        self._logger = context.logger.logger
        self._logger.addHandler(self)

    def leave(self) -> None:
        if self._logger is not None:
            self._logger.removeHandler(self)


@pytest.fixture
def doorkeeper(db: Connection, server_dsn: str) -> Iterator[Doorkeeper]:
    keeper = Doorkeeper(server_dsn, db.info.dbname)
    yield keeper
    keeper.leave()
    keeper.open()


@both_kinds
@pytest.mark.parametrize("setting", ["statement_timeout", "lock_timeout"])
async def test_a_completion_that_is_held_up_waits_and_what_the_handler_wrote_stays(
    db: Connection, connect: Connect, server_dsn: str, workflow: Workflow, kind: str, setting: LiteralString
) -> None:
    holder = connect()
    set_timeout = sql.SQL("ALTER DATABASE {} SET {} = 50").format(sql.Identifier(db.info.dbname), sql.SQL(setting))

    class Release(Doorkeeper):
        def open(self) -> None:
            holder.execute("ROLLBACK")

    release = Release(server_dsn, db.info.dbname)

    def lock(context: StepContext | AsyncStepContext) -> None:
        release.listen(context)
        holder.execute("BEGIN")
        holder.execute("SELECT FROM pgflow.runs FOR UPDATE")

    db.execute(set_timeout)
    add_writer(workflow, kind, lock)
    try:
        assert await workflow.flow() == {"write": 1}
    finally:
        release.leave()
    assert read_attempts(db) == [1]
    assert read_steps(db)["write"][:2] == ("completed", 1)
    assert "the completion has to wait: PostgreSQL: canceling statement due to " in release.heard[0]


@both_kinds
async def test_a_step_waits_where_it_asks_for_a_connection_and_is_not_executed_again(
    db: Connection, workflow: Workflow, doorkeeper: Doorkeeper, kind: str
) -> None:
    executions: list[int] = []

    def work_slowly(context: StepContext | AsyncStepContext) -> None:
        executions.append(context.attempt)
        doorkeeper.listen(context)
        doorkeeper.shut()

    if kind == "sync":

        @workflow.step("write")
        def write(context: StepContext) -> int:
            work_slowly(context)
            context.connection.execute(INSERT, (context.attempt,))
            return context.attempt
    else:

        @workflow.step("write")
        async def write_async(context: AsyncStepContext) -> int:
            work_slowly(context)
            await context.connection.execute(INSERT, (context.attempt,))
            return context.attempt

    assert await workflow.flow() == {"write": 1}
    assert executions == [1]
    assert read_attempts(db) == [1]
    (warning,) = doorkeeper.heard
    assert warning.startswith(f"run {read_run(db)[2]}, step 'write': context.connection has to wait: PostgreSQL: ")
    assert "not currently accepting connections" in warning


@both_kinds
async def test_a_step_that_gets_no_connection_in_all_its_time_says_why_and_is_not_executed_again(
    workflow: Workflow, doorkeeper: Doorkeeper, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_REPORT_TIMEOUT", "0.3")
    executions: list[int] = []

    def shut(context: StepContext | AsyncStepContext) -> None:
        executions.append(context.attempt)
        doorkeeper.shut()

    if kind == "sync":

        @workflow.step("write")
        def write(context: StepContext) -> None:
            shut(context)
            context.connection.execute(INSERT, (context.attempt,))
    else:

        @workflow.step("write")
        async def write_async(context: AsyncStepContext) -> None:
            shut(context)
            await context.connection.execute(INSERT, (context.attempt,))

    with pytest.raises(RunFailedError) as raised:
        await workflow.flow()
    assert executions == [1]
    assert "no connection for context.connection within 0.3 s" in str(raised.value)
    assert "not currently accepting connections" in str(raised.value)


async def test_a_step_waits_for_a_database_that_can_be_written(
    db: Connection, workflow: Workflow, doorkeeper: Doorkeeper
) -> None:
    if db.info.server_version < 140000:
        pytest.skip("an older server does not say so by itself")
    executions: list[int] = []
    name = sql.Identifier(db.info.dbname)

    class Writable(Doorkeeper):
        def open(self) -> None:
            execute(
                self._server_dsn,
                sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(self._database),
            )

    writable = Writable(doorkeeper._server_dsn, db.info.dbname)

    @workflow.step("write")
    def write(context: StepContext) -> int:
        executions.append(context.attempt)
        writable.listen(context)
        execute(
            doorkeeper._server_dsn, sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name)
        )
        context.connection.execute(INSERT, (context.attempt,))
        return context.attempt

    try:
        assert await workflow.flow() == {"write": 1}
    finally:
        writable.leave()
    assert executions == [1]
    assert "the database is read-only" in writable.heard[0]


async def test_a_sync_handler_whose_time_is_up_waits_no_longer_for_its_connection(
    db: Connection, workflow: Workflow, doorkeeper: Doorkeeper
) -> None:
    ended = Event()
    errors: list[Exception] = []

    @workflow.step("write", timeout_seconds=1)
    def write(context: StepContext) -> None:
        doorkeeper.shut()
        try:
            context.connection.execute(INSERT, (context.attempt,))
        except Exception as error:  # noqa: BLE001
            errors.append(error)
        ended.set()

    with pytest.raises(RunFailedError, match="longer than 1 s"):
        await workflow.flow()
    assert await anyio.to_thread.run_sync(ended.wait, 60)
    assert "this execution of the step has ended" in str(errors[0])


@pytest.mark.parametrize("last", [True, False])
async def test_a_commit_whose_answer_was_lost_is_not_repeated(
    db: Connection, define: Define, client: PrefectClient, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["write"] if last else ["write", "rest"], [] if last else [("write", "rest")])
    add_writer(workflow, "sync")
    if not last:

        @workflow.step
        def rest() -> None: ...

    complete = open_transaction.ThreadTransaction.complete

    def lose_the_answer(transaction: Any, parameters: Any) -> Row | None:
        complete(transaction, parameters)
        raise psycopg.OperationalError("the link broke after COMMIT")

    monkeypatch.setattr(open_transaction.ThreadTransaction, "complete", lose_the_answer)
    await workflow.flow()
    assert read_attempts(db) == [1]
    assert read_steps(db)["write"][:3] == ("completed", 1, 1)
    states = {"write": "Cached"} if last else {"write": "Cached", "rest": "Completed"}
    await await_task_runs(client, await read_flow_run(client, workflow.slug), states)
