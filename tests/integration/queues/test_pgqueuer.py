"""Steps that are bound to pgqueuer's queues, in the test's database."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import anyio
import psycopg
import pytest

from pgflow_prefect.consumer import consume, perform
from pgflow_prefect.database.step_connection import Connector
from pgflow_prefect.database.step_transaction import StepTransaction
from pgflow_prefect.errors import NotRetriableError, UsageError
from pgflow_prefect.models import TaskKey
from tests.conftest import Connection
from tests.engine import get_state
from tests.integration.queues.consumers import (
    LOG,
    send,
    start,
)

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def pgqueuer_tables(dsn: str) -> AsyncIterator[Any]:
    from pgqueuer.adapters.drivers.psycopg import PsycopgDriver  # noqa: PLC0415  an extra
    from pgqueuer.queries import Queries  # noqa: PLC0415  an extra

    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        queries = Queries(PsycopgDriver(connection))
        await queries.install()
        yield queries


@pytest.mark.thorough
async def test_pgqueuers_own_worker_does_the_step(db: Connection, dsn: str) -> None:
    from pgqueuer.qm import QueueManager  # noqa: PLC0415  an extra
    from pgqueuer.types import QueueExecutionMode  # noqa: PLC0415  an extra

    run_id, claimed = start(db, "pgqueuer:mails")
    async with pgqueuer_tables(dsn) as queries:
        transaction = StepTransaction(Connector(dsn, 10), run_id, TaskKey("a"), LOG)
        async with transaction:
            deferred = await send("pgqueuer:mails", run_id, claimed, transaction)
            assert deferred.reason == "on queue 'mails' of pgqueuer"
            assert db.execute("SELECT count(*) FROM pgqueuer").fetchone() == (0,), "not before the step's commit"
            await transaction.defer(task_run_id=uuid4(), state_name="Deferred", message=deferred.reason)
        manager = QueueManager(queries)

        @manager.entrypoint("mails")
        async def mails(job: Any) -> None:
            await perform(job.payload, lambda given: given["payload"]["n"] + 1, dsn)

        with anyio.fail_after(180):
            await manager.run(mode=QueueExecutionMode.drain)
    assert get_state(db, run_id, "a").step_result == 2
    assert db.execute("SELECT count(*) FROM pgqueuer").fetchone() == (0,)


async def test_an_attempt_that_is_rolled_back_leaves_no_job(db: Connection, dsn: str) -> None:
    run_id, claimed = start(db)
    async with pgqueuer_tables(dsn):
        async with StepTransaction(Connector(dsn, 10), run_id, TaskKey("a"), LOG) as transaction:
            await send("pgqueuer:mails", run_id, claimed, transaction)
        assert db.execute("SELECT count(*) FROM pgqueuer").fetchone() == (0,)


async def test_missing_tables_of_pgqueuer_are_named(db: Connection, dsn: str) -> None:
    run_id, claimed = start(db, "pgqueuer:mails")
    async with StepTransaction(Connector(dsn, 10), run_id, TaskKey("a"), LOG) as transaction:
        with pytest.raises(NotRetriableError, match="pgq install"):
            await send("pgqueuer:mails", run_id, claimed, transaction)


async def test_perform_refuses_what_is_no_message(dsn: str) -> None:
    with pytest.raises(UsageError, match="not a step's"):
        await perform(None, print, dsn)
    with pytest.raises(UsageError, match="worker of its own"):
        consume("pgqueuer:mails", print, dsn=dsn)
