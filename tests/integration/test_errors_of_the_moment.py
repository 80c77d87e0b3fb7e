"""Each error of the moment in each place where it may meet a statement: which is tried again, and what is executed."""

import asyncio
from typing import LiteralString
from uuid import UUID, uuid4

import anyio
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgflow_prefect import AsyncStepContext, StepContext, Workflow
from pgflow_prefect.database import notifications
from pgflow_prefect.database.leases import LeaseKeeper, Pool
from pgflow_prefect.database.notifications import listen
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import RunFailedError, SupersededError
from pgflow_prefect.execution.process.slots import Slot
from pgflow_prefect.execution.step_writer import StepWriter
from pgflow_prefect.execution.steps.step_task import make_request
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.handlers.python import PythonHandler
from pgflow_prefect.models import Status, TakenRun, TaskKey
from pgflow_prefect.services.run_fetcher import RunFetcher
from pgflow_prefect.waiting import Wakeup
from tests.conftest import Connect, Connection
from tests.engine import CHAIN, start_run, value
from tests.integration.conftest import Define, make_slug, read_steps

pytestmark = pytest.mark.anyio

SQLSTATES = ["57014", "25006", "25P02", "40001", "40P01", "53100", "53300", "55P03", "57P01", "58030", "08006", "XX000"]
FURTHER = ["53200", "53400", "57P02", "57P03", "57P05", "58000", "58P01"]
"""Those that share a line of the table with one of the others, or differ from it."""
EACH = pytest.mark.parametrize(
    "sqlstate", [*SQLSTATES, *(pytest.param(each, marks=pytest.mark.thorough) for each in FURTHER)]
)
TASK_RUN = uuid4()
LEASE = 0.3
"""Seconds; no other process would take the run after them."""

RAISE_ONCE: LiteralString = """
CREATE SEQUENCE public.tries;
CREATE FUNCTION public.raise_once() RETURNS void LANGUAGE plpgsql AS $function$
BEGIN
    IF nextval('public.tries') = 1 THEN -- which no rollback takes back
        RAISE SQLSTATE {sqlstate} USING MESSAGE = 'not now';
    END IF;
END $function$;
CREATE FUNCTION public.raise_once_in_trigger() RETURNS trigger LANGUAGE plpgsql AS $function$
BEGIN
    PERFORM public.raise_once();
    RETURN new;
END $function$;
"""

ON_CLAIM: LiteralString = """
CREATE TRIGGER raise_once BEFORE UPDATE ON pgflow.step_states FOR EACH ROW
WHEN (new.attempts > old.attempts) EXECUTE FUNCTION public.raise_once_in_trigger()
"""
ON_REPORT: LiteralString = """
CREATE TRIGGER raise_once BEFORE UPDATE ON pgflow.step_states FOR EACH ROW
WHEN (new.status <> old.status) EXECUTE FUNCTION public.raise_once_in_trigger()
"""
ON_EXTENSION: LiteralString = """
CREATE TRIGGER raise_once BEFORE UPDATE ON pgflow_prefect.owners FOR EACH ROW
WHEN (new.lease_until <> old.lease_until) EXECUTE FUNCTION public.raise_once_in_trigger()
"""


def prepare(db: Connection, sqlstate: str, trigger: LiteralString | None = None) -> None:
    """Have this raised once, in the database, where the trigger says."""
    db.execute(sql.SQL(RAISE_ONCE).format(sqlstate=sqlstate))
    if trigger is not None:
        db.execute(trigger)


def count_tries(db: Connection) -> object:
    row = db.execute("SELECT last_value FROM tries").fetchone()
    assert row is not None
    return row[0]


@pytest.fixture
def run_id(db: Connection) -> UUID:
    return start_run(db, "chain", CHAIN)


@pytest.fixture
async def writer(store: Store, run_id: UUID) -> StepWriter:
    epoch = await store.take_run(run_id, uuid4())
    assert epoch is not None
    return StepWriter(store, run_id, epoch, patience=20)


