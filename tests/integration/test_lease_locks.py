"""Extending leases locks rows of several runs, and still no two sessions wait for each other."""

from uuid import UUID

import pytest

from pgflow_prefect.database.store import Store
from pgflow_prefect.models import Held
from tests.conftest import Connect, Connection
from tests.engine import CHAIN, column, define, refused, run_workflow
from tests.integration.test_ownership import LONG_UP, expire, take

pytestmark = pytest.mark.anyio

BUSY = "55P03"
EXTEND = "SELECT run_id FROM pgflow_prefect.extend_leases(%s, %s, 60) WHERE holds = 'held'"
NO_WAIT = "SET lock_timeout = '1ms'; BEGIN"

OTHERS = {
    "takes it over": "SELECT pgflow_prefect.take_run(%(run)s, gen_random_uuid(), 'another', 60, 3, true)",
    "hands it back": "SELECT pgflow_prefect.release_run(%(run)s, %(epoch)s)",
    "extends its lease": "SELECT pgflow_prefect.extend_leases(ARRAY[%(run)s]::uuid[], ARRAY[%(epoch)s]::int[], 60)",
    "locks it by hand": "SELECT FROM pgflow_prefect.owners WHERE run_id = %(run)s FOR UPDATE",
}
"""What another transaction may do with a run that a process holds."""


@pytest.fixture
async def held(store: Store, db: Connection) -> tuple[list[UUID], list[int]]:
    """Two runs that a process holds, and their epochs. The leases have run out."""
    define(db, "chain", CHAIN)
    db.execute(LONG_UP)
    runs = [run_workflow(db, "chain").id for _ in range(2)]
    epochs = [await take(store, run_id) for run_id in runs]
    for run_id in runs:
        expire(db, run_id)
    return runs, epochs


async def test_sessions_that_extend_the_same_leases_do_not_wait_for_each_other(
    connect: Connect, held: tuple[list[UUID], list[int]]
) -> None:
    """Each has locked a row that the other one comes to next: if they waited, this would be a deadlock."""
    runs, epochs = held
    first, second = connect(), connect()
    for session, number in ((first, 0), (second, 1)):
        session.execute(NO_WAIT)
        assert column(session, EXTEND, [runs[number]], [epochs[number]]) == [runs[number]]

    for session, order in ((first, slice(None)), (second, slice(None, None, -1))):
        assert column(session, EXTEND, runs[order], epochs[order]) == runs[order]
        session.execute("COMMIT")


@pytest.mark.parametrize("locks", OTHERS.values(), ids=OTHERS.keys())
async def test_a_run_that_another_transaction_has_locked_is_left_to_the_next_extension(
    store: Store, connect: Connect, held: tuple[list[UUID], list[int]], locks: str
) -> None:
    runs, epochs = held
    other, keeper = connect(), connect()
    other.execute("BEGIN")
    other.execute(locks.encode(), {"run": runs[0], "epoch": epochs[0]})

    keeper.execute(NO_WAIT)
    assert column(keeper, EXTEND, runs, epochs) == runs
    other.execute("SET LOCAL lock_timeout = '1ms'")
    with refused(BUSY):  # it waits for the keeper, who waits for nothing: no deadlock
        other.execute("SELECT FROM pgflow_prefect.owners WHERE run_id = %s FOR NO KEY UPDATE", [runs[1]])
    other.execute("ROLLBACK")
    keeper.execute("COMMIT")

    assert [(await store.read_run(run_id)).held for run_id in runs] == [Held.EXPIRED, Held.LEASED]
    await store.extend_leases(zip(runs, epochs, strict=True))
    assert [(await store.read_run(run_id)).held for run_id in runs] == [Held.LEASED, Held.LEASED]
