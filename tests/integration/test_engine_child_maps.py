"""Maps of children: each item is a run of another workflow, and so many of them are under way at the same time."""

import json
from collections.abc import Callable
from threading import Thread
from time import monotonic
from uuid import UUID

import pytest

from tests.conftest import Connection
from tests.engine import (
    NOT_READY,
    Run,
    cancel,
    complete,
    define,
    fail,
    get_run,
    get_state,
    refused,
    reopen,
    repair,
    run_workflow,
    statuses,
    take,
    value,
)
from tests.growth import is_linear
from tests.integration.test_engine_children import list_children, move
from tests.integration.test_engine_outcomes import say

STEPS: dict[str, list[str]] = {"look": [], "rates": [], "price": ["look", "rates"], "total": ["price"]}


def begin(db: Connection, items: object, **said: object) -> UUID:
    """Start a run whose step `price` is a map over `look`, each item a run of `pricing`."""
    define(db, "pricing", {"ask": []})
    define(db, "orders", STEPS)
    say(db, "orders", "price", step_type="map", map_over="look", child_workflow="pricing", **said)
    run_id = run_workflow(db, "orders", {"id": 7}).id
    complete(db, run_id, "rates", {"eur": 2})
    complete(db, run_id, "look", items)
    return run_id


def list_pending(db: Connection, run_id: UUID) -> list[Run]:
    return [each for each in list_children(db, run_id) if each.status == "pending"]


def end_all(db: Connection, run_id: UUID) -> int:
    """Complete the children of a run, each with its item, until none is pending; return how many were under way."""
    most = 0
    while pending := list_pending(db, run_id):
        most = max(most, len(pending))
        for child in pending:
            assert isinstance(child.payload, dict)
            complete(db, child.id, "ask", child.payload["item"])
    return most


def read_items(db: Connection, run_id: UUID) -> list[tuple[object, ...]]:
    found = "SELECT item_index, status, attempts FROM pgflow.step_items WHERE run_id = %s ORDER BY item_index"
    return db.execute(found, [run_id]).fetchall()


def test_each_item_is_a_run_and_the_results_come_in_their_order(db: Connection) -> None:
    run_id = begin(db, [5, 6, 7])
    children = list_children(db, run_id)
    assert [(each.parent_item, each.parent_attempt) for each in children] == [(0, 1), (1, 1), (2, 1)]
    assert children[1].payload == {"payload": {"id": 7}, "rates": {"eur": 2}, "item": 6}
    for child in reversed(children):
        assert isinstance(child.payload, dict)
        complete(db, child.id, "ask", child.payload["item"])
    assert get_state(db, run_id, "price").step_result == [{"ask": 5}, {"ask": 6}, {"ask": 7}]
    assert statuses(db, run_id)["total"] == "pending"


def test_so_many_children_are_under_way_and_each_end_begins_another(db: Connection) -> None:
    run_id = begin(db, [*range(7)], max_children=3)
    assert len(list_children(db, run_id)) == 3
    assert end_all(db, run_id) == 3
    assert len(list_children(db, run_id)) == 7
    assert get_state(db, run_id, "price").step_result == [{"ask": each} for each in range(7)]


def test_an_item_without_retries_stops_the_map_and_the_others_may_end(db: Connection) -> None:
    run_id = begin(db, [1, 2, 3], max_children=2)
    first, second = list_children(db, run_id)
    fail(db, first.id, "ask", "no price")
    assert get_run(db, run_id).status == "failed"
    assert "item 0 failed: run" in str(get_state(db, run_id, "price").error_message)
    complete(db, second.id, "ask", 2)
    assert read_items(db, run_id) == [(0, "failed", 1), (1, "completed", 1), (2, "pending", 0)]
    assert len(list_children(db, run_id)) == 2  # and no further one begins


def test_a_failed_item_is_tried_again_by_another_child(db: Connection) -> None:
    run_id = begin(db, [1, 2], child_retries=1, max_children=1)
    [first] = list_children(db, run_id)
    fail(db, first.id, "ask")
    again = list_pending(db, run_id)
    assert [(each.parent_item, each.parent_attempt) for each in again] == [(0, 2)]
    end_all(db, run_id)
    assert get_state(db, run_id, "price").step_result == [{"ask": 1}, {"ask": 2}]
    assert read_items(db, run_id) == [(0, "completed", 2), (1, "completed", 1)]


