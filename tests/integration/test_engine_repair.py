"""repair_run: rows that people wrote by hand, and runs that they inserted."""

import pytest

from tests.conftest import Connection
from tests.engine import (
    CHAIN,
    DIAMOND,
    complete,
    define,
    finish,
    get_run,
    insert_run,
    repair,
    start_run,
    statuses,
    value,
    waiting,
)


def test_repairing_a_sound_run_changes_nothing(db: Connection) -> None:
    run_id = start_run(db, "diamond", DIAMOND)
    complete(db, run_id, "a")
    complete(db, run_id, "b")
    before = get_run(db, run_id), statuses(db, run_id), waiting(db, run_id)
    assert repair(db, run_id) == before[0]
    assert (get_run(db, run_id), statuses(db, run_id), waiting(db, run_id)) == before


def test_a_step_completed_by_hand_counts(db: Connection) -> None:
    run_id = start_run(db, "diamond", DIAMOND)
    complete(db, run_id, "a")
    db.execute("UPDATE pgflow.step_states SET status = 'completed' WHERE step_slug = 'b'")
    assert repair(db, run_id).remaining == 2
    assert waiting(db, run_id) == {"d": 1}
    assert finish(db, run_id) == ["c", "d"]


def test_what_became_ready_by_hand_starts(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    db.execute("UPDATE pgflow.step_states SET status = 'completed'")
    repair(db, run_id)
    assert statuses(db, run_id) == {"a": "completed", "b": "pending"}


def test_a_step_set_back_by_hand_runs_again(db: Connection) -> None:
    run_id = start_run(db, "diamond", DIAMOND)
    for step in "abc":
        complete(db, run_id, step)
    db.execute("DELETE FROM pgflow.step_states WHERE step_slug = 'd'")
    db.execute("UPDATE pgflow.step_states SET status = 'pending', step_result = NULL WHERE step_slug = 'b'")
    assert repair(db, run_id).remaining == 2
    assert waiting(db, run_id) == {"d": 1}
    assert finish(db, run_id) == ["b", "d"]
    assert get_run(db, run_id).status == "completed"


@pytest.mark.parametrize(("by_hand", "ended"), [("completed", "completed"), ("failed", "failed")])
def test_a_run_whose_steps_were_ended_by_hand_ends(db: Connection, by_hand: str, ended: str) -> None:
    run_id = start_run(db, "pair", {"a": [], "b": []})
    db.execute("UPDATE pgflow.step_states SET status = %s", [by_hand])
    run = repair(db, run_id)
    assert run.status == ended
    assert run.finished_at is not None


def test_a_run_inserted_by_hand_starts(db: Connection) -> None:
    define(db, "diamond", DIAMOND)
    run_id = insert_run(db, "diamond")
    assert [slug for [slug] in db.execute("SELECT slug FROM pgflow.get_ready_steps(%s)", [run_id])] == ["a"]
    assert value(db, "SELECT pgflow.has_unmet_deps(%s, 'd')", run_id) is True
    run = repair(db, run_id)
    assert (run.status, run.remaining) == ("pending", 4)
    assert finish(db, run_id) == ["a", "b", "c", "d"]


def test_a_run_inserted_by_hand_of_a_workflow_that_cannot_run_says_why(db: Connection) -> None:
    define(db, "empty", {})
    run_id = insert_run(db, "empty")
    run = repair(db, run_id)
    assert (run.status, run.error_message) == ("failed", 'the run can\'t begin: workflow "empty" has no steps')


def test_a_state_inserted_by_hand_is_not_started_twice(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    db.execute("INSERT INTO pgflow.step_states VALUES ('chain', %s, 'b')", [run_id])
    complete(db, run_id, "a")
    assert finish(db, run_id) == ["b", "c"]
    assert get_run(db, run_id).status == "completed"
