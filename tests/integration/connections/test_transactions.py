"""`context.connection`: what is written through it is there exactly once, with the step's completion, or not at all."""

from typing import Any, LiteralString

import anyio
import psycopg
import pytest
from prefect.client.orchestration import PrefectClient
from psycopg.types.json import Jsonb

from pgflow_prefect import AsyncStepContext, StepContext, Workflow
from pgflow_prefect.errors import RunFailedError
from tests.conftest import Connect, Connection
from tests.integration.conftest import await_task_runs, read_flow_run, read_run, read_steps
from tests.integration.connections.writers import INSERT, add_writer, both_kinds, raise_once, read_attempts

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]


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
    async def write(context: AsyncStepContext) -> list[Any]:
        with pytest.raises(AttributeError, match=r"await context\.connection"):
            _ = context.connection.info  # type: ignore[attr-defined]
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
    async def write(context: AsyncStepContext) -> None:
        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(context.connection.execute, INSERT, (number,))

    await workflow.flow()
    assert read_attempts(db) == [0, 1, 2, 3, 4]
    assert db.execute("SELECT count(DISTINCT pid) FROM written").fetchone() == (1,)


async def test_a_thread_of_an_async_handler_gets_no_second_connection(db: Connection, workflow: Workflow) -> None:
    @workflow.step
    async def write(context: AsyncStepContext) -> None:
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
