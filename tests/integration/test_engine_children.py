"""Children: a step that is a run of another workflow, as the rows of both runs show it."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from threading import Thread
from typing import LiteralString
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.conftest import Connection
from tests.engine import (
    INVALID,
    NOT_READY,
    Run,
    cancel,
    claim,
    column,
    complete,
    define,
    fail,
    fail_run,
    finish,
    get_run,
    get_state,
    one,
    refused,
    reopen,
    repair,
    run_workflow,
    statuses,
    take,
    value,
    wait_until_blocked,
    wait_until_true,
)
from tests.integration.test_engine_outcomes import say

PARENT: dict[str, Sequence[str]] = {"look": [], "settle": ["look"], "tell": ["settle"]}
CHILD: dict[str, Sequence[str]] = {"pay": [], "book": ["pay"]}


def define_both(db: Connection, **said: object) -> None:
    """Define workflow `settlement`, and workflow `orders` whose step `settle` runs it."""
    define(db, "settlement", CHILD)
    define(db, "orders", PARENT)
    say(db, "orders", "settle", child_workflow="settlement", **said)


def list_children(db: Connection, run_id: UUID) -> list[Run]:
    found = column(
        db, "SELECT id FROM pgflow.runs WHERE parent_run_id = %s ORDER BY parent_attempt, parent_item", run_id
    )
    return [get_run(db, UUID(str(child))) for child in found]


def find_child(db: Connection, run_id: UUID) -> Run:
    """Return the only child of a run."""
    [child] = list_children(db, run_id)
    return child


def begin(db: Connection, payload: object = None) -> tuple[UUID, Run]:
    """Start a run of `orders` up to its child, and return both."""
    run_id = run_workflow(db, "orders", payload or {"id": 7}).id
    complete(db, run_id, "look", {"price": 5})
    return run_id, find_child(db, run_id)


def get_child_result(db: Connection, child_id: UUID) -> object:
    return {"book": get_state(db, child_id, "book").step_result}


def move(db: Connection) -> int:
    """Do all that was asked for, as a service does, and return how many."""
    moved = 0
    while value(db, "SELECT pgflow.move_children()"):
        moved += 1
    return moved


def test_a_step_starts_a_run_of_another_workflow_in_the_same_transaction(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    assert (child.workflow_slug, child.status, child.parent_step_slug) == ("settlement", "pending", "settle")
    assert child.payload == {"payload": {"id": 7}, "look": {"price": 5}}
    assert (child.parent_item, child.parent_attempt) == (None, 1)
    assert statuses(db, child.id) == {"pay": "pending"}
    state = get_state(db, run_id, "settle")
    assert (state.status, state.attempts, state.started_at is not None) == ("pending", 1, True)


def test_the_end_of_the_child_completes_the_step_with_the_results_of_its_last_steps(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    complete(db, child.id, "pay", "paid")
    complete(db, child.id, "book", {"entry": 3})
    state = get_state(db, run_id, "settle")
    assert (state.status, state.step_result) == ("completed", {"book": {"entry": 3}})
    assert claim(db, run_id, "tell").upstream_results == {"settle": {"book": {"entry": 3}}}
    complete(db, run_id, "tell")
    assert get_run(db, run_id).status == "completed"


def test_the_payload_can_be_a_part_of_the_input(db: Connection) -> None:
    define_both(db, child_payload=["look", "price"])
    _, child = begin(db)
    assert child.payload == 5


def test_a_payload_that_is_not_there_fails_the_step_and_names_the_place(db: Connection) -> None:
    define_both(db, child_payload=["look", "cost"])
    run_id = run_workflow(db, "orders", {}).id
    complete(db, run_id, "look", {"price": 5})
    assert list_children(db, run_id) == []
    message = get_state(db, run_id, "settle").error_message
    assert message == (
        'there is nothing at look.cost in the step\'s input for the payload of a run of workflow "settlement"'
    )
    assert get_run(db, run_id).status == "failed"


def test_a_failed_child_fails_the_step_and_names_itself(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    fail(db, child.id, "pay", "no money")
    message = f'run {child.id} of workflow "settlement" has failed: step "pay" failed: no money'
    assert get_state(db, run_id, "settle").error_message == message
    assert get_run(db, run_id).error_message == f'step "settle" failed: {message}'


def test_a_failed_child_skips_the_step_that_says_so(db: Connection) -> None:
    define_both(db, when_exhausted="skip")
    run_id, child = begin(db)
    fail(db, child.id, "pay")
    assert get_state(db, run_id, "settle").skip_reason == "handler_failed"
    assert statuses(db, run_id) == {"look": "completed", "settle": "completed", "tell": "pending"}


def test_a_step_with_retries_begins_another_child_for_each(db: Connection) -> None:
    define_both(db, child_retries=2)
    run_id, child = begin(db)
    for attempt in (1, 2):
        fail(db, child.id, "pay", f"attempt {attempt}")
        assert get_state(db, run_id, "settle").attempts == attempt + 1
        child = list_children(db, run_id)[-1]
        assert (child.status, child.parent_attempt) == ("pending", attempt + 1)
    fail(db, child.id, "pay", "attempt 3")
    assert get_run(db, run_id).status == "failed"
    assert len(list_children(db, run_id)) == 3


def test_a_cancelled_child_is_not_tried_again(db: Connection) -> None:
    define_both(db, child_retries=2)
    run_id, child = begin(db)
    cancel(db, child.id, "wrong account")
    message = f'run {child.id} of workflow "settlement" was cancelled: wrong account'
    assert get_state(db, run_id, "settle").error_message == message
    assert get_run(db, run_id).ended_as is None


def test_no_attempt_ever_has_two_children(db: Connection) -> None:
    define_both(db)
    run_id, _child = begin(db)
    with refused("23505"):
        db.execute(
            "INSERT INTO pgflow.runs (workflow_slug, id, payload, parent_run_id, parent_step_slug, parent_attempt) "
            "VALUES ('settlement', gen_random_uuid(), '{}', %s, 'settle', 1)",
            [run_id],
        )
    for _again in range(2):
        repair(db, run_id)
    assert len(list_children(db, run_id)) == 1


def test_a_child_whose_steps_are_all_skipped_ends_its_step_at_once(db: Connection) -> None:
    define_both(db)
    say(db, "settlement", "pay", required_input_pattern='{"no": 1}', when_unmet="skip-cascade")
    run_id, child = begin(db)
    assert (child.status, get_state(db, run_id, "settle").step_result) == ("completed", {})
    assert statuses(db, run_id)["tell"] == "pending"


def test_a_child_that_fails_as_it_begins_is_tried_again_and_fails_the_step(db: Connection) -> None:
    define_both(db, child_retries=3)
    say(db, "settlement", "pay", required_input_pattern='{"no": 1}', when_unmet="fail")
    run_id = run_workflow(db, "orders", {}).id
    complete(db, run_id, "look")
    assert len(list_children(db, run_id)) == 4
    assert "Condition not met" in str(get_run(db, run_id).error_message)


def test_a_step_without_upstream_steps_can_be_a_child(db: Connection) -> None:
    define(db, "settlement", CHILD)
    define(db, "orders", {"settle": []})
    say(db, "orders", "settle", child_workflow="settlement")
    run_id = run_workflow(db, "orders", {"id": 1}).id
    child = find_child(db, run_id)
    assert child.payload == {"payload": {"id": 1}}
    finish(db, child.id)
    assert get_run(db, run_id).status == "completed"


@pytest.mark.parametrize("above", [["look"], ["look", "more"]])
@pytest.mark.parametrize("said", [{}, {"step_type": "map", "map_over": "payload", "max_children": 1}])
def test_a_step_that_waits_for_none_above_it_has_one_child_when_those_end(
    db: Connection, above: Sequence[str], said: dict[str, object]
) -> None:
    define(db, "settlement", CHILD)
    define(db, "orders", {"look": [], "more": [], "settle": above})
    say(db, "orders", "settle", rule="always", child_workflow="settlement", **said)
    run_id = run_workflow(db, "orders", [1, 2, 3]).id
    child = find_child(db, run_id)
    complete(db, run_id, "look", 1)
    complete(db, run_id, "more", 1)
    assert find_child(db, run_id) == child


def test_children_of_one_run_go_on_side_by_side(db: Connection) -> None:
    define(db, "settlement", CHILD)
    define(db, "orders", {"a": [], "b": [], "join": ["a", "b"]})
    for step in ("a", "b"):
        say(db, "orders", step, child_workflow="settlement")
    run_id = run_workflow(db, "orders", {}).id
    first, second = list_children(db, run_id)
    finish(db, second.id)
    assert statuses(db, run_id) != {"a": "completed", "b": "completed", "join": "pending"}
    finish(db, first.id)
    assert statuses(db, run_id) == {"a": "completed", "b": "completed", "join": "pending"}


def test_cancelling_a_run_cancels_its_child_and_says_why(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    cancel(db, run_id, "not today")
    ended = get_run(db, child.id)
    assert (ended.status, ended.ended_as) == ("failed", "cancelled")
    assert ended.error_message == f"its parent run {run_id} was cancelled: not today"
    assert get_state(db, run_id, "settle").error_message == "not today"
    assert move(db) == 0


def test_failing_a_run_cancels_its_child(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    fail_run(db, run_id)
    assert get_run(db, child.id).ended_as == "cancelled"


def test_a_child_that_another_session_holds_is_cancelled_later_without_waiting(
    db: Connection, connect: Callable[[], Connection]
) -> None:
    define_both(db)
    run_id, child = begin(db)
    with connect() as other, other.transaction():
        complete(other, child.id, "pay")
        cancel(db, run_id)  # does not wait
        assert get_run(db, child.id).status == "pending"
        assert move(db) == 0  # neither does this
    assert get_run(db, child.id).status == "pending"
    assert move(db) == 1
    assert get_run(db, child.id).ended_as == "cancelled"
    assert column(db, "SELECT id FROM pgflow.child_requests") == []


def test_the_end_of_a_child_waits_for_who_holds_its_parent_and_is_not_lost(
    db: Connection, connect: Callable[[], Connection]
) -> None:
    define_both(db)
    run_id, child = begin(db)
    complete(db, child.id, "pay")
    with connect() as other:
        ending = Thread(target=lambda: complete(other, child.id, "book", 1))
        with db.transaction():
            take(db, run_id)
            ending.start()
            wait_until_blocked(db, other.info.backend_pid)
        ending.join()
    assert get_state(db, run_id, "settle").step_result == {"book": 1}


def test_a_cancellation_and_the_end_of_the_child_never_wait_for_each_other(
    db: Connection, connect: Callable[[], Connection]
) -> None:
    define_both(db)
    run_id, child = begin(db)
    complete(db, child.id, "pay")
    with connect() as other:
        ending = Thread(target=lambda: complete(other, child.id, "book", 1))
        with db.transaction():
            take(db, run_id)  # holds the parent
            ending.start()
            wait_until_blocked(db, other.info.backend_pid)  # holds the child, and waits for the parent
            cancel(db, run_id)
        ending.join()
    assert get_run(db, child.id).status == "completed"
    assert get_state(db, run_id, "settle").status == "failed"
    assert move(db) == 1  # there is nothing left to cancel
    assert get_run(db, run_id).ended_as == "cancelled"


def test_reopening_a_run_reopens_its_failed_child_and_keeps_what_is_done(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    complete(db, child.id, "pay", "paid")
    fail(db, child.id, "book")
    assert get_run(db, run_id).status == "failed"
    reopen(db, run_id)
    assert statuses(db, child.id) == {"pay": "completed", "book": "pending"}
    assert get_run(db, child.id).status == "pending"
    complete(db, child.id, "book", 2)
    assert get_state(db, run_id, "settle").step_result == {"book": 2}
    assert len(list_children(db, run_id)) == 1


def test_reopening_a_cancelled_run_reopens_its_child(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    cancel(db, run_id)
    reopen(db, run_id)
    assert get_run(db, child.id).status == "pending"
    finish(db, child.id)
    assert get_state(db, run_id, "settle").status == "completed"


def test_a_reopened_run_waits_again_for_a_child_that_was_not_cancelled_yet(
    db: Connection, connect: Callable[[], Connection]
) -> None:
    define_both(db)
    run_id, child = begin(db)
    with connect() as other, other.transaction():
        complete(other, child.id, "pay")
        cancel(db, run_id)
        reopen(db, run_id)
    assert move(db) == 2  # both look at what is true now
    assert get_run(db, child.id).status == "pending"
    finish(db, child.id)
    assert get_state(db, run_id, "settle").status == "completed"


def test_a_reopened_run_takes_the_result_of_a_child_that_has_completed_meanwhile(
    db: Connection, connect: Callable[[], Connection]
) -> None:
    define_both(db)
    run_id, child = begin(db)
    complete(db, child.id, "pay")
    with connect() as other, other.transaction():
        other.execute("SELECT FROM pgflow.runs WHERE id = %s FOR NO KEY UPDATE", [child.id])
        cancel(db, run_id)
    complete(db, child.id, "book", 4)
    reopen(db, run_id)
    assert get_state(db, run_id, "settle").step_result == {"book": 4}


def test_a_run_whose_child_was_deleted_begins_another_one_when_it_is_reopened(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    fail(db, child.id, "pay")
    db.execute("DELETE FROM pgflow.step_states WHERE run_id = %s", [child.id])
    db.execute("DELETE FROM pgflow.runs WHERE id = %s", [child.id])
    reopen(db, run_id)
    another = find_child(db, run_id)
    assert (another.status, another.parent_attempt) == ("pending", 2)


def test_a_child_that_no_step_waits_for_cannot_be_reopened_alone(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    fail(db, child.id, "pay")
    with refused(NOT_READY, "does not wait for it") as caught:
        reopen(db, child.id)
    assert str(run_id) in str(caught.value.diag.message_hint)


def test_a_child_whose_parent_was_deleted_goes_on_and_can_be_reopened(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    db.execute("DELETE FROM pgflow.step_states WHERE run_id = %s", [run_id])
    db.execute("DELETE FROM pgflow.runs WHERE id = %s", [run_id])
    fail(db, child.id, "pay")
    reopen(db, child.id)
    finish(db, child.id)
    assert get_run(db, child.id).status == "completed"


def test_a_child_that_cannot_be_reopened_fails_its_step_again(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    fail(db, child.id, "pay")
    db.execute("DELETE FROM pgflow.step_states WHERE run_id = %s", [child.id])
    db.execute("DELETE FROM pgflow.deps WHERE workflow_slug = 'settlement'")
    db.execute("DELETE FROM pgflow.steps WHERE workflow_slug = 'settlement' AND slug = 'book'")
    reopen(db, run_id)
    run = get_run(db, run_id)
    assert run.status == "failed"
    assert 'its step "book" has been deleted' in str(run.error_message)


def test_a_step_that_is_completed_by_hand_lets_its_child_go_on(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    complete(db, run_id, "settle", "by hand")
    finish(db, child.id)
    assert get_run(db, child.id).status == "completed"
    assert get_state(db, run_id, "settle").step_result == "by hand"


def test_a_step_that_is_a_run_cannot_be_claimed_by_hand(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    for epoch in (None, 0):
        with refused(NOT_READY, "it is a run of another workflow"):
            claim(db, run_id, "settle", epoch)
    assert get_state(db, run_id, "settle").attempts == 1
    finish(db, child.id)
    assert claim(db, run_id, "settle").status == "completed"
    assert statuses(db, run_id)["tell"] == "pending"


def test_starting_the_step_by_hand_begins_no_second_child(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    db.execute("SELECT pgflow.start_step(%s, 'settle')", [run_id])
    assert find_child(db, run_id).id == child.id


@pytest.mark.parametrize(
    "report",
    [
        "SELECT pgflow.complete_step(%s, 'settle', '1', NULL, 2)",
        "SELECT pgflow.fail_step(%s, 'settle', 'x', NULL, 2)",
    ],
)
def test_a_report_of_another_attempt_leaves_the_child_alone(db: Connection, report: LiteralString) -> None:
    define_both(db)
    run_id, child = begin(db)
    db.execute(report, [run_id])
    assert get_state(db, run_id, "settle").status == "pending"
    assert get_run(db, child.id).status == "pending"
    finish(db, child.id)
    assert get_state(db, run_id, "settle").step_result == get_child_result(db, child.id)


def test_a_step_that_became_a_run_ends_by_it_though_a_row_binds_it(db: Connection) -> None:
    define(db, "settlement", CHILD)
    define(db, "orders", PARENT)
    db.execute("SELECT pgflow_prefect.bind_step('orders', 'settle', 'external')")
    say(db, "orders", "settle", child_workflow="settlement")
    run_id, child = begin(db)
    assert column(db, "SELECT attempt FROM pgflow_prefect.claim_external_step(%s, 'settle')", run_id) == []
    assert column(db, "SELECT step_slug FROM pgflow_prefect.take_external_steps('orders', 'settle', 9)") == []
    finish(db, child.id)
    assert get_state(db, run_id, "settle").attempts == 1


@pytest.mark.parametrize(
    "edit", [{"child_workflow": None}, {"child_retries": 5}, {"child_payload": ["look", "price"]}], ids=str
)
def test_an_edit_changes_nothing_of_a_child_under_way(db: Connection, edit: dict[str, object]) -> None:
    define_both(db)
    run_id, child = begin(db)
    say(db, "orders", "settle", **edit)
    fail(db, child.id, "pay", "no money")
    assert get_state(db, run_id, "settle").status == "failed"
    reopen(db, run_id)
    finish(db, child.id)
    assert get_state(db, run_id, "settle").status == "completed"
    assert find_child(db, run_id).payload == {"payload": {"id": 7}, "look": {"price": 5}}


def test_a_step_that_a_child_under_way_needs_cannot_be_deleted(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    db.execute("DELETE FROM pgflow.deps WHERE workflow_slug = 'settlement'")
    with refused(NOT_READY, f"run {child.id} is pending and has yet to start it"):
        db.execute("DELETE FROM pgflow.steps WHERE workflow_slug = 'settlement' AND slug = 'book'")
    with refused("23503"):
        db.execute("DELETE FROM pgflow.workflows WHERE slug = 'settlement'")
    finish(db, child.id)
    assert get_state(db, run_id, "settle").status == "completed"


def test_a_child_that_no_process_takes_is_counted_though_its_workflow_is_not_enabled(db: Connection) -> None:
    define_both(db)
    _, child = begin(db)
    counted = "SELECT workflow_slug, runs, older FROM pgflow_prefect.count_untaken_runs(60, 600)"
    assert db.execute(counted).fetchall() == [], "it has just begun"
    db.execute("UPDATE pgflow.runs SET created_at = now() - interval '2 minutes' WHERE id = %s", [child.id])
    assert db.execute(counted).fetchall() == [("settlement", 1, 0)]
    db.execute("SELECT pgflow_prefect.take_run(%s, %s, 'me', 600, 3)", [child.id, uuid4()])
    assert db.execute(counted).fetchall() == []


def test_skipping_a_step_cancels_its_child(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    db.execute("SELECT pgflow.skip_step(%s, 'settle', 'not needed', false)", [run_id])
    assert get_run(db, child.id).ended_as == "cancelled"
    assert statuses(db, run_id)["tell"] == "pending"


def test_failing_a_step_cancels_its_child(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    fail(db, run_id, "settle", "timed out")
    assert get_run(db, child.id).ended_as == "cancelled"
    assert get_state(db, run_id, "settle").error_message == "timed out"


def test_a_step_that_is_taken_back_leaves_its_child_and_begins_another(db: Connection) -> None:
    define(db, "settlement", CHILD)
    define(db, "orders", {"look": [], "clean": ["look"]})
    say(db, "orders", "clean", child_workflow="settlement", rule="all_done")
    run_id = run_workflow(db, "orders", {}).id
    fail(db, run_id, "look")
    first = find_child(db, run_id)
    cancel(db, run_id)
    reopen(db, run_id)
    assert get_run(db, first.id).ended_as == "cancelled"
    complete(db, run_id, "look")
    _first, second = list_children(db, run_id)
    assert (second.parent_attempt, second.status) == (2, "pending")
    finish(db, second.id)
    assert get_run(db, run_id).status == "completed"


def test_a_child_under_way_may_end_after_its_run_has_failed_by_another_step(db: Connection) -> None:
    define(db, "settlement", CHILD)
    define(db, "orders", {"settle": [], "other": []})
    say(db, "orders", "settle", child_workflow="settlement")
    run_id = run_workflow(db, "orders", {}).id
    child = find_child(db, run_id)
    fail(db, run_id, "other")
    finish(db, child.id)
    assert statuses(db, run_id) == {"settle": "completed", "other": "failed"}
    reopen(db, run_id)
    complete(db, run_id, "other")
    assert get_run(db, run_id).status == "completed"


def test_a_row_that_was_inserted_by_hand_gets_its_child_by_a_repair(db: Connection) -> None:
    define_both(db)
    run_id = run_workflow(db, "orders", {}).id
    db.execute("UPDATE pgflow.step_states SET status = 'completed', step_result = '1' WHERE run_id = %s", [run_id])
    db.execute(
        "INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug) VALUES ('orders', %s, 'settle')", [run_id]
    )
    repair(db, run_id)
    finish(db, find_child(db, run_id).id)
    assert get_state(db, run_id, "settle").status == "completed"


def test_a_repair_takes_the_end_of_a_child_that_rows_have_lost(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    finish(db, child.id)
    db.execute("DELETE FROM pgflow.step_states WHERE run_id = %s AND step_slug = 'tell'", [run_id])
    db.execute(
        "UPDATE pgflow.step_states SET status = 'pending', step_result = NULL WHERE run_id = %s "
        "AND step_slug = 'settle'",
        [run_id],
    )
    repair(db, run_id)
    assert statuses(db, run_id) == {"look": "completed", "settle": "completed", "tell": "pending"}
    assert len(list_children(db, run_id)) == 1


def test_a_run_that_was_inserted_by_hand_begins_its_child(db: Connection) -> None:
    define(db, "settlement", CHILD)
    define(db, "orders", {"settle": []})
    say(db, "orders", "settle", child_workflow="settlement")
    run_id = uuid4()
    db.execute("INSERT INTO pgflow.runs (workflow_slug, id, payload) VALUES ('orders', %s, '{}')", [run_id])
    repair(db, run_id)
    finish(db, find_child(db, run_id).id)
    assert get_run(db, run_id).status == "completed"


@pytest.mark.parametrize("circle", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_workflow_that_would_run_itself_is_refused_at_the_edit(db: Connection, circle: list[str]) -> None:
    for workflow in circle:
        define(db, workflow, {"step": []})
    for workflow, child in pairwise(circle):
        say(db, workflow, "step", child_workflow=child)
    with refused(INVALID, f'workflow "{circle[-1]}" would run itself'):
        say(db, circle[-1], "step", child_workflow=circle[0])


def test_workflows_are_nested_at_most_20_deep(db: Connection) -> None:
    for level in range(22):
        define(db, f"level{level}", {"step": []})
    for level in range(20, 0, -1):
        say(db, f"level{level}", "step", child_workflow=f"level{level + 1}")
    with refused(INVALID, "more than 20 deep"):
        say(db, "level0", "step", child_workflow="level1")
    run_id = run_workflow(db, "level1", {}).id
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 21
    [leaf] = column(db, "SELECT id FROM pgflow.runs WHERE workflow_slug = 'level21'")
    complete(db, UUID(str(leaf)), "step", 1)  # ends all of them, in one transaction
    assert get_run(db, run_id).status == "completed"


def test_runs_that_nest_without_end_are_stopped_though_no_edit_was_refused(db: Connection) -> None:
    define(db, "loop", {"step": []})
    db.execute("SET session_replication_role = replica")  # past the triggers
    say(db, "loop", "step", child_workflow="loop")
    db.execute("RESET session_replication_role")
    with refused(INVALID, "would run itself"):  # at its first run
        run_workflow(db, "loop", {})


def test_a_workflow_that_a_step_runs_cannot_be_deleted_and_must_exist(db: Connection) -> None:
    define_both(db)
    with refused("23503"):
        say(db, "orders", "settle", child_workflow="unknown")
    db.execute("DELETE FROM pgflow.deps WHERE workflow_slug = 'settlement'")
    db.execute("DELETE FROM pgflow.steps WHERE workflow_slug = 'settlement'")
    with refused("23503"):
        db.execute("DELETE FROM pgflow.workflows WHERE slug = 'settlement'")


def test_a_child_workflow_without_steps_fails_the_step_and_says_why(db: Connection) -> None:
    define(db, "settlement", {})
    define(db, "orders", PARENT)
    say(db, "orders", "settle", child_workflow="settlement")
    run_id = run_workflow(db, "orders", {}).id
    complete(db, run_id, "look")
    message = 'a run of workflow "settlement" can\'t begin: workflow "settlement" has no steps'
    assert get_state(db, run_id, "settle").error_message == message


def test_a_run_keeps_the_definition_it_began_with(db: Connection) -> None:
    define_both(db)
    run_id = run_workflow(db, "orders", {}).id
    say(db, "orders", "settle", child_workflow=None)
    complete(db, run_id, "look")
    assert find_child(db, run_id).workflow_slug == "settlement"


def test_two_sessions_that_end_siblings_at_once_both_count(db: Connection, connect: Callable[[], Connection]) -> None:
    define(db, "settlement", {"pay": []})
    define(db, "orders", {"a": [], "b": [], "join": ["a", "b"]})
    for step in ("a", "b"):
        say(db, "orders", step, child_workflow="settlement")
    run_id = run_workflow(db, "orders", {}).id
    first, second = list_children(db, run_id)
    with connect() as other:
        ending = Thread(target=lambda: complete(other, second.id, "pay"))
        with db.transaction():
            complete(db, first.id, "pay")
            ending.start()
            wait_until_blocked(db, other.info.backend_pid)
        ending.join()
    assert statuses(db, run_id) == {"a": "completed", "b": "completed", "join": "pending"}


def test_the_dates_of_a_run_are_those_of_its_child(db: Connection) -> None:
    define_both(db)
    run_id = run_workflow(db, "orders", {}).id
    db.execute("UPDATE pgflow.runs SET logical_date = '2026-01-01' WHERE id = %s", [run_id])
    complete(db, run_id, "look")
    assert find_child(db, run_id).logical_date is not None


def test_a_child_is_announced_to_workers(db: Connection, connect: Callable[[], Connection]) -> None:
    define_both(db)
    run_id = run_workflow(db, "orders", {}).id
    with connect() as listener:
        listener.execute("LISTEN pgflow_runs")
        complete(db, run_id, "look")
        [notice] = listener.notifies(timeout=30, stop_after=1)
    assert str(find_child(db, run_id).id) in notice.payload


def test_a_trigger_that_drops_the_childs_row_is_named(db: Connection) -> None:
    define_both(db)
    run_id = run_workflow(db, "orders", {}).id
    db.execute(
        "CREATE FUNCTION drop_child() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RETURN CASE WHEN NEW.parent_run_id IS NULL THEN NEW END; END $$"
    )
    db.execute("CREATE TRIGGER drop_child BEFORE INSERT ON pgflow.runs FOR EACH ROW EXECUTE FUNCTION drop_child()")
    with pytest.raises(psycopg.Error, match=r"was not stored: a trigger or rule on pgflow\.runs"):
        complete(db, run_id, "look")
    assert get_state(db, run_id, "look").status == "pending"  # nothing half-done


def test_the_triggers_of_users_find_their_own_settings_in_a_child(db: Connection) -> None:
    define_both(db)
    db.execute("CREATE TABLE seen (path text, seqscan text)")
    db.execute(
        "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen VALUES "
        "(current_setting('search_path'), current_setting('enable_seqscan')); RETURN NEW; END $$"
    )
    db.execute("CREATE TRIGGER see AFTER INSERT OR UPDATE ON pgflow.runs FOR EACH ROW EXECUTE FUNCTION see()")
    db.execute("CREATE TRIGGER see AFTER INSERT OR UPDATE ON pgflow.step_states FOR EACH ROW EXECUTE FUNCTION see()")
    run_id, child = begin(db)
    finish(db, child.id)
    cancel(db, run_id)
    reopen(db, run_id)
    here = (value(db, "SELECT current_setting('search_path')"), value(db, "SELECT current_setting('enable_seqscan')"))
    assert set(db.execute("SELECT DISTINCT * FROM seen")) == {here}


def test_requests_for_runs_that_were_deleted_go(db: Connection) -> None:
    db.execute("INSERT INTO pgflow.child_requests (run_id) VALUES (gen_random_uuid())")
    assert move(db) == 1
    wait_until_true(db, "SELECT NOT EXISTS (SELECT FROM pgflow.child_requests)")


def test_the_child_of_a_plain_workflow_costs_a_plain_run_nothing(db: Connection) -> None:
    define_both(db)
    assert not run_workflow(db, "settlement", {}).uses_rules
    assert one(db, Run, "SELECT * FROM pgflow.run_workflow('orders', '{}')").uses_rules


def lock_runs(db: Connection, *run_ids: UUID) -> set[str]:
    """Lock several runs as a batch of reports does, and return those that it got."""
    held = value(db, "SELECT pgflow_prefect.lock_runs(%s)", [*run_ids])
    assert isinstance(held, dict)
    return {*held}


def test_a_batch_leaves_out_a_child_whose_parent_another_session_holds(
    db: Connection, connect: Callable[[], Connection]
) -> None:
    define_both(db)
    run_id, child = begin(db)
    other_run = run_workflow(db, "settlement", {}).id
    with connect() as other, other.transaction():
        take(other, run_id)
        with db.transaction():
            assert lock_runs(db, child.id, other_run) == {str(other_run)}
    with db.transaction():
        assert lock_runs(db, child.id, other_run) == {str(child.id), str(other_run)}
        with connect() as other, other.transaction():
            other.execute("SET lock_timeout = '1ms'")
            with refused("55P03"):  # the batch holds the parent, too
                take(other, run_id)


def test_a_step_that_is_a_run_cannot_be_bound_otherwise(db: Connection) -> None:
    define_both(db)
    with refused(INVALID, 'is a run of workflow "settlement"'):
        db.execute("SELECT pgflow_prefect.bind_step('orders', 'settle', 'external')")
    say(db, "orders", "settle", child_workflow=None)
    assert value(db, "SELECT pgflow_prefect.bind_step('orders', 'settle', 'external')")


def test_external_workers_do_not_see_a_step_that_is_a_run(db: Connection) -> None:
    define_both(db)
    db.execute("SELECT pgflow_prefect.bind_step('orders', 'look', 'external')")
    run_id, _ = begin(db)
    assert column(db, "SELECT step_slug FROM pgflow_prefect.external_steps WHERE run_id = %s", run_id) == []


def test_a_child_is_pruned_after_its_parent_has_ended_and_not_before(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    finish(db, child.id)
    db.execute("UPDATE pgflow.runs SET finished_at = now() - interval '40 days' WHERE id = %s", [child.id])
    counted = "SELECT runs, kept FROM pgflow_prefect.count_prunable('30 days', '1 day', NULL, NULL)"
    assert db.execute(counted).fetchall() == [(0, 1)]
    assert value(db, "SELECT pgflow_prefect.prune_runs('30 days')") == 0
    finish(db, run_id)
    assert db.execute(counted).fetchall() == [(1, 0)]
    assert value(db, "SELECT pgflow_prefect.prune_runs('30 days')") == 1
    assert get_run(db, run_id).status == "completed"


def test_a_child_is_taken_once_its_parents_owner_shows_the_step(db: Connection) -> None:
    define_both(db)
    run_id, child = begin(db)
    for workflow in ("orders", "settlement"):
        db.execute("SELECT pgflow_prefect.enable_workflow(%s)", [workflow])
    db.execute("UPDATE pgflow.runs SET created_at = now() + interval '1 hour' WHERE id = %s", [child.id])  # just now
    looked = (
        "SELECT run_id, parent_flow_run_id "
        "FROM pgflow_prefect.take_runs('{settlement}', 5, true, 'me', 60, 3, NULL, true)"
    )
    assert db.execute(looked).fetchall() == []
    flow_run = uuid4()
    epoch = value(db, "SELECT pgflow_prefect.take_run(%s, %s, 'me', 60, 3)", run_id, flow_run)
    claimed = (
        "SELECT status, waits, kind, target "
        "FROM pgflow_prefect.claim_step(%s, 'settle', 0, %s, %s, NULL, true, 'external', false, 'x')"
    )
    with db.transaction():
        found = db.execute(claimed, [run_id, epoch, uuid4()]).fetchall()
    assert found == [("pending", True, "child", "settlement")]
    assert db.execute(looked).fetchall() == [(child.id, flow_run)]
