"""A REPEATABLE READ caller that decides by an old snapshot is told so (40001), and nothing wrong comes of it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest

from tests.conftest import Connect, Connection
from tests.engine import (
    CHAIN,
    LATE,
    Run,
    cancel,
    claim,
    complete,
    define,
    fail,
    finish,
    get_run,
    insert_run,
    refused,
    reopen,
    run_workflow,
    start_run,
    start_step,
    take,
    wait_until_blocked,
)

JOIN = {"a": [], "b": [], "join": ["a", "b"]}


@pytest.fixture
def late(connect: Connect) -> Iterator[Connection]:
    """A connection that will be in a transaction of the past, once it has looked."""
    connection = connect()
    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    yield connection
    connection.rollback()


def look(late: Connection) -> None:
    late.execute("SELECT count(*) FROM pgflow.runs")


TRANSITIONS: dict[str, Callable[[Connection, UUID], object]] = {
    "complete_step": lambda db, run_id: complete(db, run_id, "b"),
    "fail_step": lambda db, run_id: fail(db, run_id, "b"),
    "claim_step": lambda db, run_id: claim(db, run_id, "b"),
    "start_step": lambda db, run_id: start_step(db, run_id, "join"),
    "take_run": take,
    "cancel_run": cancel,
    "reopen_run": reopen,
}


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_a_transition_after_another_ones_completion_is_told(db: Connection, late: Connection, transition: str) -> None:
    run_id = start_run(db, "join", JOIN)
    look(late)
    complete(db, run_id, "a")
    with refused(LATE):
        TRANSITIONS[transition](late, run_id)
    late.rollback()
    assert finish(db, run_id) == ["b", "join"]


def test_two_that_complete_both_upstreams_of_a_join_at_once(db: Connection, late: Connection, connect: Connect) -> None:
    run_id = start_run(db, "join", JOIN)
    first = connect()
    look(late)
    with ThreadPoolExecutor(1) as pool:
        with first.transaction():
            complete(first, run_id, "a")
            second = pool.submit(complete, late, run_id, "b")
            wait_until_blocked(db, late.info.backend_pid)
        with refused(LATE):
            second.result()
    late.rollback()
    complete(late, run_id, "b")
    late.commit()
    assert finish(db, run_id) == ["join"]


def test_a_step_that_another_session_has_just_started(db: Connection, late: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    db.execute("DELETE FROM pgflow.step_states")
    look(late)
    start_step(db, run_id, "a")
    with refused(LATE):
        start_step(late, run_id, "a")


def test_a_run_that_another_session_has_just_started(db: Connection, late: Connection) -> None:
    define(db, "chain", CHAIN)
    look(late)
    run = run_workflow(db, "chain")
    with refused(LATE):
        run_workflow(late, "chain", run_id=run.id)


def test_the_first_run_of_a_version_that_another_session_has_just_run(db: Connection, late: Connection) -> None:
    define(db, "chain", CHAIN)
    look(late)
    run_workflow(db, "chain")
    run_id = run_workflow(late, "chain").id  # with a snapshot of its own: it does not see the other one
    late.execute("COMMIT")
    assert finish(db, run_id) == ["a", "b", "c"]


def test_a_run_of_a_definition_that_lost_a_step_meanwhile(db: Connection, late: Connection) -> None:
    define(db, "chain", CHAIN)
    cancel(db, run_workflow(db, "chain").id)
    look(late)
    db.execute("DELETE FROM pgflow.deps WHERE to_step_slug = 'c'")
    db.execute("DELETE FROM pgflow.steps WHERE slug = 'c'")
    with refused(LATE):
        run_workflow(late, "chain")


def test_a_run_inserted_by_hand_of_a_definition_edited_meanwhile(db: Connection, late: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id = insert_run(db, "chain")
    look(late)
    db.execute("DELETE FROM pgflow.deps WHERE to_step_slug = 'c'")
    with refused(LATE):
        complete(late, run_id, "a")


def test_alone_such_a_caller_runs_a_workflow_to_its_end(db: Connection, late: Connection) -> None:
    define(db, "join", JOIN)
    look(late)
    run: Run = run_workflow(late, "join")
    assert finish(late, run.id) == ["a", "b", "join"]
    late.commit()
    assert get_run(db, run.id).status == "completed"