@pytest.mark.parametrize(("policy", "result"), [("skip", [{"ask": 2}]), ("continue", None)])
def test_the_others_go_on_where_the_map_says_so(db: Connection, policy: str, result: object) -> None:
    run_id = begin(db, [1, 2], when_item_fails=policy, max_children=1)
    fail(db, list_children(db, run_id)[0].id, "ask")
    end_all(db, run_id)
    state = get_state(db, run_id, "price")
    assert (state.status, state.step_result) == ("completed" if policy == "skip" else "failed", result)


def test_a_reopened_map_reopens_failed_children_and_keeps_the_others(db: Connection) -> None:
    run_id = begin(db, [1, 2, 3], when_item_fails="continue", max_children=2)
    first, second = list_children(db, run_id)
    fail(db, first.id, "ask")
    complete(db, second.id, "ask", 2)
    [third] = list_pending(db, run_id)
    fail(db, third.id, "ask")
    assert get_run(db, run_id).status == "failed"
    reopen(db, run_id)
    assert {each.id for each in list_pending(db, run_id)} == {first.id, third.id}
    end_all(db, run_id)
    assert get_state(db, run_id, "price").step_result == [{"ask": 1}, {"ask": 2}, {"ask": 3}]
    assert len(list_children(db, run_id)) == 3


def test_reopened_children_that_fail_again_at_once_are_not_begun_anew(db: Connection) -> None:
    define(db, "asking", {"ask": []})
    say(db, "asking", "ask", required_input_pattern='{"item": {"ok": true}}', when_unmet="fail")
    define(db, "orders", STEPS)
    said = {"child_workflow": "asking", "when_item_fails": "continue", "max_children": 2}
    say(db, "orders", "price", step_type="map", map_over="look", **said)
    run_id = run_workflow(db, "orders", {}).id
    complete(db, run_id, "rates", {})
    complete(db, run_id, "look", [1, 2, 3])
    children = [each.id for each in list_children(db, run_id)]
    assert len(children) == 3
    reopen(db, run_id)
    assert [each.id for each in list_children(db, run_id)] == children
    assert read_items(db, run_id) == [(item, "failed", 1) for item in range(3)]
    assert get_run(db, run_id).status == "failed"


def test_a_cancelled_map_cancels_its_children_and_a_reopened_one_goes_on_with_them(db: Connection) -> None:
    run_id = begin(db, [1, 2, 3, 4], max_children=2)
    before = list_children(db, run_id)
    cancel(db, run_id)
    assert [each.ended_as for each in list_children(db, run_id)] == ["cancelled"] * 2
    reopen(db, run_id)
    assert {each.id for each in list_pending(db, run_id)} == {each.id for each in before}
    assert end_all(db, run_id) == 2
    assert get_state(db, run_id, "price").step_result == [{"ask": each} for each in (1, 2, 3, 4)]


def test_more_than_a_hundred_children_are_cancelled_and_reopened_by_and_by(db: Connection) -> None:
    run_id = begin(db, [*range(130)], max_children=130)
    cancel(db, run_id)
    assert len(list_pending(db, run_id)) == 30
    assert move(db) == 30
    assert list_pending(db, run_id) == []
    reopen(db, run_id)
    assert len(list_pending(db, run_id)) == 100
    assert move(db) == 30
    end_all(db, run_id)
    assert get_state(db, run_id, "price").status == "completed"


def test_a_deleted_child_of_a_failed_item_is_begun_anew(db: Connection) -> None:
    run_id = begin(db, [1, 2])
    first, second = list_children(db, run_id)
    fail(db, first.id, "ask")
    complete(db, second.id, "ask", 2)
    db.execute("DELETE FROM pgflow.step_states WHERE run_id = %s", [first.id])
    db.execute("DELETE FROM pgflow.runs WHERE id = %s", [first.id])
    reopen(db, run_id)
    [again] = list_pending(db, run_id)
    assert (again.parent_item, again.parent_attempt) == (0, 2)
    end_all(db, run_id)
    assert get_run(db, run_id).status == "pending"
    assert get_state(db, run_id, "price").step_result == [{"ask": 1}, {"ask": 2}]


def test_another_owner_of_the_parent_takes_no_item_from_its_child(db: Connection) -> None:
    run_id = begin(db, [1, 2, 3], max_children=2)
    take(db, run_id)
    take(db, run_id)
    assert end_all(db, run_id) == 2
    assert [attempts for _, _, attempts in read_items(db, run_id)] == [1, 1, 1]


