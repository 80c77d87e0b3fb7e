"""The life of a run: started, taken, cancelled, reopened."""

from uuid import uuid4

import pytest

from tests.conftest import Connection
from tests.engine import (
    CHAIN,
    DIAMOND,
    INVALID,
    NOT_READY,
    UNKNOWN,
    cancel,
    claim,
    complete,
    define,
    fail,
    fail_run,
    finish,
    get_run,
    get_state,
    refused,
    reopen,
    run_workflow,
    start_run,
    statuses,
    take,
    value,
)

PAIR = {"a": [], "b": [], "join": ["a", "b"]}


def test_an_unknown_workflow_cannot_run(db: Connection) -> None:
    with refused(UNKNOWN, 'unknown workflow "nowhere"'):
        run_workflow(db, "nowhere")


def test_a_workflow_without_steps_cannot_run(db: Connection) -> None:
    define(db, "empty", {})
    with refused(INVALID, 'workflow "empty" has no steps'):
        run_workflow(db, "empty")
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 0


def test_the_same_run_id_again_returns_the_run_that_exists(db: Connection) -> None:
    define(db, "chain", CHAIN)
    first = run_workflow(db, "chain", {"first": True}, uuid4())
    assert run_workflow(db, "chain", {"second": True}, first.id) == first
    finish(db, first.id)
    assert run_workflow(db, "chain", {}, first.id).status == "completed"
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 1


