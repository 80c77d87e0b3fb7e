"""What is written of a run's steps arrives, though the link to the database does not always hold."""

from collections.abc import AsyncIterator
from typing import LiteralString
from uuid import UUID, uuid4

import anyio
import pytest

from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import SupersededError, TransientError
from pgflow_prefect.execution.step_writer import MESSAGE_LIMIT, StepWriter, clean_message
from pgflow_prefect.execution.steps.step_task import make_request
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.handlers.python import PythonHandler
from pgflow_prefect.models import Report, Status, TaskKey
from tests.conftest import Connect, Connection
from tests.engine import CHAIN, get_run, get_state, start_run
from tests.integration.conftest import TENURE

pytestmark = pytest.mark.anyio

TASK_RUN = uuid4()
COMPLETED = Report(status=Status.COMPLETED, error_message=None)


@pytest.fixture
def run_id(db: Connection) -> UUID:
    """A run of a chain of three steps; the first is ready."""
    return start_run(db, "chain", CHAIN)


@pytest.fixture
async def writer(dsn: str, run_id: UUID) -> AsyncIterator[StepWriter]:
    """What writes for that run, over several connections that are open."""
    async with open_pool(dsn, size=3, timeout=30) as pool:
        await pool.resize(3, 3)
        await pool.wait()
        store = Store(pool, TENURE)
        epoch = await store.take_run(run_id, uuid4())
        assert epoch is not None
        yield StepWriter(store, run_id, epoch, patience=20)


def cut(db: Connection) -> int:
    """Cut every connection of the pool, and return how many they were."""
    statement: LiteralString = """
        SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'pgflow-prefect'
    """
    return len(db.execute(statement).fetchall())


async def claim(writer: StepWriter, step: str = "a") -> int:
    handlers = StepHandlers(step, PythonHandler(step, lambda upstream, payload: None))
    claimed = await writer.claim(make_request(handlers, [], TASK_RUN))
    assert claimed.status is Status.PENDING
    return claimed.attempt


async def test_a_claim_a_retry_and_both_kinds_of_report_survive_a_cut(writer: StepWriter, db: Connection) -> None:
    with anyio.fail_after(180):
        assert cut(db) == 3
        attempt = await claim(writer)
        assert attempt == 1, "nothing had arrived: nothing was counted"
        assert cut(db) > 0
        await writer.note(TaskKey("a"), "AwaitingRetry", "not yet", task_run_id=TASK_RUN)
        assert cut(db) > 0
        assert await writer.complete(TaskKey("a"), '"done"', task_run_id=TASK_RUN, attempt=attempt) == COMPLETED
        await claim(writer, "b")
        assert cut(db) > 0
        failed = await writer.fail(TaskKey("b"), "broken", state_name="Failed", task_run_id=TASK_RUN, attempt=1)
    assert failed == Report(status=Status.FAILED, error_message="broken")
    assert get_state(db, writer.run_id, "a").step_result == "done"
    assert get_run(db, writer.run_id).error_message == 'step "b" failed: broken'