async def claim(writer: StepWriter) -> int:
    handlers = StepHandlers("a", PythonHandler("a", lambda upstream, payload: None))
    claimed = await writer.claim(make_request(handlers, [], TASK_RUN))
    assert claimed.status is Status.PENDING
    return claimed.attempt


@EACH
async def test_a_claim_is_made_again(sqlstate: str, writer: StepWriter, db: Connection) -> None:
    prepare(db, sqlstate, ON_CLAIM)
    assert await claim(writer) == 1
    assert count_tries(db) == 2


@EACH
async def test_both_kinds_of_report_are_made_again(sqlstate: str, writer: StepWriter, db: Connection) -> None:
    attempt = await claim(writer)
    prepare(db, sqlstate, ON_REPORT)
    report = await writer.complete(TaskKey("a"), '"done"', task_run_id=TASK_RUN, attempt=attempt)
    assert report.status is Status.COMPLETED
    db.execute("ALTER SEQUENCE tries RESTART")
    report = await writer.fail(TaskKey("b"), "broken", state_name="Failed", task_run_id=TASK_RUN, attempt=None)
    assert (report.status, report.error_message) == (Status.FAILED, "broken")


@EACH
@pytest.mark.parametrize("link", ["its own", "the pool's"])
async def test_an_extension_is_made_again(
    sqlstate: str, link: str, writer: StepWriter, store: Store, db: Connection, dsn: str
) -> None:
    prepare(db, sqlstate, ON_EXTENSION)
    until: LiteralString = "SELECT lease_until FROM pgflow_prefect.owners WHERE run_id = %s"
    before = value(db, until, writer.run_id)
    ends: list[str] = []
    own = dsn if link == "its own" else make_conninfo(dsn, host="/nowhere")
    pool = Pool(store, asyncio.get_running_loop(), patience=180)
    with anyio.fail_after(180), LeaseKeeper(own, LEASE, connect_timeout=10, pool=pool) as keeper:
        if link == "its own":
            await keeper.open()
        keeper.hold(writer.run_id, writer.epoch, ends.append)
        while value(db, until, writer.run_id) == before:
            await anyio.sleep(0.02)
        assert keeper.held == [writer.run_id]
    tries = count_tries(db)
    assert isinstance(tries, int)
    assert tries >= 2, "the first one was refused, and a later one was not"
    assert ends == []


