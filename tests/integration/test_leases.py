"""What keeps the leases of a process: a connection of its own, or the pool; and nothing for ever."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID, uuid4

import anyio
import pytest
from psycopg.conninfo import make_conninfo

from pgflow_prefect.database import leases
from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.leases import LeaseKeeper, Pool
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import DatabaseUnavailableError
from tests.conftest import Connection
from tests.engine import CHAIN, start_run, value
from tests.integration.conftest import TENURE
from tests.silent_proxy import silent_proxy

pytestmark = pytest.mark.anyio

LEASE = 0.6  # seconds
UNTIL = "SELECT lease_until FROM pgflow_prefect.owners WHERE run_id = %s"


@pytest.fixture
def run_id(db: Connection) -> UUID:
    return start_run(db, "chain", CHAIN)


async def take(store: Store, run_id: UUID) -> int:
    epoch = await store.take_run(run_id, uuid4())
    assert epoch is not None
    return epoch


async def await_extensions(db: Connection, run_id: UUID, number: int) -> None:
    """Return once the lease has been extended so many times."""
    with anyio.fail_after(180):
        for _ in range(number):
            before = value(db, UNTIL, run_id)
            while value(db, UNTIL, run_id) == before:
                await anyio.sleep(0.02)


def make_pool(store: Store, patience: float = 60) -> Pool:
    return Pool(store, asyncio.get_running_loop(), patience)


async def test_the_pool_extends_leases_where_there_is_no_room_for_another_connection(
    store: Store, db: Connection, dsn: str, run_id: UUID
) -> None:
    full = make_conninfo(dsn, host="/nowhere")
    with LeaseKeeper(full, LEASE, connect_timeout=2, pool=make_pool(store)) as keeper:
        keeper.hold(run_id, await take(store, run_id), lambda why: None)
        await await_extensions(db, run_id, 3)


async def test_a_service_does_not_start_without_room_for_its_leases(store: Store, dsn: str) -> None:
    full = make_conninfo(dsn, host="/nowhere")
    with (
        LeaseKeeper(full, LEASE, connect_timeout=2, pool=make_pool(store)) as keeper,
        pytest.raises(DatabaseUnavailableError, match="no connection for the leases of runs"),
    ):
        await keeper.open()


async def test_leases_are_extended_while_a_handler_blocks_the_event_loop(
    store: Store, db: Connection, dsn: str, run_id: UUID
) -> None:
    with LeaseKeeper(dsn, LEASE, connect_timeout=10, pool=make_pool(store, patience=0.1)) as keeper:
        await keeper.open()
        keeper.hold(run_id, await take(store, run_id), lambda why: None)
        await await_extensions(db, run_id, 1)
        for _ in range(4):
            before = value(db, UNTIL, run_id)
            while value(db, UNTIL, run_id) == before:  # and never lets the event loop go on
                pass


async def test_a_cut_connection_costs_no_lease(store: Store, db: Connection, dsn: str, run_id: UUID) -> None:
    lost: list[str] = []
    with LeaseKeeper(dsn, LEASE, connect_timeout=10, pool=make_pool(store)) as keeper:
        await keeper.open()
        keeper.hold(run_id, await take(store, run_id), lost.append)
        await await_extensions(db, run_id, 1)
        assert keeper._connection is not None
        db.execute("SELECT pg_terminate_backend(%s)", [keeper._connection.info.backend_pid])
        await await_extensions(db, run_id, 2)
    assert lost == []


async def test_a_silent_connection_is_replaced_before_the_lease_runs_out(
    store: Store, db: Connection, dsn: str, run_id: UUID
) -> None:
    with silent_proxy(dsn) as proxy, LeaseKeeper(proxy.dsn, 3, connect_timeout=10, pool=make_pool(store)) as keeper:
        await keeper.open()
        keeper.hold(run_id, await take(store, run_id), lambda why: None)
        await await_extensions(db, run_id, 1)
        proxy.fall_silent()
        await await_extensions(db, run_id, 2)


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def hearing() -> Iterator[list[str]]:
    """Hear what the keeper warns of, from its thread."""
    heard = Heard()
    leases._logger.addHandler(heard)
    try:
        yield heard.messages
    finally:
        leases._logger.removeHandler(heard)


async def test_a_process_that_can_do_nothing_else_lets_its_leases_run_out(
    db: Connection, dsn: str, run_id: UUID
) -> None:
    with silent_proxy(dsn) as proxy, hearing() as heard:
        async with open_pool(proxy.dsn, size=1, timeout=1, bound=1) as pool:
            store = Store(pool, TENURE)
            epoch = await take(store, run_id)
            with LeaseKeeper(dsn, LEASE, connect_timeout=10, pool=make_pool(store, patience=1)) as keeper:
                keeper.hold(run_id, epoch, lambda why: None)
                await await_extensions(db, run_id, 2)
                proxy.fall_silent(for_new_ones=True)
                with anyio.fail_after(180):
                    while not any("no lease is extended" in message for message in heard):
                        await anyio.sleep(0.02)
                until = value(db, UNTIL, run_id)
                with anyio.fail_after(180):
                    while value(db, "SELECT clock_timestamp() <= %s", until):
                        await anyio.sleep(0.02)
                assert value(db, UNTIL, run_id) == until, "another process may take the run"
                proxy.speak()
                await await_extensions(db, run_id, 1)
