"""Which runs a process takes, in which order, and what two processes that take at once leave to each other."""

from collections.abc import Sequence
from uuid import UUID

import pytest

from tests.conftest import Connect, Connection
from tests.engine import CHAIN, cancel, column, define, reopen, run_workflow
from tests.integration.test_ownership import LONG_UP, expire

TAKE = """
    SELECT run_id FROM pgflow_prefect.take_runs(
        workflow_slugs => ARRAY['chain'], wanted => %s, adopt => false, held_by => 'the tests', lease => 60,
        max_recoveries => 3)
"""


@pytest.fixture
def runs(db: Connection) -> Sequence[UUID]:
    """Thirty waiting runs of an enabled workflow, on a server that has been up for long; the oldest comes first."""
    define(db, "chain", CHAIN)
    db.execute("SELECT pgflow_prefect.enable_workflow('chain')")
    db.execute(LONG_UP)
    return [run_workflow(db, "chain").id for _ in range(30)]


@pytest.mark.parametrize("maintain", [b"SELECT", b"ANALYZE pgflow.runs", b"ANALYZE pgflow_prefect.owners", b"ANALYZE"])
def test_runs_that_are_free_again_are_taken_in_turn(db: Connection, runs: Sequence[UUID], maintain: bytes) -> None:
    assert column(db, TAKE, 20) == runs[:20]
    db.execute("SELECT pgflow_prefect.release_run(%s, 1)", [runs[3]])
    expire(db, runs[7])
    cancel(db, runs[11])
    reopen(db, runs[11])
    db.execute("SELECT pgflow.take_run(%s)", [runs[13]])  # by hand: its owner has lost it
    db.execute(maintain)
    free = [runs[3], runs[7], runs[11], runs[13], *runs[20:]]
    assert column(db, TAKE, 6) == free[:6]
    assert column(db, TAKE, 30) == free[6:]
    assert column(db, TAKE, 30) == []


def test_two_processes_that_take_at_once_share_the_runs_and_do_not_wait(
    db: Connection, connect: Connect, runs: Sequence[UUID]
) -> None:
    other = connect()
    other.execute("SET lock_timeout = '1s'")  # an error, where it has to wait
    with db.transaction():
        assert column(db, TAKE, 10) == runs[:10]
        with other.transaction():
            assert column(other, TAKE, 10) == runs[10:20]
            assert column(db, TAKE, 5) == runs[20:25]
        assert column(other, TAKE, 30) == runs[25:]
    assert column(other, TAKE, 30) == []