def test_a_repair_changes_nothing_while_children_are_under_way(db: Connection) -> None:
    run_id = begin(db, [1, 2, 3], max_children=2)
    for _again in range(2):
        repair(db, run_id)
    assert len(list_children(db, run_id)) == 2
    end_all(db, run_id)
    assert get_state(db, run_id, "price").status == "completed"


def test_items_that_are_runs_cannot_be_claimed(db: Connection) -> None:
    run_id = begin(db, [1, 2])
    with refused(NOT_READY, "each is a run of another workflow"):
        db.execute("SELECT * FROM pgflow.claim_items(%s, 'price', 10)", [run_id])
    with refused(NOT_READY, "it is a run of another workflow"):
        db.execute("SELECT * FROM pgflow.claim_step(%s, 'price')", [run_id])
    assert db.execute("SELECT * FROM pgflow_prefect.take_items('orders', 'price', 10)").fetchall() == []
    end_all(db, run_id)
    assert get_state(db, run_id, "price").step_result == [{"ask": 1}, {"ask": 2}]


def test_skipping_a_map_cancels_its_children_and_begins_no_further_one(db: Connection) -> None:
    run_id = begin(db, [1, 2, 3], max_children=2)
    db.execute("SELECT pgflow.skip_step(%s, 'price', 'not needed', false)", [run_id])
    assert [each.ended_as for each in list_children(db, run_id)] == ["cancelled", "cancelled"]
    complete(db, run_id, "total")
    assert get_run(db, run_id).status == "completed"


def test_an_item_that_is_completed_by_hand_frees_its_place_when_its_child_ends(db: Connection) -> None:
    run_id = begin(db, [1, 2, 3], max_children=1)
    [first] = list_children(db, run_id)
    db.execute("SELECT pgflow.complete_items(%s, 'price', '{0}', %s)", [run_id, json.dumps(["by hand"])])
    assert len(list_children(db, run_id)) == 1
    complete(db, first.id, "ask", 1)
    end_all(db, run_id)
    assert get_state(db, run_id, "price").step_result == ["by hand", {"ask": 2}, {"ask": 3}]


def test_an_empty_map_begins_no_child(db: Connection) -> None:
    run_id = begin(db, [])
    assert list_children(db, run_id) == []
    assert get_state(db, run_id, "price").step_result == []


def test_children_that_end_as_they_begin_do_not_nest_the_stack(db: Connection) -> None:
    define(db, "pricing", {"ask": []})
    say(db, "pricing", "ask", required_input_pattern='{"no": 1}', when_unmet="skip")
    define(db, "orders", {"price": []})
    say(db, "orders", "price", step_type="map", child_workflow="pricing", max_children=1)
    run_id = run_workflow(db, "orders", [*range(300)]).id
    assert get_run(db, run_id).status == "completed"
    assert get_state(db, run_id, "price").step_result == [{}] * 300


def test_two_sessions_that_end_children_at_once_lose_none(db: Connection, connect: Callable[[], Connection]) -> None:
    run_id = begin(db, [*range(40)], max_children=8)

    def end_some(session: Connection, half: int) -> None:
        while get_state(session, run_id, "price").status == "pending":
            for child in list_pending(session, run_id):
                if child.id.int % 2 == half:
                    complete(session, child.id, "ask", child.parent_item)

    threads = [Thread(target=end_some, args=(connect(), half)) for half in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get_state(db, run_id, "price").step_result == [{"ask": each} for each in range(40)]
    assert value(db, "SELECT count(*) FROM pgflow.runs WHERE parent_run_id = %s", run_id) == 40


@pytest.mark.thorough
def test_the_cost_of_a_map_of_children_grows_with_its_items_only(db: Connection) -> None:
    db.execute("SET synchronous_commit = off")
    define(db, "pricing", {"ask": []})
    define(db, "orders", {"price": []})
    say(db, "orders", "price", step_type="map", child_workflow="pricing", child_payload=["item"], max_children=20)
    found = (
        "SELECT id FROM pgflow.runs WHERE parent_run_id = %s AND parent_step_slug = 'price' "
        "AND coalesce(parent_item, -1) = %s AND parent_attempt = 1"
    )

    def execute(items: int) -> None:
        run_id = run_workflow(db, "orders", [*range(items)]).id
        for item in range(items):
            complete(db, UUID(str(value(db, found, run_id, item))), "ask", item)
        assert get_run(db, run_id).status == "completed"

    assert is_linear(execute, 100, 6, monotonic)