@EACH
async def test_a_sweep_is_made_again(
    sqlstate: str, store: Store, run_id: UUID, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(db, sqlstate)
    raising = "WITH once AS MATERIALIZED (SELECT public.raise_once()) SELECT taken.* FROM once, LATERAL ("
    monkeypatch.setitem(QUERIES, "take_runs", f"{raising}{QUERIES['take_runs']}) taken")
    taken: list[UUID] = []

    async def note(run: TakenRun, place: Slot) -> None:
        taken.append(run.run_id)
        fetcher.stop()

    fetcher = RunFetcher(
        store, note, slots=2, sweep_interval=0.01, adopt=True, workflow_slugs=["chain"], wakeup=Wakeup()
    )
    await store.enable_workflow("chain")
    with anyio.fail_after(180):
        async with anyio.create_task_group() as group:
            await fetcher.run(group)
    assert taken == [run_id]


@EACH
async def test_listening_begins_again(sqlstate: str, dsn: str, db: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(db, sqlstate)
    monkeypatch.setattr(notifications, "_SHORTEST_WAIT", 0.01)
    monkeypatch.setitem(QUERIES, "listen", "SELECT raise_once()")
    wakeup = Wakeup()
    with anyio.fail_after(180):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: listen(dsn, wakeup, connect_timeout=10))
            await wakeup.wait(60)
            group.cancel_scope.cancel()
    assert count_tries(db) == 2


LOST = {"25006", "40001", "40P01", "53100", "53200", "53300", "53400", "55P03", "58000", "58030"}
"""After these, what the handler did is gone, and it is executed again; an error that only says so cuts no link."""


WORK = [(each, kind) for each in SQLSTATES for kind in ("sync", "async", "function")]
WORK += [(each, "function") for each in FURTHER]


@pytest.mark.thorough
@pytest.mark.parametrize(("sqlstate", "kind"), WORK)
@pytest.mark.usefixtures("pgflow_dsn", "prefect_api")
async def test_the_work_is_executed_again_only_where_its_transaction_was_lost(
    sqlstate: str, kind: str, db: Connection, define: Define
) -> None:
    prepare(db, sqlstate)
    workflow = Workflow(make_slug())
    define(workflow.slug, ["work"])
    if kind == "function":
        db.execute(
            "CREATE FUNCTION work(input jsonb) RETURNS jsonb LANGUAGE sql VOLATILE AS "
            "$$ SELECT to_jsonb('done'::text) FROM raise_once() $$"
        )
        db.execute("SELECT pgflow_prefect.bind_step(%s, 'work', 'sql', 'public.work')", [workflow.slug])
    elif kind == "sync":

        @workflow.step("work")
        def work(context: StepContext) -> str:
            context.connection.execute("SELECT raise_once()")
            return "done"
    else:

        @workflow.step("work")
        async def work_async(context: AsyncStepContext) -> str:
            await context.connection.execute("SELECT raise_once()")
            return "done"

    if sqlstate in LOST:
        assert await workflow.flow() == {"work": "done"}
        assert read_steps(db)["work"][:2] == ("completed", 2)
    else:
        with pytest.raises(RunFailedError, match="not now"):
            await workflow.flow()
        assert read_steps(db)["work"][:2] == ("failed", 1)


@pytest.mark.thorough
@pytest.mark.parametrize("sqlstate", SQLSTATES)
@pytest.mark.usefixtures("pgflow_dsn", "prefect_api")
async def test_finished_work_is_not_done_again_for_a_report_that_failed(
    sqlstate: str, db: Connection, define: Define
) -> None:
    prepare(db, sqlstate, ON_REPORT)
    workflow = Workflow(make_slug())
    define(workflow.slug, ["work"])
    executions: list[int] = []

    @workflow.step(retries=3)
    async def work(context: AsyncStepContext) -> str:
        executions.append(context.attempt)
        return "done"

    assert await workflow.flow() == {"work": "done"}
    assert executions == [1]
    assert count_tries(db) == 2


@pytest.mark.usefixtures("pgflow_dsn", "prefect_api")
async def test_a_report_that_is_refused_for_good_fails_the_step_and_executes_nothing_again(
    db: Connection, define: Define
) -> None:
    prepare(db, "P0001", ON_REPORT)
    workflow = Workflow(make_slug())
    define(workflow.slug, ["work"])
    executions: list[int] = []

    @workflow.step(retries=3)
    async def work(context: AsyncStepContext) -> str:
        executions.append(context.attempt)
        return "done"

    with pytest.raises(RunFailedError, match="'work' is done, and its report was refused: PostgreSQL: not now"):
        await workflow.flow()
    assert executions == [1]


async def test_a_statement_timeout_of_the_role_lets_a_locked_report_arrive(
    writer: StepWriter, db: Connection, connect: Connect
) -> None:
    attempt = await claim(writer)
    db.execute(sql.SQL("ALTER DATABASE {} SET statement_timeout = 50").format(sql.Identifier(db.info.dbname)))
    db.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'pgflow-prefect'"
    )
    holder = connect()
    holder.execute("SET statement_timeout = 0")
    holder.execute("BEGIN")
    holder.execute("SELECT FROM pgflow.runs FOR UPDATE")
    async with anyio.create_task_group() as group:

        async def complete() -> None:
            report = await writer.complete(TaskKey("a"), "1", task_run_id=TASK_RUN, attempt=attempt)
            assert report.status is Status.COMPLETED

        group.start_soon(complete)
        waiting: LiteralString = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        with anyio.fail_after(180):
            while db.execute(waiting).fetchone() == (0,):
                await anyio.lowlevel.checkpoint()
        holder.execute("ROLLBACK")


async def test_an_owner_that_lost_the_run_does_not_wait(writer: StepWriter, db: Connection) -> None:
    db.execute("SELECT pgflow.take_run(%s)", [writer.run_id])
    with anyio.fail_after(180), pytest.raises(SupersededError):
        await claim(writer)
