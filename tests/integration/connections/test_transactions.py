"""`context.connection`: what is written through it is there exactly once, with the step's completion, or not at all."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any, LiteralString
from uuid import UUID

import anyio
import psycopg
import pytest
from prefect.client.orchestration import PrefectClient
from psycopg import sql
from psycopg.errors import SerializationFailure
from psycopg.types.json import Jsonb

from pgflow_prefect import StepContext, Workflow
from pgflow_prefect.database import open_transaction, step_transaction
from pgflow_prefect.database.connection import Row
from pgflow_prefect.errors import RunFailedError, UsageError
from tests.conftest import Connect, Connection, execute
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_run, read_steps
from tests.integration.waiting import TIMEOUT

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

INSERT: LiteralString = "INSERT INTO written (attempt, pid) VALUES (%s, pg_backend_pid())"
both_kinds = pytest.mark.parametrize("kind", ["sync", "async"])

Meanwhile = Callable[[StepContext], object]
"""What else happens while the handler works, after it has written."""


@pytest.fixture(autouse=True)
def written(db: Connection) -> None:
    """A table that the handlers write to."""
    db.execute("CREATE TABLE written (attempt int, pid int)")
    db.execute("CREATE TABLE counted (n int)")
    db.execute("INSERT INTO counted VALUES (0)")


@pytest.fixture
def workflow(define: Define) -> Workflow:
    """A workflow of one step, `write`, which has no handler yet."""
    made = Workflow(make_slug())
    define(made.slug, ["write"])
    return made


def read_attempts(db: Connection) -> list[object]:
    """Return the attempts that have written, one for each row."""
    return [row[0] for row in db.execute("SELECT attempt FROM written ORDER BY attempt").fetchall()]


def add_writer(workflow: Workflow, kind: str, meanwhile: Meanwhile = lambda _: None, **policy: Any) -> None:
    """Give the workflow a handler that writes one row and returns its attempt."""
    if kind == "sync":

        @workflow.step("write", **policy)
        def write(context: StepContext) -> Any:
            context.connection.execute(INSERT, (context.attempt,))
            return meanwhile(context) or context.attempt
    else:

        @workflow.step("write", **policy)
        async def write_async(context: StepContext) -> Any:
            await context.connection.execute(INSERT, (context.attempt,))
            return meanwhile(context) or context.attempt


def raise_once(error: Exception) -> Meanwhile:
    """Return what raises this in the first attempt."""

    def fail(context: StepContext) -> None:
        if context.attempt == 1:
            raise error

    return fail


@both_kinds
async def test_a_write_and_the_completion_are_one_transaction(db: Connection, workflow: Workflow, kind: str) -> None:
    seen: list[object] = []
    add_writer(workflow, kind, lambda _: seen.extend(read_attempts(db)))
    assert await workflow.flow() == {"write": 1}
    assert seen == [], "no other session sees it before the step is completed"
    assert read_attempts(db) == [1]
    transactions = db.execute("SELECT w.xmin, s.xmin FROM written w, pgflow.step_states s").fetchone()
    assert transactions is not None
    assert transactions[0] == transactions[1]
    assert read_run(db)[0] == "completed"


async def test_a_sync_handler_gets_psycopgs_own_connection(workflow: Workflow) -> None:
    @workflow.step
    def write(context: StepContext) -> list[Any]:
        connection = context.connection
        assert isinstance(connection, psycopg.Connection)
        assert context.connection is connection
        return [connection.execute("SELECT 1").fetchone(), connection.prepare_threshold]

    assert await workflow.flow() == {"write": [[1], None]}


async def test_an_async_handler_may_await_the_connection_or_use_it_at_once(db: Connection, workflow: Workflow) -> None:
    @workflow.step
    async def write(context: StepContext) -> list[Any]:
        with pytest.raises(AttributeError, match=r"await context\.connection"):
            _ = context.connection.info
        async with context.connection.cursor() as cursor:
            await cursor.execute(INSERT, (1,))
        async with context.connection.transaction():
            await context.connection.execute(INSERT, (2,))
        async with context.connection.transaction():
            await context.connection.execute(INSERT, (3,))
            raise psycopg.Rollback
        connection = await context.connection
        assert isinstance(connection, psycopg.AsyncConnection)
        assert await context.connection is connection
        cursor = await connection.execute("SELECT count(*), count(DISTINCT pid) FROM written")
        return list(await cursor.fetchone())

    assert await workflow.flow() == {"write": [2, 1]}
    assert read_attempts(db) == [1, 2]


async def test_several_tasks_of_an_async_handler_share_the_connection(db: Connection, workflow: Workflow) -> None:
    @workflow.step
    async def write(context: StepContext) -> None:
        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(context.connection.execute, INSERT, (number,))

    await workflow.flow()
    assert read_attempts(db) == [0, 1, 2, 3, 4]
    assert db.execute("SELECT count(DISTINCT pid) FROM written").fetchone() == (1,)


async def test_a_thread_of_an_async_handler_gets_no_second_connection(db: Connection, workflow: Workflow) -> None:
    @workflow.step
    async def write(context: StepContext) -> None:
        await context.connection.execute(INSERT, (1,))
        await anyio.to_thread.run_sync(lambda: context.connection)

    with pytest.raises(RunFailedError, match="belongs to the event loop: one step has one connection"):
        await workflow.flow()
    assert read_attempts(db) == []


@both_kinds
async def test_what_a_failed_attempt_has_written_is_gone(db: Connection, workflow: Workflow, kind: str) -> None:
    add_writer(workflow, kind, raise_once(ValueError("not yet")), retries=1)
    assert await workflow.flow() == {"write": 2}
    assert read_attempts(db) == [2]


@both_kinds
@pytest.mark.parametrize(("result", "reason"), [(object(), "JSON"), ("a\0b", "jsonb can't hold"), ("x" * 99, "limit")])
async def test_a_result_that_can_not_be_stored_takes_the_writes_with_it(
    db: Connection, workflow: Workflow, monkeypatch: pytest.MonkeyPatch, kind: str, result: object, reason: str
) -> None:
    monkeypatch.setenv("PGFLOW_RESULT_LIMIT", "50")
    add_writer(workflow, kind, lambda _: result, retries=1)
    with anyio.fail_after(180), pytest.raises(RunFailedError, match=reason):
        await workflow.flow()
    assert read_attempts(db) == []
    assert read_steps(db)["write"][:2] == ("failed", 1)


@both_kinds
async def test_a_write_is_rolled_back_where_another_program_has_completed_the_step(
    db: Connection, workflow: Workflow, kind: str
) -> None:
    def complete(context: StepContext) -> None:
        db.execute("SELECT pgflow.complete_step(%s, 'write', %s)", (context.run_id, Jsonb("theirs")))

    add_writer(workflow, kind, complete)
    assert await workflow.flow() == {"write": "theirs"}
    assert read_attempts(db) == []


async def test_a_completion_that_waits_for_another_one_comes_second(
    db: Connection, workflow: Workflow, connect: Connect
) -> None:
    other = connect()

    def begin_to_complete(context: StepContext) -> None:
        other.execute("BEGIN")
        other.execute("SELECT pgflow.complete_step(%s, 'write', %s)", (context.run_id, Jsonb("theirs")))

    async def commit_when_waited_for() -> None:
        waiting: LiteralString = """
            SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
        """
        with anyio.fail_after(180):
            while db.execute(waiting).fetchone() is None:
                await anyio.sleep(0.01)
        other.execute("COMMIT")

    add_writer(workflow, "sync", begin_to_complete)
    async with anyio.create_task_group() as group:
        group.start_soon(commit_when_waited_for)
        assert await workflow.flow() == {"write": "theirs"}
    assert read_attempts(db) == []


@both_kinds
async def test_a_write_is_rolled_back_where_the_run_was_taken_meanwhile(
    db: Connection, workflow: Workflow, client: PrefectClient, kind: str
) -> None:
    add_writer(workflow, kind, lambda context: db.execute("SELECT pgflow.take_run(%s)", (context.run_id,)) and None)
    await workflow.flow(return_state=True)
    assert read_attempts(db) == []
    assert read_steps(db) == {"write": ("pending", 1, None, None)}
    await await_task_runs(client, await read_flow_run(client, workflow.slug), {"write": "Superseded"})


async def test_a_write_is_rolled_back_where_the_run_was_cancelled_meanwhile(
    db: Connection, workflow: Workflow, client: PrefectClient
) -> None:
    def cancel(context: StepContext) -> None:
        db.execute("SELECT pgflow.cancel_run(%s, 'changed our mind')", (context.run_id,))

    add_writer(workflow, "sync", cancel)
    await workflow.flow(return_state=True)
    assert read_attempts(db) == []
    assert read_steps(db)["write"][:2] == ("failed", 1)
    await await_task_runs(client, await read_flow_run(client, workflow.slug), {"write": "Cancelled"})


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
    async def write(context: StepContext) -> int:
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


async def test_serialization_failures_without_an_end_fail_the_step(
    db: Connection, workflow: Workflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: StepContext) -> None:
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


def cut_in_first_attempt(db: Connection) -> Meanwhile:
    """Return what ends the session of `context.connection`, with what it has written so far."""
    statement: LiteralString = """
        SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
        WHERE datname = current_database() AND state = 'idle in transaction'
    """

    def cut(context: StepContext) -> None:
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
    async def write(context: StepContext) -> int:
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

    def listen(self, context: StepContext) -> None:
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

    def lock(context: StepContext) -> None:
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

    def work_slowly(context: StepContext) -> None:
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
        async def write_async(context: StepContext) -> int:
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

    def shut(context: StepContext) -> None:
        executions.append(context.attempt)
        doorkeeper.shut()

    if kind == "sync":

        @workflow.step("write")
        def write(context: StepContext) -> None:
            shut(context)
            context.connection.execute(INSERT, (context.attempt,))
    else:

        @workflow.step("write")
        async def write_async(context: StepContext) -> None:
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


async def test_commit_and_rollback_are_refused_by_psycopg(db: Connection, workflow: Workflow) -> None:
    @workflow.step
    async def write(context: StepContext) -> None:
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


TRANSACTIONS: LiteralString = """
    SELECT FROM pg_stat_activity
    WHERE datname = current_database() AND xact_start IS NOT NULL AND pid <> pg_backend_pid()
"""


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
    async def write(context: StepContext) -> int:
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
