"""Workers outside Prefect: the worker that claims a step does it, and no other does meanwhile."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any, LiteralString
from uuid import UUID

import psycopg
import pytest

from pgflow_prefect import Workflow
from pgflow_prefect.bindings import External
from tests.conftest import Connection
from tests.engine import (
    column,
    complete,
    define,
    fail,
    get_run,
    get_state,
    refused,
    reopen,
    run_workflow,
    statuses,
    value,
    wait_until_true,
)
from tests.integration.conftest import Define, make_slug, read_steps
from tests.integration.waiting import WAITING, await_value, going

pytestmark = [pytest.mark.anyio]

flows = pytest.mark.usefixtures("pgflow_dsn", "prefect_api")

TAKE: LiteralString = "SELECT run_id, step_slug FROM pgflow_prefect.take_external_steps(%s, %s, %s, %s::interval)"


@pytest.fixture
def chain(db: Connection) -> str:
    define(db, "chain", {"a": [], "b": ["a"]})
    return "chain"


def bind(db: Connection, workflow: str, step: str, kind: str | None) -> None:
    db.execute("SELECT pgflow_prefect.bind_step(%s, %s, %s)", [workflow, step, kind])


def claim_outside(db: Connection, run_id: UUID, step: str, lease: str | None = None) -> tuple[Any, ...] | None:
    """Return attempt, payload and upstream results; None where the step is not ours."""
    statement: LiteralString = "SELECT * FROM pgflow_prefect.claim_external_step(%s, %s, %s::interval)"
    return db.execute(statement, [run_id, step, lease]).fetchone()


def take(
    db: Connection, workflow: str, step: str | None = None, wanted: int = 1, lease: str | None = None
) -> list[tuple[Any, ...]]:
    return db.execute(TAKE, [workflow, step, wanted, lease]).fetchall()


def outlast_lease(db: Connection, run_id: UUID, step: str) -> None:
    """Return once the lease of an external claim is over by the clock of PostgreSQL, which alone decides that."""
    over: LiteralString = """
        SELECT claimed_until < clock_timestamp() FROM pgflow_prefect.external_claims
        WHERE run_id = %s AND step_slug = %s
    """
    wait_until_true(db, over, run_id, step)


def claim_for_prefect(db: Connection, run_id: UUID, step: str, bound: str = "python") -> tuple[Any, ...]:
    """Claim as a flow run does and return status, attempt and whether an external worker does it."""
    statement: LiteralString = """
        SELECT status, attempt, waits FROM pgflow_prefect.claim_step(
            %s, %s, (SELECT epoch FROM pgflow.runs WHERE id = %s), gen_random_uuid(), NULL, true, %s, %s, %s)
    """
    [row] = db.execute(statement, [run_id, step, run_id, bound, bound == "python", bound]).fetchall()
    return row


@contextmanager
def several(dsn: str, number: int) -> Iterator[list[Connection]]:
    opened = [psycopg.connect(dsn) for _ in range(number)]
    try:
        yield opened
    finally:
        for each in opened:
            each.close()


def test_a_claim_gives_what_it_takes_to_do_the_step(chain: str, db: Connection) -> None:
    bind(db, chain, "b", "external")
    run_id = run_workflow(db, chain, {"n": 1}).id
    complete(db, run_id, "a", [1, 2])
    assert claim_outside(db, run_id, "b") == (1, {"n": 1}, {"a": [1, 2]})
    assert get_state(db, run_id, "b").started_at is not None
    claimed = db.execute("SELECT attempt, claimed_until = 'infinity', claimed_by FROM pgflow_prefect.external_claims")
    assert claimed.fetchone() == (1, True, value(db, "SELECT session_user"))


def test_a_step_is_claimed_once(chain: str, db: Connection) -> None:
    bind(db, chain, "a", "external")
    run_id = run_workflow(db, chain).id
    assert claim_outside(db, run_id, "a") is not None
    assert claim_outside(db, run_id, "a") is None
    assert take(db, chain) == []
    assert get_state(db, run_id, "a").attempts == 1


@pytest.mark.parametrize("kind", ["python", "sql", "http", "queue"])
def test_a_step_that_is_bound_to_another_is_not_given(chain: str, db: Connection, kind: str) -> None:
    target = None if kind == "python" else "app.f"
    db.execute("SELECT pgflow_prefect.bind_step('chain', 'a', %s, %s)", [kind, target])
    run_id = run_workflow(db, chain).id
    assert claim_outside(db, run_id, "a") is None
    assert take(db, chain) == []
    assert get_state(db, run_id, "a").attempts == 0


@pytest.mark.parametrize("wanted", [None, -1])
def test_steps_are_taken_by_a_number(chain: str, db: Connection, wanted: int | None) -> None:
    bind(db, chain, "a", "external")
    run_id = run_workflow(db, chain).id
    with refused("22023", "can't take (NULL|-1) steps"):
        db.execute(TAKE, [chain, None, wanted, None])
    assert take(db, chain, wanted=0) == []
    assert get_state(db, run_id, "a").attempts == 0


def test_without_a_row_only_what_the_handlers_file_declares_external_is_given(chain: str, db: Connection) -> None:
    older = run_workflow(db, chain).id
    assert claim_outside(db, older, "a") is None
    assert take(db, chain, wanted=10) == []
    db.execute("SELECT pgflow_prefect.enable_workflow('chain')")
    assert claim_outside(db, older, "a") is None, "no worker takes it; its handler may be in Python all the same"
    run_id = run_workflow(db, chain).id
    assert claim_outside(db, run_id, "a") is None, "the file of handlers may have it"
    assert claim_for_prefect(db, run_id, "a", "external") == ("pending", 0, True)
    assert claim_outside(db, run_id, "a") is not None, "it has not"


def test_what_is_claimed_outside_has_the_time_that_it_takes_wherever_it_is_moved(chain: str, db: Connection) -> None:
    bind(db, chain, "a", "external")
    run_id = run_workflow(db, chain).id
    assert claim_outside(db, run_id, "a") is not None
    waited: LiteralString = """
        SELECT waits, waited FROM pgflow_prefect.claim_step(
            %s, 'a', (SELECT epoch FROM pgflow.runs), gen_random_uuid(), NULL, true, 'python', true, 'python')
    """
    assert db.execute(waited, [run_id]).fetchone() == (True, 0), "bound to who claimed it: that time-out counts"
    bind(db, chain, "a", "python")
    assert db.execute(waited, [run_id]).fetchone() == (True, None), "the function's time-out is not theirs"


def test_a_step_that_has_not_started_or_has_ended_is_not_given(chain: str, db: Connection) -> None:
    bind(db, chain, "a", "external")
    bind(db, chain, "b", "external")
    run_id = run_workflow(db, chain).id
    assert claim_outside(db, run_id, "b") is None, "its upstream is not done"
    complete(db, run_id, "a")
    assert claim_outside(db, run_id, "a") is None
    fail(db, run_id, "b")
    assert claim_outside(db, run_id, "b") is None
    assert take(db, chain) == []


def test_a_step_that_prefect_does_at_this_moment_is_not_given(chain: str, db: Connection) -> None:
    run_id = run_workflow(db, chain).id
    assert claim_for_prefect(db, run_id, "a") == ("pending", 1, False)
    bind(db, chain, "a", "external")
    assert claim_outside(db, run_id, "a") is None
    assert take(db, chain) == []
    assert claim_for_prefect(db, run_id, "a") == ("pending", 1, True), "its next attempt is an external worker's"
    attempt = claim_outside(db, run_id, "a")
    assert attempt is not None
    assert attempt[0] == 2


def test_prefect_does_not_begin_a_claimed_step_until_its_lease_is_over(chain: str, db: Connection) -> None:
    bind(db, chain, "a", "external")
    run_id = run_workflow(db, chain).id
    assert claim_outside(db, run_id, "a", "1 hour") is not None
    bind(db, chain, "a", "python")
    assert claim_for_prefect(db, run_id, "a") == ("pending", 1, True)
    db.execute("UPDATE pgflow_prefect.external_claims SET claimed_until = clock_timestamp()")
    assert claim_for_prefect(db, run_id, "a") == ("pending", 2, False)
    assert claim_outside(db, run_id, "a") is None


def test_the_step_of_a_dead_worker_is_claimed_again_when_its_lease_is_over(chain: str, db: Connection) -> None:
    bind(db, chain, "a", "external")
    run_id = run_workflow(db, chain).id
    assert take(db, chain, lease="1 hour") == [(run_id, "a")]
    assert take(db, chain) == []
    db.execute("UPDATE pgflow_prefect.external_claims SET claimed_until = clock_timestamp()")
    assert take(db, chain) == [(run_id, "a")]
    assert get_state(db, run_id, "a").attempts == 2


def test_a_short_lease_runs_out_by_itself(chain: str, db: Connection) -> None:
    bind(db, chain, "a", "external")
    run_id = run_workflow(db, chain).id
    assert claim_outside(db, run_id, "a", "1 millisecond") is not None
    outlast_lease(db, run_id, "a")
    assert claim_outside(db, run_id, "a") is not None


def test_a_worker_that_returns_after_its_lease_is_refused_if_it_names_its_attempt(chain: str, db: Connection) -> None:
    bind(db, chain, "a", "external")
    run_id = run_workflow(db, chain).id
    claim_outside(db, run_id, "a", "1 millisecond")
    outlast_lease(db, run_id, "a")
    claim_outside(db, run_id, "a")
    assert complete(db, run_id, "a", "late", attempt=1).status == "pending"
    assert complete(db, run_id, "a", "in time", attempt=2).step_result == "in time"


def test_a_claim_of_before_a_failure_counts_for_nothing_after_it(chain: str, db: Connection) -> None:
    bind(db, chain, "a", "external")
    run_id = run_workflow(db, chain).id
    claim_outside(db, run_id, "a")
    fail(db, run_id, "a")
    reopen(db, run_id)
    assert take(db, chain) == [(run_id, "a")]


def test_the_oldest_are_taken_first_and_as_many_as_are_wanted(chain: str, db: Connection) -> None:
    bind(db, chain, "a", "external")
    bind(db, chain, "b", "external")
    ids = [run_workflow(db, chain).id for _ in range(5)]
    complete(db, ids[4], "a")
    assert take(db, chain, wanted=2) == [(ids[0], "a"), (ids[1], "a")]
    assert take(db, chain, "b", wanted=9) == [(ids[4], "b")]
    assert take(db, chain, wanted=9) == [(ids[2], "a"), (ids[3], "a")]
    assert take(db, "nowhere") == []


def test_several_steps_of_one_run_are_taken_at_once(db: Connection) -> None:
    define(db, "wide", {f"s{n}": [] for n in range(30)})
    db.execute("SELECT pgflow_prefect.observe_workflow('wide')")
    run_workflow(db, "wide")
    assert len(take(db, "wide", wanted=100)) == 30


def test_a_worker_that_takes_one_step_leaves_the_other_steps(chain: str, db: Connection, dsn: str) -> None:
    bind(db, chain, "a", "external")
    ids = [run_workflow(db, chain).id for _ in range(4)]
    with several(dsn, 4) as workers:  # none of them commits before all have looked
        taken = [take(worker, chain) for worker in workers]
    assert taken == [[(run_id, "a")] for run_id in ids]


def test_many_workers_do_every_step_once(chain: str, db: Connection, dsn: str) -> None:
    for step in "ab":
        bind(db, chain, step, "external")
    db.execute("CREATE TABLE done (run_id uuid, step_slug text)")
    ids = [run_workflow(db, chain).id for _ in range(25)]
    together = Barrier(5, timeout=60)

    def work(worker: Connection) -> int:
        together.wait()
        done = 0
        while value(db, "SELECT count(*) FROM pgflow.runs WHERE status = 'pending'"):
            for run_id, step in take(worker, chain, wanted=2):
                worker.commit()
                worker.execute("INSERT INTO done VALUES (%s, %s)", [run_id, step])
                complete(worker, run_id, step)
                worker.commit()
                done += 1
            worker.commit()
        return done

    with several(dsn, 5) as workers, ThreadPoolExecutor(5) as pool:
        shares = [*pool.map(work, workers)]
    assert sum(shares) == 50
    assert value(db, "SELECT count(DISTINCT (run_id, step_slug)) FROM done") == 50
    assert {get_run(db, run_id).status for run_id in ids} == {"completed"}
    assert column(db, "SELECT DISTINCT attempts FROM pgflow.step_states") == [1]


@pytest.mark.thorough
def test_prefect_and_an_outside_worker_never_both_have_a_step(chain: str, db: Connection, dsn: str) -> None:
    """Both claim at the same moment, while the step is turned over."""
    for number in range(20):
        bind(db, chain, "a", "external")
        run_id = run_workflow(db, chain).id
        with several(dsn, 2) as (prefect, outside):
            prefect.autocommit = outside.autocommit = True
            bind(db, chain, "a", "python" if number % 2 else "external")
            together = Barrier(3, timeout=60)

            def claims(run_id: UUID = run_id, prefect: Connection = prefect, gate: Barrier = together) -> bool:
                gate.wait()
                return not claim_for_prefect(prefect, run_id, "a")[2]

            def claims_outside(run_id: UUID = run_id, outside: Connection = outside, gate: Barrier = together) -> bool:
                gate.wait()
                return claim_outside(outside, run_id, "a") is not None

            with ThreadPoolExecutor(2) as pool:
                here, there = pool.submit(claims), pool.submit(claims_outside)
                together.wait()
                bind(db, chain, "a", "external" if number % 2 else "python")
                assert not (here.result(30) and there.result(30))
        assert get_state(db, run_id, "a").attempts == int(here.result()) + int(there.result())


@pytest.mark.thorough
@flows
async def test_a_waiting_flow_run_shows_the_claim_and_its_end(define: Define, db: Connection) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["a", "b"], [("a", "b")])

    @workflow.step
    def b(a: int) -> int:
        return a + 1

    async with going(workflow, db, {"n": 1}) as run:
        await await_value(db, 1, WAITING)
        assert claim_outside(db, run.run_id, "a", "1 hour") == (1, {"n": 1}, {})
        complete(db, run.run_id, "a", 41, attempt=1)
    assert await run.ended.result() == {"b": 42}
    assert statuses(db, run.run_id) == {"a": "completed", "b": "completed"}


@flows
async def test_after_a_cut_over_a_claimed_step_is_waited_for(define: Define, db: Connection) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])

    @workflow.step
    def only() -> str:
        raise AssertionError("an external worker has claimed it")

    bind(db, workflow.slug, "only", "external")
    async with going(workflow, db) as run:
        await await_value(db, 1, WAITING)
        assert claim_outside(db, run.run_id, "only", "1 hour") is not None
        bind(db, workflow.slug, "only", "python")
        complete(db, run.run_id, "only", "theirs")
    assert await run.ended.result() == {"only": "theirs"}


@flows
async def test_after_a_cut_over_the_step_of_a_dead_worker_is_begun_here(define: Define, db: Connection) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    workflow.bind("only", External())

    @workflow.step
    def only() -> str:
        return "ours"

    async with going(workflow, db) as run:
        await await_value(db, 1, WAITING)
        assert claim_outside(db, run.run_id, "only", "1 second") is not None
        bind(db, workflow.slug, "only", "python")
    assert await run.ended.result() == {"only": "ours"}
    assert read_steps(db)["only"][1] == 2
