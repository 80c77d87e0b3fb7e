"""Who gets an external map: workers of its items, or a worker that does the whole step."""

from collections.abc import Callable, Mapping
from uuid import UUID

import pytest

from tests.conftest import Connection
from tests.engine import cancel, column, complete, define, get_state, reopen, run_workflow
from tests.integration.test_engine_maps import claim_items, complete_items, fail_items
from tests.integration.test_engine_outcomes import say
from tests.integration.test_external_claims import bind, claim_for_prefect, claim_outside, take


@pytest.fixture
def run_id(db: Connection) -> UUID:
    """A run of an external map of five items, which no Prefect worker has claimed."""
    define(db, "orders", {"price": []})
    say(db, "orders", "price", step_type="map")
    bind(db, "orders", "price", "external")
    return run_workflow(db, "orders", [*range(5)]).id


def take_items(db: Connection, wanted: int, lease: str | None = None) -> list[object]:
    statement = "SELECT item_index FROM pgflow_prefect.take_items('orders', NULL, %s, %s::interval)"
    return column(db, statement, wanted, lease)


def take_whole(db: Connection) -> object:
    return take(db, "orders", "price", wanted=9)


def test_workers_take_all_items_of_a_map_that_no_prefect_worker_has_claimed(db: Connection, run_id: UUID) -> None:
    assert [take_items(db, 2) for _ in range(4)] == [[0, 1], [2, 3], [4], []]
    complete_items(db, run_id, range(5))
    assert get_state(db, run_id, "price").step_result == [0, 10, 20, 30, 40]


def test_workers_take_items_again_after_their_lease_or_pause(db: Connection, run_id: UUID) -> None:
    assert take_items(db, 9, "1 hour") == [0, 1, 2, 3, 4]
    assert take_items(db, 9) == []
    fail_items(db, run_id, [3], "0 s")
    assert take_items(db, 9) == [3]
    db.execute("UPDATE pgflow.step_items SET due_at = 'epoch' WHERE item_index = 1")  # its hour is over
    assert take_items(db, 9) == [1]


def test_workers_take_all_items_that_a_reopened_run_misses(db: Connection, run_id: UUID) -> None:
    bind(db, "orders", "price", None)
    claim_for_prefect(db, run_id, "price")
    claim_items(db, run_id, 2)
    complete_items(db, run_id, [0])
    cancel(db, run_id)
    bind(db, "orders", "price", "external")
    reopen(db, run_id)
    assert [take_items(db, 2) for _ in range(3)] == [[1, 2], [3, 4], []]


def test_a_map_that_prefect_has_begun_stays_with_prefect(db: Connection, run_id: UUID) -> None:
    bind(db, "orders", "price", None)
    claim_for_prefect(db, run_id, "price")
    claim_items(db, run_id, 2)
    bind(db, "orders", "price", "external")
    assert take_items(db, 9) == []


def test_a_map_that_a_worker_does_as_a_whole_is_not_given_item_by_item(db: Connection, run_id: UUID) -> None:
    assert claim_outside(db, run_id, "price", "1 hour")
    assert take_items(db, 9) == []
    complete(db, run_id, "price", [7])
    assert get_state(db, run_id, "price").step_result == [7]


BEGUN: Mapping[str, Callable[[Connection, UUID], object]] = {
    "taken": lambda db, _: take_items(db, 1),
    "taken to its last item": lambda db, _: take_items(db, 5),
    "reported without a claim": lambda db, run_id: complete_items(db, run_id, [3]),
}


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("begun", BEGUN)
def test_a_map_whose_items_have_begun_is_not_given_as_a_whole(
    db: Connection, run_id: UUID, begun: str, waits: bool
) -> None:
    if waits:  # an owner waits for the workers
        claim_for_prefect(db, run_id, "price")
    BEGUN[begun](db, run_id)
    assert take_whole(db) == []
    assert claim_outside(db, run_id, "price") is None
    complete_items(db, run_id, range(5))
    assert get_state(db, run_id, "price").step_result == [0, 10, 20, 30, 40]


def test_a_map_none_of_whose_items_has_begun_is_given_as_a_whole(db: Connection, run_id: UUID) -> None:
    assert take_whole(db) == [(run_id, "price")]
    assert take_items(db, 9) == []
