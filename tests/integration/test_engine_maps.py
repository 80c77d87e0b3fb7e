"""Maps: a step that is executed once for each item of an array, as its rows show it."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from threading import Thread
from time import monotonic
from uuid import UUID

import psycopg
import pytest

from tests.conftest import Connection
from tests.engine import (
    INVALID,
    NOT_READY,
    cancel,
    column,
    complete,
    define,
    get_run,
    get_state,
    refused,
    reopen,
    repair,
    run_workflow,
    statuses,
    value,
)
from tests.growth import is_linear
from tests.integration.test_engine_outcomes import say

STEPS: dict[str, Sequence[str]] = {"look": [], "price": ["look"], "total": ["price"]}

NO_MORE: list[tuple[int, int, object]] = []


def begin(db: Connection, **said: object) -> UUID:
    """Start a run of a workflow whose step `price` is a map over `look`."""
    define(db, "orders", STEPS)
    say(db, "orders", "price", step_type="map", **said)
    return run_workflow(db, "orders", {}).id


def map_over(db: Connection, items: object, **said: object) -> UUID:
    """Start such a run, and let `look` return something."""
    run_id = begin(db, **said)
    complete(db, run_id, "look", items)
    return run_id


def claim_items(
    db: Connection, run_id: UUID, wanted: int, *, epoch: int | None = None, lease: str | None = None
) -> list[tuple[int, int, object]]:
    found = db.execute(
        "SELECT item_index, attempt, item FROM pgflow.claim_items(%s, 'price', %s, %s, %s)",
        [run_id, wanted, epoch, lease],
    )
    return [(int(str(index)), int(str(attempt)), item) for index, attempt, item in found]


def complete_items(
    db: Connection, run_id: UUID, indexes: Sequence[int], *, epoch: int | None = None, attempts: object = None
) -> object:
    """Complete items, each with ten times its index."""
    results = json.dumps([10 * index for index in indexes])
    statement = "SELECT pgflow.complete_items(%s, 'price', %s, %s, %s, %s)"
    return value(db, statement, run_id, [*indexes], results, epoch, attempts)


def fail_items(db: Connection, run_id: UUID, indexes: Sequence[int], again_in: str | None = None) -> object:
    statement = "SELECT pgflow.fail_items(%s, 'price', %s, %s, %s)"
    return value(db, statement, run_id, [*indexes], ["broken"] * len(indexes), again_in)


def take(db: Connection, run_id: UUID) -> int:
    return int(str(value(db, "SELECT pgflow.take_run(%s)", run_id)))


def result(db: Connection, run_id: UUID, step: str = "price") -> object:
    state = get_state(db, run_id, step)
    assert state.status == "completed"
    return state.step_result


def test_the_last_item_completes_the_map_with_the_results_in_order(db: Connection) -> None:
    run_id = map_over(db, [7, 8, 9])
    assert statuses(db, run_id) == {"look": "completed", "price": "pending"}
    assert claim_items(db, run_id, 2) == [(0, 1, 7), (1, 1, 8)]
    assert claim_items(db, run_id, 5) == [(2, 1, 9)]
    assert claim_items(db, run_id, 5) == NO_MORE
    assert complete_items(db, run_id, [2, 0]) == 2
    assert statuses(db, run_id)["price"] == "pending"
    assert complete_items(db, run_id, [1]) == 1
    assert result(db, run_id) == [0, 10, 20]
    assert statuses(db, run_id)["total"] == "pending"
    complete(db, run_id, "total", 30)
    assert get_run(db, run_id).status == "completed"


def test_the_first_report_on_an_item_wins(db: Connection) -> None:
    run_id = map_over(db, [1, 2])
    claim_items(db, run_id, 2)
    assert complete_items(db, run_id, [0]) == 1
    assert complete_items(db, run_id, [0]) == 0
    assert fail_items(db, run_id, [0]) == 0
    assert complete_items(db, run_id, [0, 1, 7]) == 1
    assert result(db, run_id) == [0, 10]
    assert complete_items(db, run_id, [0, 1]) == 0


def test_an_item_whose_lease_is_over_is_claimed_again_and_its_late_report_is_refused(db: Connection) -> None:
    run_id = map_over(db, [7, 8])
    claim_items(db, run_id, 1, lease="1 hour")
    assert claim_items(db, run_id, 5) == [(1, 1, 8)]
    db.execute("UPDATE pgflow.step_items SET due_at = 'epoch' WHERE item_index = 0")  # its hour is over
    assert claim_items(db, run_id, 5) == [(0, 2, 7)]
    assert complete_items(db, run_id, [0], attempts=[1]) == 0
    assert complete_items(db, run_id, [0, 1], attempts=[2, 1]) == 2
    assert result(db, run_id) == [0, 10]


def test_a_new_owner_gets_what_the_former_one_had_and_not_what_others_have_leased(db: Connection) -> None:
    run_id = map_over(db, [1, 2, 3, 4, 5])
    former = take(db, run_id)
    claim_items(db, run_id, 2, epoch=former)
    claim_items(db, run_id, 1, lease="1 hour")
    claim_items(db, run_id, 1)  # another program, which needs no lease
    epoch = take(db, run_id)
    assert sorted(claim_items(db, run_id, 9, epoch=epoch)) == [(0, 2, 1), (1, 2, 2), (4, 1, 5)]
    with refused(NOT_READY):
        complete_items(db, run_id, [0], epoch=former)
    assert complete_items(db, run_id, range(5), epoch=epoch) == 5
    assert result(db, run_id) == [0, 10, 20, 30, 40]


def test_a_stale_epoch_claims_nothing(db: Connection) -> None:
    run_id = map_over(db, [1])
    former = take(db, run_id)
    take(db, run_id)
    with refused(NOT_READY):
        claim_items(db, run_id, 1, epoch=former)


def test_reopening_executes_only_what_is_missing(db: Connection) -> None:
    run_id = map_over(db, [1, 2, 3])
    claim_items(db, run_id, 3)
    complete_items(db, run_id, [0])
    cancel(db, run_id)
    assert get_state(db, run_id, "price").status == "failed"
    assert claim_items(db, run_id, 3) == NO_MORE
    assert complete_items(db, run_id, [1]) == 1  # it was under way
    reopen(db, run_id)
    assert claim_items(db, run_id, 9) == [(2, 2, 3)]
    complete_items(db, run_id, [2])
    assert result(db, run_id) == [0, 10, 20]


def test_a_map_that_was_reported_whole_meanwhile_ends_when_its_run_is_reopened(db: Connection) -> None:
    run_id = map_over(db, [1, 2])
    claim_items(db, run_id, 2)
    cancel(db, run_id)
    complete_items(db, run_id, [0, 1])
    assert get_state(db, run_id, "price").status == "failed"
    reopen(db, run_id)
    assert result(db, run_id) == [0, 10]
    assert statuses(db, run_id)["total"] == "pending"


def test_an_item_is_tried_again_after_its_pause(db: Connection) -> None:
    run_id = map_over(db, [1, 2])
    claim_items(db, run_id, 1)
    fail_items(db, run_id, [0], "1 hour")
    assert claim_items(db, run_id, 1) == [(1, 1, 2)]
    assert claim_items(db, run_id, 1) == NO_MORE
    db.execute("UPDATE pgflow.step_items SET due_at = 'epoch' WHERE item_index = 0")
    assert claim_items(db, run_id, 1) == [(0, 2, 1)]


def test_an_item_that_failed_before_any_claim_is_claimed_once(db: Connection) -> None:
    run_id = map_over(db, [1, 2])
    fail_items(db, run_id, [1], "0 s")
    assert sorted(claim_items(db, run_id, 9)) == [(0, 1, 1), (1, 1, 2)]


def claim_all(db: Connection, run_id: UUID, epoch: int) -> list[int]:
    """Claim all items that can be claimed, one by one, and return them in their order."""
    indexes: list[int] = []
    while claimed := claim_items(db, run_id, 1, epoch=epoch):
        indexes += [index for index, _, _ in claimed]
    return sorted(indexes)


def fail_by_hand(db: Connection, run_id: UUID) -> None:
    fail_items(db, run_id, [2], "0 s")


def fail_and_reopen(db: Connection, run_id: UUID) -> None:
    fail_items(db, run_id, [2])
    reopen(db, run_id)


@pytest.mark.parametrize("former_claims", [1, 3])
@pytest.mark.parametrize("fail", [fail_by_hand, fail_and_reopen])
def test_a_new_owner_gets_an_item_that_failed_before_any_claim(
    fail: Callable[[Connection, UUID], None], former_claims: int, db: Connection
) -> None:
    run_id = map_over(db, [*range(5)])
    fail(db, run_id)
    claim_items(db, run_id, former_claims, epoch=take(db, run_id))
    assert claim_all(db, run_id, take(db, run_id)) == [0, 1, 2, 3, 4]
    complete_items(db, run_id, range(5))
    assert result(db, run_id) == [0, 10, 20, 30, 40]


@pytest.mark.parametrize("fail", [fail_by_hand, fail_and_reopen])
def test_an_owner_that_lost_an_answer_gets_an_item_that_failed_before_any_claim(
    fail: Callable[[Connection, UUID], None], db: Connection
) -> None:
    run_id = map_over(db, [*range(5)])
    fail(db, run_id)
    epoch = take(db, run_id)
    claim_items(db, run_id, 1, epoch=epoch)
    released = "SELECT pgflow.release_items(m, %s, '{}') FROM pgflow.step_maps m WHERE run_id = %s"
    assert value(db, released, epoch, run_id) == 1
    assert claim_all(db, run_id, epoch) == [0, 1, 2, 3, 4]


def test_the_pause_of_an_item_that_failed_before_any_claim_counts(db: Connection) -> None:
    run_id = map_over(db, [1, 2])
    fail_items(db, run_id, [1], "1 hour")
    assert claim_items(db, run_id, 9) == [(0, 1, 1)]
    db.execute("UPDATE pgflow.step_items SET due_at = 'epoch' WHERE item_index = 1")
    assert claim_items(db, run_id, 9) == [(1, 1, 2)]


def test_the_first_failed_item_stops_a_map(db: Connection) -> None:
    run_id = map_over(db, [1, 2, 3])
    claim_items(db, run_id, 2)
    fail_items(db, run_id, [0])
    assert get_run(db, run_id).error_message == 'step "price" failed: item 0 failed: broken'
    assert claim_items(db, run_id, 3) == NO_MORE
    assert complete_items(db, run_id, [1]) == 1  # it counts when the run is reopened
    reopen(db, run_id)
    assert sorted(claim_items(db, run_id, 9)) == [(0, 2, 1), (2, 1, 3)]
    complete_items(db, run_id, [0, 2])
    assert result(db, run_id) == [0, 10, 20]


def test_a_map_that_continues_fails_after_its_last_item(db: Connection) -> None:
    run_id = map_over(db, [1, 2, 3], when_item_fails="continue")
    claim_items(db, run_id, 3)
    fail_items(db, run_id, [0, 2])
    assert get_state(db, run_id, "price").status == "pending"
    complete_items(db, run_id, [1])
    assert get_run(db, run_id).error_message == 'step "price" failed: 2 items of 3 failed; item 0 failed: broken'
    reopen(db, run_id)
    assert [index for index, _, _ in claim_items(db, run_id, 9)] == [0, 2]
    complete_items(db, run_id, [0, 2])
    assert result(db, run_id) == [0, 10, 20]


def test_failed_and_skipped_items_are_left_out_of_the_result(db: Connection) -> None:
    run_id = map_over(db, [1, 2, 3, 4], when_item_fails="skip")
    claim_items(db, run_id, 4)
    fail_items(db, run_id, [0])
    assert value(db, "SELECT pgflow.skip_items(%s, 'price', ARRAY[1], ARRAY['not needed'])", run_id) == 1
    complete_items(db, run_id, [2, 3])
    assert result(db, run_id) == [20, 30]


def test_a_map_all_of_whose_items_are_left_out_has_an_empty_result(db: Connection) -> None:
    run_id = map_over(db, [1], when_item_fails="skip")
    claim_items(db, run_id, 1)
    fail_items(db, run_id, [0])
    assert result(db, run_id) == []


def test_what_becomes_of_a_failed_map_its_step_says(db: Connection) -> None:
    run_id = map_over(db, [1], when_exhausted="skip")
    claim_items(db, run_id, 1)
    fail_items(db, run_id, [0])
    state = get_state(db, run_id, "price")
    assert (state.status, state.skip_reason, state.error_message) == (
        "completed",
        "handler_failed",
        "item 0 failed: broken",
    )
    assert statuses(db, run_id)["total"] == "pending"


@pytest.mark.parametrize(
    ("when_empty", "ends"),
    [
        ("complete", {"price": ("completed", None, []), "total": ("pending", None, None)}),
        ("skip", {"price": ("completed", "no_items", None), "total": ("pending", None, None)}),
        (
            "skip-cascade",
            {"price": ("completed", "no_items", None), "total": ("completed", "dependency_skipped", None)},
        ),
    ],
)
def test_a_map_without_items_ends_at_once(
    when_empty: str, ends: dict[str, tuple[str, str | None, object]], db: Connection
) -> None:
    run_id = map_over(db, [], when_empty=when_empty)
    for step, end in ends.items():
        state = get_state(db, run_id, step)
        assert (state.status, state.skip_reason, state.step_result) == end
    assert claim_items(db, run_id, 1) == NO_MORE
    assert complete_items(db, run_id, [0]) == 0


@pytest.mark.parametrize(
    ("document", "what"), [({"rows": 1}, "object"), (None, "null"), (5, "number"), ("x", "string")]
)
def test_what_is_no_array_fails_the_map_and_not_the_step_that_made_it(
    document: object, what: str, db: Connection
) -> None:
    run_id = map_over(db, document)
    state = get_state(db, run_id, "price")
    assert (state.status, state.skip_reason) == ("failed", "not_mappable")
    assert state.error_message == f'step "price" maps over the result of step "look", which is {what} and no array'
    assert get_state(db, run_id, "look").status == "completed"
    assert get_run(db, run_id).status == "failed"


def test_too_many_items_fail_the_map(db: Connection) -> None:
    run_id = map_over(db, [1, 2, 3], max_items=2)
    message = 'step "price" has 3 items, and at most 2 are allowed (max_items)'
    assert get_state(db, run_id, "price").error_message == message
    reopen(db, run_id)  # and finds the same
    assert get_run(db, run_id).error_message == f'step "price" failed: {message}'


def test_a_map_over_a_part_of_the_payload_starts_with_the_run(db: Connection) -> None:
    define(db, "orders", {"price": []})
    say(db, "orders", "price", step_type="map", map_path=["order", "rows"])
    run_id = run_workflow(db, "orders", {"order": {"rows": ["a", "b"]}}).id
    assert claim_items(db, run_id, 9) == [(0, 1, "a"), (1, 1, "b")]


def test_a_map_maps_over_the_step_that_its_row_names_and_waits_for_all(db: Connection) -> None:
    define(db, "orders", {"look": [], "rates": [], "price": ["look", "rates"]})
    say(db, "orders", "price", step_type="map", map_over="rates")
    run_id = run_workflow(db, "orders", {}).id
    complete(db, run_id, "rates", [1, 2])
    assert "price" not in statuses(db, run_id)
    complete(db, run_id, "look", "x")
    assert len(claim_items(db, run_id, 9)) == 2


def test_a_map_over_the_payload_may_wait_for_steps(db: Connection) -> None:
    define(db, "orders", {"look": [], "price": ["look"]})
    say(db, "orders", "price", step_type="map", map_over="payload")
    run_id = run_workflow(db, "orders", [5]).id
    complete(db, run_id, "look", "x")
    assert claim_items(db, run_id, 9) == [(0, 1, 5)]


def test_a_map_over_a_map_gets_its_results(db: Connection) -> None:
    define(db, "orders", {"price": [], "label": ["price"]})
    for step in ("price", "label"):
        say(db, "orders", step, step_type="map")
    run_id = run_workflow(db, "orders", [1, 2]).id
    complete_items(db, run_id, [0, 1])
    found = db.execute("SELECT item_index, item FROM pgflow.claim_items(%s, 'label', 9)", [run_id]).fetchall()
    assert found == [(0, 0), (1, 10)]


def test_a_map_over_a_step_that_was_skipped_softly_has_no_items(db: Connection) -> None:
    run_id = begin(db)
    db.execute("SELECT pgflow.skip_step(%s, 'look', NULL, false)", [run_id])
    assert result(db, run_id) == []


@pytest.mark.parametrize(
    ("steps", "said", "problem"),
    [
        ({"a": [], "b": [], "price": ["a", "b"]}, {}, "is a map, and waits for 2 steps"),
        ({"a": [], "b": [], "price": ["a"]}, {"map_over": "b"}, 'maps over "b", which it does not wait for'),
        ({"price": []}, {"map_over": "b"}, 'maps over "b", which it does not wait for'),
    ],
)
def test_a_map_that_does_not_say_over_what_is_refused_at_the_next_run(
    steps: dict[str, Sequence[str]], said: dict[str, str], problem: str, db: Connection
) -> None:
    define(db, "orders", steps)
    say(db, "orders", "price", step_type="map", **said)
    with refused(INVALID) as error:
        run_workflow(db, "orders", [])
    assert problem in str(error.value)


def test_a_program_that_knows_no_maps_completes_the_step_whole(db: Connection) -> None:
    run_id = map_over(db, [1, 2])
    claim_items(db, run_id, 1)
    complete(db, run_id, "price", [5])
    assert result(db, run_id) == [5]
    assert complete_items(db, run_id, [0]) == 1  # and changes nothing
    assert result(db, run_id) == [5]
    assert statuses(db, run_id)["total"] == "pending"


def test_a_plain_step_has_no_items(db: Connection) -> None:
    define(db, "orders", {"price": []})
    run_id = run_workflow(db, "orders", [1]).id
    with refused(NOT_READY) as error:
        claim_items(db, run_id, 1)
    assert "has no items: it was no map when the run began" in str(error.value)


def test_results_and_indexes_have_to_be_as_many(db: Connection) -> None:
    run_id = map_over(db, [1, 2])
    for results in ("[1]", "1"):
        with refused(INVALID):
            value(db, "SELECT pgflow.complete_items(%s, 'price', ARRAY[0, 1], %s)", run_id, results)
    with refused(INVALID):
        complete_items(db, run_id, [0, 1], attempts=[1])


def test_repairing_makes_the_items_of_a_row_that_was_inserted_by_hand(db: Connection) -> None:
    run_id = begin(db)
    db.execute("UPDATE pgflow.step_states SET status = 'completed', step_result = '[1, 2]' WHERE step_slug = 'look'")
    db.execute(
        "INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug) VALUES ('orders', %s, 'price')", [run_id]
    )
    repair(db, run_id)
    assert len(claim_items(db, run_id, 9)) == 2


def test_a_claim_makes_the_items_of_a_row_that_was_inserted_by_hand(db: Connection) -> None:
    run_id = begin(db)
    db.execute("UPDATE pgflow.step_states SET status = 'completed', step_result = '[1, 2]' WHERE step_slug = 'look'")
    db.execute(
        "INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug) VALUES ('orders', %s, 'price')", [run_id]
    )
    assert len(claim_items(db, run_id, 9)) == 2


def test_an_undone_map_gets_new_items_whose_attempts_go_on(db: Connection) -> None:
    define(db, "orders", {"look": [], "price": ["look"], "last": ["look", "price"]})
    say(db, "orders", "price", step_type="map", map_over="payload", rule="all_done")
    run_id = run_workflow(db, "orders", [7]).id
    db.execute("SELECT pgflow.fail_step(%s, 'look', 'broken')", [run_id])
    claim_items(db, run_id, 1, lease="1 hour")
    complete_items(db, run_id, [0])
    assert get_run(db, run_id).status == "failed"
    reopen(db, run_id)  # the map ran because `look` had failed: it is to run once more
    assert "price" not in statuses(db, run_id)
    assert value(db, "SELECT count(*) FROM pgflow.step_items") == 0
    complete(db, run_id, "look", 1)
    assert complete_items(db, run_id, [0], attempts=[1]) == 0  # of yesterday
    assert claim_items(db, run_id, 1) == [(0, 2, 7)]


def test_the_result_of_an_item_has_the_limits_of_a_result(db: Connection) -> None:
    db.execute("UPDATE pgflow.limits SET result_bytes = 2000")
    run_id = map_over(db, [1, 2])
    with pytest.raises(psycopg.errors.ProgramLimitExceeded) as error:
        value(db, "SELECT pgflow.complete_items(%s, 'price', ARRAY[1], %s)", run_id, json.dumps(["x" * 3000]))
    assert 'the result of item 1 of step "price" has' in str(error.value)


def test_results_too_large_for_one_value_fail_the_map(db: Connection) -> None:
    db.execute("UPDATE pgflow.limits SET result_bytes = 2000")
    run_id = map_over(db, [1, 2])
    for index in range(2):
        value(db, "SELECT pgflow.complete_items(%s, 'price', ARRAY[%s], %s)", run_id, index, json.dumps(["x" * 1500]))
    message = get_state(db, run_id, "price").error_message
    assert message is not None
    assert message.startswith("the array of the results of its 2 items has")


def test_items_go_with_their_run(db: Connection) -> None:
    run_id = map_over(db, [1, 2])
    db.execute("DELETE FROM pgflow.step_states WHERE run_id = %s", [run_id])
    db.execute("DELETE FROM pgflow.runs WHERE id = %s", [run_id])
    assert column(db, "SELECT count(*) FROM pgflow.step_items UNION ALL SELECT count(*) FROM pgflow.step_maps") == [
        0,
        0,
    ]


def test_the_first_claim_of_an_item_begins_the_step(db: Connection) -> None:
    run_id = map_over(db, [1, 2])
    assert get_state(db, run_id, "price").started_at is None
    claim_items(db, run_id, 1)
    state = get_state(db, run_id, "price")
    assert (state.attempts, state.started_at is not None) == (1, True)
    claim_items(db, run_id, 1)
    assert get_state(db, run_id, "price").attempts == 1


@pytest.mark.thorough
def test_two_connections_share_a_map(db: Connection, connect: Callable[[], Connection]) -> None:
    run_id = map_over(db, [*range(2000)])
    seen: Counter[int] = Counter()

    def work(connection: Connection) -> None:
        while items := claim_items(connection, run_id, 100):
            seen.update(index for index, _, _ in items)
            complete_items(connection, run_id, [index for index, _, _ in items])

    threads = [Thread(target=work, args=(connect(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen.values()) == {1}
    assert result(db, run_id) == [10 * index for index in range(2000)]


@pytest.mark.thorough
def test_the_cost_of_an_item_does_not_grow_with_their_number(db: Connection) -> None:
    db.execute("SET synchronous_commit = off")
    define(db, "orders", {"price": []})
    say(db, "orders", "price", step_type="map")

    def execute(items: int) -> None:
        run_id = run_workflow(db, "orders", [*range(items)]).id
        while claimed := claim_items(db, run_id, 200):
            complete_items(db, run_id, [index for index, _, _ in claimed])
        assert get_run(db, run_id).status == "completed"

    assert is_linear(execute, 1000, 8, monotonic)
