"""The bound of our own statements: the server is asked to cancel one that takes too long; a silent link is cut."""

import anyio
import psycopg
import pytest

from pgflow_prefect.database.connection import connect, open_pool
from pgflow_prefect.database.link import UnansweredError, bounded, without_bound
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import TransientError
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.integration.conftest import TENURE
from tests.silent_proxy import silent_proxy

pytestmark = pytest.mark.anyio


async def test_a_slow_statement_is_cancelled_and_its_connection_stays(dsn: str) -> None:
    async with await connect(dsn, timeout=10, bound=0.2) as connection:
        with anyio.fail_after(180), pytest.raises(psycopg.OperationalError, match=r"no answer within 0\.2 s") as raised:
            await connection.execute("SELECT pg_sleep(600)")
        assert not isinstance(raised.value, UnansweredError)
        with without_bound():
            cursor = await connection.execute("SELECT 1 AS answer")
        assert await cursor.fetchall() == [{"answer": 1}]


async def test_a_silent_link_is_cut(dsn: str) -> None:
    with silent_proxy(dsn) as proxy:
        connection = await connect(proxy.dsn, timeout=10, bound=0.2)
        proxy.fall_silent(for_new_ones=True)
        with anyio.fail_after(180), pytest.raises(UnansweredError):
            await connection.execute("SELECT 1")
        assert connection.broken


async def test_a_silent_link_of_a_thread_is_cut(dsn: str) -> None:
    with silent_proxy(dsn) as proxy, psycopg.connect(proxy.dsn, autocommit=True) as connection:
        proxy.fall_silent()
        with pytest.raises(UnansweredError), bounded(connection, 0.2):
            await anyio.to_thread.run_sync(connection.execute, "SELECT 1")


async def test_what_needs_its_time_has_no_bound(dsn: str) -> None:
    async with await connect(dsn, timeout=10, bound=0.05) as connection:
        with without_bound():
            await connection.execute("SELECT pg_sleep(0.5)")


async def test_after_a_silent_link_all_idle_connections_are_replaced(dsn: str, db: Connection) -> None:
    with silent_proxy(dsn) as proxy:
        async with open_pool(proxy.dsn, size=3, timeout=30, bound=1) as pool:
            await pool.resize(3, 3)
            await pool.wait()
            store = Store(pool, TENURE)
            proxy.fall_silent()
            with pytest.raises(TransientError, match="no answer within"):
                await store.probe()
            await store.drop_broken_connections()
            for _ in range(5):
                await store.probe()


def test_the_bound_is_a_third_of_the_patience_and_never_short() -> None:
    assert Settings().statement_bound == 20
    assert Settings(report_timeout=300).statement_bound == 100
    assert Settings(report_timeout=0.1).statement_bound == 5
