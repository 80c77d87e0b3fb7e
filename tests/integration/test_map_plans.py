"""What a claim of items reads grows with what it claims, not with the map, whatever the planner believes."""

from uuid import UUID

import pytest

from tests.conftest import Connection
from tests.engine import define, run_workflow, value
from tests.integration.test_engine_maps import claim_items, complete_items, fail_items
from tests.integration.test_engine_outcomes import say
from tests.integration.test_engine_plans import rows_read

ITEMS = 1000
MOST = 80
"""Rows that a claim of one item may read: those of the item, its map and its run, some several times."""

PUT_OFF = "UPDATE pgflow.step_items SET due_at = now() + interval '1 hour', claimed_in = NULL WHERE run_id = %s"
EXTERNAL = "SELECT pgflow_prefect.bind_step('orders', 'price', 'external')"
TAKE = "SELECT * FROM pgflow_prefect.take_items('orders', 'price', 1)"


def begin(db: Connection, items: int) -> UUID:
    return run_workflow(db, "orders", [*range(items)]).id


@pytest.fixture(params=["never analyzed", "analyzed when small"])
def db_with_map_plans(request: pytest.FixtureRequest, db: Connection) -> Connection:
    """A connection whose plans were made on small maps, with or without statistics of them."""
    define(db, "orders", {"price": []})
    say(db, "orders", "price", step_type="map")
    db.execute(EXTERNAL)
    for number in range(7):  # a plan for any parameters is made at the sixth time
        run_id = begin(db, 2)
        claim_items(db, run_id, 1)
        fail_items(db, run_id, [0], "0 s")
        db.execute(TAKE)
        complete_items(db, run_id, [0, 1])
        if number == 0 and request.param == "analyzed when small":
            db.execute("ANALYZE")
    return db


def test_a_claim_does_not_read_the_items_that_are_not_due_yet(db_with_map_plans: Connection) -> None:
    db = db_with_map_plans
    run_id = begin(db, ITEMS)
    claim_items(db, run_id, ITEMS)
    db.execute(PUT_OFF, [run_id])
    assert rows_read(db, lambda: claim_items(db, run_id, 1)) < MOST
    fail_items(db, run_id, [7], "0 s")
    assert rows_read(db, lambda: claim_items(db, run_id, 1)) < MOST
    assert value(db, "SELECT attempts FROM pgflow.step_items WHERE run_id = %s AND item_index = 7", run_id) == 2


def test_an_external_worker_does_not_read_the_items_that_are_not_due_yet(db_with_map_plans: Connection) -> None:
    db = db_with_map_plans
    run_id = begin(db, ITEMS)
    claim_items(db, run_id, ITEMS)
    db.execute(PUT_OFF, [run_id])
    db.execute("UPDATE pgflow.step_states SET started_at = NULL WHERE run_id = %s", [run_id])  # so that it is offered
    assert rows_read(db, lambda: db.execute(TAKE)) < MOST