def test_a_run_id_of_another_workflow_is_refused(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    define(db, "other", CHAIN)
    with refused(INVALID, f'run {run_id} exists already, of workflow "chain"'):
        run_workflow(db, "other", {}, run_id)


def test_runs_of_one_workflow_do_not_touch_each_other(db: Connection) -> None:
    define(db, "pair", PAIR)
    first, second = run_workflow(db, "pair").id, run_workflow(db, "pair").id
    complete(db, first, "a")
    complete(db, second, "b")
    assert "join" not in statuses(db, first) | statuses(db, second)
    fail(db, first, "b")
    assert finish(db, second) == ["a", "join"]


def test_taking_a_run_raises_its_epoch(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    assert [take(db, run_id), take(db, run_id)] == [1, 2]
    assert get_run(db, run_id).epoch == 2


def test_a_finished_run_cannot_be_taken(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    finish(db, run_id)
    with refused(NOT_READY, f"run {run_id} can't be taken: it is completed"):
        take(db, run_id)


def test_cancelling_fails_the_run_and_all_that_is_pending(db: Connection) -> None:
    run_id = start_run(db, "diamond", DIAMOND)
    complete(db, run_id, "a", 1)
    claim(db, run_id, "b")
    run = cancel(db, run_id, "not needed")
    assert (run.status, run.ended_as, run.error_message) == ("failed", "cancelled", "not needed")
    assert statuses(db, run_id) == {"a": "completed", "b": "failed", "c": "failed"}
    assert [get_state(db, run_id, step).ended_as for step in "abc"] == [None, "cancelled", "cancelled"]
    assert get_state(db, run_id, "b").error_message == "not needed"


def test_failing_a_run_fails_all_that_is_pending_and_cancels_nothing(db: Connection) -> None:
    run_id = start_run(db, "diamond", DIAMOND)
    complete(db, run_id, "a", 1)
    run = fail_run(db, run_id, "cancelled, says the carrier")
    assert (run.status, run.ended_as, run.error_message) == ("failed", None, "cancelled, says the carrier")
    assert statuses(db, run_id) == {"a": "completed", "b": "failed", "c": "failed"}
    assert [get_state(db, run_id, step).ended_as for step in "abc"] == [None, None, None]


def test_failing_a_run_that_has_ended_changes_nothing(db: Connection) -> None:
    completed, cancelled = start_run(db, "chain", CHAIN), run_workflow(db, "chain").id
    finish(db, completed)
    cancel(db, cancelled, "not needed")
    for run_id in (completed, cancelled):
        before = get_run(db, run_id)
        assert fail_run(db, run_id, "too late") == before
    with refused(UNKNOWN, "unknown run"):
        fail_run(db, uuid4(), "of no run")


def test_a_step_that_fails_by_itself_cancels_nothing(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    fail(db, run_id, "a", "cancelled")
    assert (get_state(db, run_id, "a").ended_as, get_run(db, run_id).ended_as) == (None, None)
    assert cancel(db, run_id, "too late").ended_as is None


def test_a_step_that_a_failed_run_left_pending_is_cancelled_alone(db: Connection) -> None:
    run_id = start_run(db, "pair", PAIR)
    claim(db, run_id, "a")
    fail(db, run_id, "b")
    cancel(db, run_id, "enough")
    assert [get_state(db, run_id, step).ended_as for step in "ab"] == ["cancelled", None]
    assert get_run(db, run_id).ended_as is None


def test_cancelling_twice_keeps_the_first_reason(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    first = cancel(db, run_id, "first")
    assert cancel(db, run_id, "second") == first
    assert get_state(db, run_id, "a").error_message == "first"


def test_a_late_report_on_a_cancelled_step_returns_it_and_starts_nothing(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    cancel(db, run_id)
    state = complete(db, run_id, "a", 1)
    assert (state.status, state.error_message, state.step_result) == ("failed", "cancelled", None)
    assert statuses(db, run_id) == {"a": "failed"}


def test_a_completed_run_cannot_be_cancelled_any_more(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    finish(db, run_id)
    before = get_run(db, run_id)
    assert cancel(db, run_id) == before


def test_reopening_keeps_completed_results_and_runs_the_rest(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    complete(db, run_id, "a", "kept")
    fail(db, run_id, "b")
    run = reopen(db, run_id)
    assert (run.status, run.error_message, run.finished_at, run.epoch) == ("pending", None, None, 1)
    assert statuses(db, run_id) == {"a": "completed", "b": "pending"}
    reopened = get_state(db, run_id, "b")
    assert (reopened.error_message, reopened.finished_at, reopened.started_at) == (None, None, None)
    assert claim(db, run_id, "b").upstream_results == {"a": "kept"}
    assert finish(db, run_id) == ["b", "c"]
    assert get_run(db, run_id).status == "completed"


def test_reopening_starts_the_steps_that_became_ready_meanwhile(db: Connection) -> None:
    run_id = start_run(db, "two chains", {"a": [], "b": ["a"], "x": [], "y": ["x"], "z": ["b", "y"]})
    fail(db, run_id, "x")
    complete(db, run_id, "a")
    assert statuses(db, run_id) == {"a": "completed", "x": "failed"}
    reopen(db, run_id)
    assert statuses(db, run_id) == {"a": "completed", "b": "pending", "x": "pending"}
    assert finish(db, run_id) == ["b", "x", "y", "z"]


def test_a_join_whose_last_upstream_finished_after_the_failure_starts(db: Connection) -> None:
    run_id = start_run(db, "pair", PAIR | {"c": []})
    complete(db, run_id, "a")
    fail(db, run_id, "c")
    complete(db, run_id, "b")
    assert "join" not in statuses(db, run_id)
    reopen(db, run_id)
    assert finish(db, run_id) == ["c", "join"]


def test_a_report_of_the_epoch_before_the_reopening_is_refused(db: Connection) -> None:
    run_id = start_run(db, "pair", PAIR)
    old = take(db, run_id)
    attempt = claim(db, run_id, "a", epoch=old).attempt
    fail(db, run_id, "b")
    reopen(db, run_id)
    assert complete(db, run_id, "a", epoch=old, attempt=attempt).status == "pending"
    with refused(NOT_READY, "can't be claimed in epoch"):
        claim(db, run_id, "a", epoch=old)


def test_a_reopened_step_does_not_accept_its_failed_attempt(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    attempt = claim(db, run_id, "a").attempt
    fail(db, run_id, "a", attempt=attempt)
    reopen(db, run_id)
    assert complete(db, run_id, "a", attempt=attempt).status == "pending"
    again = claim(db, run_id, "a").attempt
    assert again == attempt + 1
    assert complete(db, run_id, "a", attempt=again).status == "completed"


@pytest.mark.parametrize("times", [1, 2])
def test_a_cancelled_run_can_be_reopened(db: Connection, times: int) -> None:
    run_id = start_run(db, "diamond", DIAMOND)
    for _ in range(times):
        complete(db, run_id, "a")
        cancel(db, run_id)
        reopen(db, run_id)
        assert (get_run(db, run_id).ended_as, get_state(db, run_id, "b").ended_as) == (None, None)
    assert get_run(db, run_id).epoch == times
    assert finish(db, run_id) == ["b", "c", "d"]


def test_reopening_a_pending_run_leaves_it_as_it_is(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    before = get_run(db, run_id)
    assert reopen(db, run_id) == before


def test_a_completed_run_cannot_be_reopened(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    finish(db, run_id)
    with refused(NOT_READY, f"run {run_id} can't be reopened: it is completed"):
        reopen(db, run_id)
