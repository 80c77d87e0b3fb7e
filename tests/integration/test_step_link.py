"""Links of `context.connection` that die silently: the step is executed again, and what takes long is left alone."""

import threading
from collections.abc import Callable, Coroutine, Iterator

import anyio
import psycopg
import pytest

from pgflow_prefect import AsyncStepContext, StepContext, Workflow
from pgflow_prefect.bindings import SqlFunction
from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.statements import Backend
from pgflow_prefect.database.step_connection import AsyncConnection, Connector
from pgflow_prefect.database.step_link import StepLink
from pgflow_prefect.database.store import Store
from tests.conftest import Connect, Connection
from tests.engine import value, wait_until_true
from tests.integration.conftest import TENURE, Define, make_slug, read_steps
from tests.silent_proxy import SilentProxy, silent_proxy

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]

INSERT = "INSERT INTO written VALUES (%s)"
BOUND = 0.3  # seconds
LINGER = 600.0  # seconds: the server does not notice


@pytest.fixture
def proxy(dsn: str, db: Connection, monkeypatch: pytest.MonkeyPatch) -> Iterator[SilentProxy]:
    """A way to this test's database that can fall silent, and a table to write to."""
    db.execute("CREATE TABLE written (attempt int)")
    with silent_proxy(dsn, LINGER) as opened:
        monkeypatch.setenv("PGFLOW_DSN", opened.dsn)
        monkeypatch.setenv("PGFLOW_REPORT_TIMEOUT", "15")  # a link is looked at after a third of that
        yield opened


@pytest.fixture
def workflow(define: Define) -> Workflow:
    """A workflow of one step, `write`, which has no handler yet."""
    made = Workflow(make_slug())
    define(made.slug, ["write"])
    return made


def check_written_by_the_second_attempt(db: Connection) -> None:
    assert read_steps(db)["write"][:2] == ("completed", 2)
    assert [attempt for (attempt,) in db.execute("SELECT attempt FROM written")] == [2]


@pytest.mark.thorough
async def test_a_sync_handler_on_a_silent_link_is_executed_again(
    db: Connection, workflow: Workflow, proxy: SilentProxy
) -> None:
    @workflow.step
    def write(context: StepContext) -> None:
        context.connection.execute("SELECT 1")
        if context.attempt == 1:
            proxy.fall_silent()
        context.connection.execute(INSERT, [context.attempt])

    await workflow.flow()
    check_written_by_the_second_attempt(db)


@pytest.mark.thorough
async def test_an_async_handler_on_a_silent_link_is_executed_again(
    db: Connection, workflow: Workflow, proxy: SilentProxy
) -> None:
    @workflow.step
    async def write(context: AsyncStepContext) -> None:
        await context.connection.execute("SELECT 1")
        if context.attempt == 1:
            proxy.fall_silent()
        await context.connection.execute(INSERT, [context.attempt])

    await workflow.flow()
    check_written_by_the_second_attempt(db)


@pytest.mark.thorough
async def test_locks_of_a_transaction_with_a_dead_link_do_not_keep_its_successor(
    db: Connection, workflow: Workflow, proxy: SilentProxy
) -> None:
    db.execute("INSERT INTO written VALUES (0)")

    @workflow.step
    async def write(context: AsyncStepContext) -> None:
        await context.connection.execute("UPDATE written SET attempt = %s", [context.attempt])
        if context.attempt == 1:
            proxy.fall_silent()
            await context.connection.execute("SELECT 1")

    await workflow.flow()
    check_written_by_the_second_attempt(db)


@pytest.mark.thorough
async def test_a_function_whose_answer_is_lost_is_called_again(
    db: Connection, connect: Connect, workflow: Workflow, proxy: SilentProxy
) -> None:
    db.execute(
        "CREATE SCHEMA app; CREATE FUNCTION app.f(input jsonb) RETURNS jsonb LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_advisory_xact_lock(7); INSERT INTO written VALUES (2); RETURN input; END $$"
    )
    workflow.bind("write", SqlFunction("app.f"))
    holder = connect()
    holder.execute("SELECT pg_advisory_lock(7)")

    def fall_silent_in_the_middle() -> None:
        wait_until_true(db, "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)")
        proxy.fall_silent()
        proxy.synchronise()
        holder.execute("SELECT pg_advisory_unlock(7)")

    thread = threading.Thread(target=fall_silent_in_the_middle)
    thread.start()
    await workflow.flow()
    thread.join()
    check_written_by_the_second_attempt(db)


Watch = Callable[[AsyncConnection], Coroutine[None, None, str]]


@pytest.fixture
def watch(dsn: str) -> Watch:
    """A function that watches a connection, and returns why its link was cut."""

    async def keep(connection: AsyncConnection) -> str:
        heard: list[str] = []
        connector = Connector(dsn, timeout=10, patience=600, bound=BOUND)
        async with open_pool(dsn, size=1, timeout=10) as pool:
            link = StepLink(connection, connector, Store(pool, TENURE), lambda reason, _: heard.append(reason))
            await link.keep_watch()
        return heard[0]

    return keep


async def test_a_statement_that_takes_long_is_left_alone(dsn: str, watch: Watch) -> None:
    connection = await Connector(dsn, timeout=10).open_async()
    async with connection, anyio.create_task_group() as group:
        group.start_soon(watch, connection)
        async with connection.transaction():
            await connection.execute("SELECT pg_sleep(%s)", [10 * BOUND])
            await anyio.sleep(3 * BOUND)  # nor is a handler that does something else meanwhile
            await connection.execute("SELECT 1")
        group.cancel_scope.cancel()


async def test_a_link_whose_session_is_gone_is_dead(dsn: str, db: Connection, watch: Watch) -> None:
    with silent_proxy(dsn, LINGER) as proxy:
        connection = await Connector(proxy.dsn, timeout=10).open_async()
        async with anyio.create_task_group() as group:
            proxy.fall_silent()
            proxy.synchronise()
            assert value(db, "SELECT pg_terminate_backend(%s, 30000)", connection.info.backend_pid)

            async def wait() -> None:
                with pytest.raises(psycopg.OperationalError):
                    await connection.execute("SELECT 1")

            group.start_soon(wait)
            assert await watch(connection) == "the server has no such session any more"


async def test_behind_a_pooler_the_server_is_not_asked_about_a_client(db: Connection) -> None:
    parameters = {"own": 0, "pid": db.info.backend_pid, "seconds": 1}
    assert db.execute(QUERIES["look_at_backend"], parameters).fetchone() == (Backend.UNKNOWN,)
