"""Reports on a step: the first one wins, and what is late, stale or unknown changes nothing."""

from collections.abc import Callable
from uuid import UUID, uuid4

import pytest

from tests.conftest import Connection
from tests.engine import (
    CHAIN,
    NOT_READY,
    UNKNOWN,
    cancel,
    claim,
    complete,
    define,
    fail,
    get_run,
    get_state,
    refused,
    run_workflow,
    start_run,
    start_step,
    statuses,
    take,
)

PAIR = {"a": [], "b": [], "join": ["a", "b"]}


def everything(db: Connection) -> list[list[tuple[object, ...]]]:
    """Return every row about runs."""
    return [
        db.execute("SELECT * FROM pgflow.runs ORDER BY id").fetchall(),
        db.execute("SELECT * FROM pgflow.step_states ORDER BY run_id, step_slug").fetchall(),
        db.execute("SELECT * FROM pgflow.waiting_steps ORDER BY run_id, step_slug").fetchall(),
    ]


def test_completing_twice_keeps_the_first_result(db: Connection) -> None:
    run_id = start_run(db, "pair", PAIR)
    first = complete(db, run_id, "a", "first")
    before = everything(db)
    assert complete(db, run_id, "a", "second") == first
    assert everything(db) == before


def test_a_late_failure_changes_nothing(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    first = complete(db, run_id, "a", 1)
    before = everything(db)
    assert fail(db, run_id, "a") == first
    assert everything(db) == before


def test_a_late_completion_changes_nothing(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    first = fail(db, run_id, "a", "broken")
    before = everything(db)
    assert (first.status, first.error_message) == ("failed", "broken")
    assert complete(db, run_id, "a", 1) == first
    assert everything(db) == before


def test_a_failed_step_fails_its_run_at_once(db: Connection) -> None:
    run_id = start_run(db, "pair", PAIR)
    fail(db, run_id, "a", "broken")
    run = get_run(db, run_id)
    assert (run.status, run.error_message) == ("failed", 'step "a" failed: broken')
    assert run.finished_at is not None
    assert statuses(db, run_id) == {"a": "failed", "b": "pending"}


def test_the_run_keeps_the_reason_of_the_first_failure(db: Connection) -> None:
    run_id = start_run(db, "pair", PAIR)
    fail(db, run_id, "a", "first")
    fail(db, run_id, "b", "second")
    assert get_run(db, run_id).error_message == 'step "a" failed: first'
    assert get_state(db, run_id, "b").error_message == "second"


def test_a_claimed_step_of_a_failed_run_may_finish_but_starts_nothing(db: Connection) -> None:
    run_id = start_run(db, "two chains", {"a": [], "b": ["a"], "x": [], "y": ["x"]})
    claim(db, run_id, "a")
    fail(db, run_id, "x")
    assert complete(db, run_id, "a", 1).status == "completed"
    assert statuses(db, run_id) == {"a": "completed", "x": "failed"}
    assert get_run(db, run_id).status == "failed"


def test_a_step_that_is_not_started_cannot_be_reported(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    with refused(NOT_READY, f"""step "b" of run {run_id} can't be completed: it has not been started"""):
        complete(db, run_id, "b")
    with refused(NOT_READY, "can't be failed: it has not been started"):
        fail(db, run_id, "b")


def test_a_step_cannot_start_before_its_upstreams(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    with refused(NOT_READY, "a step that it waits for is not completed"):
        start_step(db, run_id, "b")


def test_a_step_of_a_finished_run_cannot_start(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    cancel(db, run_id)
    with refused(NOT_READY, f"""step "b" can't start: run {run_id} is failed"""):
        start_step(db, run_id, "b")
    assert start_step(db, run_id, "a").status == "failed"


REPORTS: dict[str, Callable[[Connection, UUID, str], object]] = {
    "start_step": start_step,
    "claim_step": claim,
    "complete_step": complete,
    "fail_step": fail,
}


@pytest.mark.parametrize("report", REPORTS)
def test_an_unknown_run_or_step_is_named(db: Connection, report: str) -> None:
    run_id, unknown = start_run(db, "chain", CHAIN), uuid4()
    with refused(UNKNOWN, f"unknown run {unknown}"):
        REPORTS[report](db, unknown, "a")
    with refused(UNKNOWN, """unknown step "z": workflow "chain" of this run has no such step"""):
        REPORTS[report](db, run_id, "z")


@pytest.mark.parametrize("report", REPORTS)
def test_another_workflows_step_is_unknown(db: Connection, report: str) -> None:
    define(db, "other", {"x": []})
    run_id = start_run(db, "chain", CHAIN)
    run_workflow(db, "other")
    with refused(UNKNOWN, 'unknown step "x"'):
        REPORTS[report](db, run_id, "x")


def test_a_report_of_a_stale_epoch_is_not_accepted(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    old, new = take(db, run_id), take(db, run_id)
    before = everything(db)
    assert complete(db, run_id, "a", "old", epoch=old).status == "pending"
    assert fail(db, run_id, "a", epoch=old).status == "pending"
    assert everything(db) == before
    assert complete(db, run_id, "a", "new", epoch=new).step_result == "new"


def test_a_report_of_a_stale_attempt_is_not_accepted(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    old, new = claim(db, run_id, "a").attempt, claim(db, run_id, "a").attempt
    before = everything(db)
    assert complete(db, run_id, "a", "old", attempt=old).status == "pending"
    assert fail(db, run_id, "a", attempt=old).status == "pending"
    assert everything(db) == before
    assert complete(db, run_id, "a", "new", attempt=new).step_result == "new"


def test_a_report_of_an_attempt_that_was_never_claimed_is_not_accepted(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    assert complete(db, run_id, "a", attempt=0).status == "pending"
    assert fail(db, run_id, "a", attempt=1).status == "pending"


def test_without_epoch_and_attempt_the_first_report_wins(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    take(db, run_id)
    claim(db, run_id, "a")
    claim(db, run_id, "a")
    assert complete(db, run_id, "a", "first").status == "completed"