async def test_one_more_try_is_enough_however_many_connections_were_cut(
    writer: StepWriter, db: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    assert cut(db) == 3
    assert await claim(writer) == 1
    (record,) = [record for record in caplog.records if record.name == "pgflow_prefect.waiting"]
    assert "trying again" in record.message
    assert str(writer.run_id) in record.message


async def test_patience_has_an_end(writer: StepWriter, db: Connection, connect: Connect) -> None:
    """A lock that is never let go stands for a database that does not come back; it is not waited for either."""
    dbname = db.info.dbname
    db.execute(f'ALTER DATABASE "{dbname}" SET lock_timeout = 50')
    cut(db)
    holder = connect()
    holder.execute("BEGIN")
    holder.execute("SELECT FROM pgflow.runs FOR UPDATE")
    impatient = StepWriter(writer.store, writer.run_id, writer.epoch, patience=1)
    with anyio.fail_after(180), pytest.raises(TransientError, match="lock timeout"):
        await claim(impatient)
    holder.execute("ROLLBACK")
    assert await claim(writer) == 1


async def test_a_report_goes_through_once_the_lock_in_its_way_is_gone(
    writer: StepWriter, db: Connection, connect: Connect
) -> None:
    attempt = await claim(writer)
    db.execute(f'ALTER DATABASE "{db.info.dbname}" SET lock_timeout = 50')
    cut(db)
    holder = connect()
    holder.execute("BEGIN")
    holder.execute("SELECT FROM pgflow.runs FOR UPDATE")
    async with anyio.create_task_group() as group:

        async def complete() -> None:
            assert await writer.complete(TaskKey("a"), "1", task_run_id=TASK_RUN, attempt=attempt) == COMPLETED

        group.start_soon(complete)
        waiting: LiteralString = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        with anyio.fail_after(180):
            while db.execute(waiting).fetchone() == (0,):
                await anyio.lowlevel.checkpoint()
        assert get_state(db, writer.run_id, "a").status == "pending"
        holder.execute("ROLLBACK")
    assert get_state(db, writer.run_id, "a").status == "completed"


async def test_a_report_that_had_arrived_is_returned_as_it_was_stored(writer: StepWriter, db: Connection) -> None:
    attempt = await claim(writer)
    for _ in range(2):  # as if the answer to the first had been lost
        assert await writer.complete(TaskKey("a"), '"once"', task_run_id=TASK_RUN, attempt=attempt) == COMPLETED
    attempt = await claim(writer, "b")
    for _ in range(2):
        failed = await writer.fail(TaskKey("b"), "broken", state_name="Failed", task_run_id=TASK_RUN, attempt=attempt)
        assert failed == Report(status=Status.FAILED, error_message="broken")
    assert get_state(db, writer.run_id, "a").step_result == "once"
    assert get_run(db, writer.run_id).remaining == 2


async def test_the_first_report_wins_and_is_returned(writer: StepWriter, db: Connection) -> None:
    attempt = await claim(writer)
    db.execute("SELECT pgflow.complete_step(%s, 'a', '\"by hand\"')", [writer.run_id])
    late = await writer.fail(TaskKey("a"), "too late", state_name="Failed", task_run_id=TASK_RUN, attempt=attempt)
    assert late == COMPLETED
    assert get_state(db, writer.run_id, "a").step_result == "by hand"


async def test_a_lasting_error_is_raised_at_once(writer: StepWriter, db: Connection) -> None:
    db.execute("SELECT pgflow.take_run(%s)", [writer.run_id])
    with anyio.fail_after(180), pytest.raises(SupersededError):
        await claim(writer)


async def test_any_message_can_be_stored(writer: StepWriter, db: Connection) -> None:
    attempt = await claim(writer)
    await writer.note(TaskKey("a"), "AwaitingRetry", "odd \0 \ud800", task_run_id=TASK_RUN)
    await writer.fail(
        TaskKey("a"), "odd \0 \ud800 " + "x" * 20_000, state_name="Failed", task_run_id=TASK_RUN, attempt=attempt
    )
    message = get_state(db, writer.run_id, "a").error_message
    assert message is not None
    assert message.startswith("odd \\0 \\ud800 xxx")
    assert len(message) == MESSAGE_LIMIT + 2


@pytest.mark.parametrize(
    ("message", "cleaned"),
    [
        ("", ""),
        ("two\nlines, größe 🚀", "two\nlines, größe 🚀"),
        ("a\0b", "a\\0b"),
        ("\udce4", "\\udce4"),
        ("x" * MESSAGE_LIMIT, "x" * MESSAGE_LIMIT),
        ("x" * (MESSAGE_LIMIT + 1), "x" * MESSAGE_LIMIT + " …"),
    ],
)
async def test_a_message_is_made_to_fit(message: str, cleaned: str) -> None:
    assert clean_message(message) == cleaned
