"""Which runs a process takes, in which order, and what two processes that take at once leave to each other."""

from collections.abc import Sequence
from uuid import UUID, uuid4

import anyio
import pytest

from pgflow_prefect.database.store import Store
from pgflow_prefect.execution.process.slots import Slot
from pgflow_prefect.models import TakenRun
from pgflow_prefect.services.run_fetcher import RunFetcher
from pgflow_prefect.waiting import Wakeup
from tests.conftest import Connect, Connection
from tests.engine import CHAIN, cancel, column, define, reopen, run_workflow, value
from tests.integration.test_ownership import LONG_UP, expire

TAKE = """
    SELECT run_id FROM pgflow_prefect.take_runs(
        workflow_slugs => ARRAY['chain'], wanted => %s, adopt => false, held_by => 'the tests', lease => 60,
        max_recoveries => 3)
"""
"""As the former version says it: it looks at every pending run."""
TAKE_FREE = """
    SELECT run_id FROM pgflow_prefect.take_runs(
        workflow_slugs => ARRAY['chain'], wanted => %s, adopt => %s, held_by => 'the tests', lease => 60,
        max_recoveries => 3, besides => '{}', expired => false)
"""
"""As a worker says it between two sweeps."""


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
    free = [runs[7], runs[3], runs[11], runs[13], *runs[20:]]  # the one whose lease has run out comes first
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


def test_a_run_that_is_free_again_is_taken_without_a_look_at_what_is_held(db: Connection, runs: Sequence[UUID]) -> None:
    assert column(db, TAKE_FREE, 20, False) == runs[:20]
    db.execute("SELECT pgflow_prefect.release_run(%s, 1)", [runs[3]])
    expire(db, runs[7])
    cancel(db, runs[11])
    reopen(db, runs[11])
    db.execute("SELECT pgflow.take_run(%s)", [runs[13]])
    db.execute("SELECT pgflow_prefect.release_reservation(%s, 1, 'the tests')", [runs[17]])
    assert column(db, TAKE_FREE, 30, False) == [runs[3], runs[11], runs[13], runs[17], *runs[20:]]
    assert column(db, TAKE_FREE, 30, False) == []
    assert column(db, TAKE, 30) == [runs[7]], "its lease has run out"
    assert column(db, TAKE, 30) == []


def test_a_run_whose_process_died_after_it_was_taken_is_never_lost(db: Connection, runs: Sequence[UUID]) -> None:
    for _ in range(3):  # each process that takes it dies before it begins
        assert runs[0] in column(db, TAKE, 30)
        assert column(db, TAKE, 30) == []
        expire(db, runs[0])
    assert column(db, TAKE_FREE, 30, False) == []
    assert column(db, TAKE, 30) == [runs[0]]


def test_a_transaction_that_breaks_off_leaves_its_runs_free(db: Connection, runs: Sequence[UUID]) -> None:
    with db.transaction(force_rollback=True):
        assert column(db, TAKE_FREE, 30, False) == runs
    assert column(db, TAKE_FREE, 30, False) == runs


@pytest.mark.parametrize("body", ["RETURN NULL", "RAISE EXCEPTION 'no'", "RETURN OLD"])
def test_a_trigger_that_refuses_to_let_a_run_go_does_not_keep_it(
    db: Connection, runs: Sequence[UUID], body: str
) -> None:
    assert column(db, TAKE, 30) == runs
    db.execute(
        f"""CREATE FUNCTION public.keep() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN IF NEW.taken_in IS NULL THEN {body}; END IF; RETURN NEW; END $$;
            CREATE TRIGGER keep BEFORE UPDATE ON pgflow.runs FOR EACH ROW EXECUTE FUNCTION public.keep()""".encode()
    )
    assert value(db, "SELECT pgflow_prefect.release_run(%s, 1)", runs[3]) is True
    assert column(db, TAKE_FREE, 30, False) == []
    assert column(db, TAKE, 30) == [runs[3]]


def test_an_installation_of_its_own_takes_what_the_original_held(db: Connection, runs: Sequence[UUID]) -> None:
    assert column(db, TAKE, 10) == runs[:10]
    db.execute("SELECT pgflow_prefect.new_installation()")
    assert column(db, TAKE_FREE, 30, False) == [], "older than this installation"
    adopting = TAKE.replace("adopt => false", "adopt => true")
    assert column(db, adopting, 30) == runs
    assert column(db, adopting, 30) == []


def test_a_run_that_a_former_version_took_is_held(db: Connection, runs: Sequence[UUID]) -> None:
    """The upgrade fires no trigger: it leaves the runs that are held as they are, and they look free."""
    assert column(db, TAKE, 10) == runs[:10]
    db.execute("UPDATE pgflow.runs SET taken_in = NULL")
    assert column(db, TAKE_FREE, 5, False) == runs[10:15]
    expire(db, runs[2])
    assert column(db, TAKE_FREE, 30, False) == [runs[2], *runs[15:]]


def test_a_run_that_its_owner_created_is_held(db: Connection, runs: Sequence[UUID]) -> None:
    created = uuid4()
    create = "SELECT pgflow_prefect.create_run('chain', '{}', %s, %s, 'the tests', 60, 3)"
    assert value(db, create, created, uuid4()) == 1
    assert column(db, TAKE_FREE, 40, False) == runs
    assert column(db, TAKE, 40) == []
    expire(db, created)
    assert column(db, TAKE, 40) == [created]


@pytest.mark.anyio
async def test_all_runs_of_dead_owners_come_before_free_ones_however_few_slots_are_free(
    db: Connection, runs: Sequence[UUID], store: Store
) -> None:
    dead = column(db, TAKE, 5)
    db.execute("UPDATE pgflow_prefect.owners SET lease_until = clock_timestamp() - interval '1 s'")
    taken: list[UUID] = []

    async def note(run: TakenRun, place: Slot) -> None:
        taken.append(run.run_id)
        if len(taken) == len(runs):
            fetcher.stop()

    wakeup = Wakeup()
    fetcher = RunFetcher(store, note, slots=1, sweep_interval=600, adopt=False, workflow_slugs=["chain"], wakeup=wakeup)
    with anyio.fail_after(180):  # one sweep: what follows is woken by the slot that gets free
        async with anyio.create_task_group() as group:
            await fetcher.run(group)
    assert taken[:5] == dead
    assert sorted(taken) == sorted(runs)
