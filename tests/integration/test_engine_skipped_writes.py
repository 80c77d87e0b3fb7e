"""A trigger that skips a write of the engine without an error: the caller is told."""

from collections.abc import Callable
from uuid import UUID

import pytest

from tests.conftest import Connection
from tests.engine import (
    CHAIN,
    cancel,
    claim,
    column,
    complete,
    define,
    fail,
    finish,
    get_run,
    get_state,
    insert_run,
    refused,
    reopen,
    repair,
    run_workflow,
    start_run,
    start_step,
    statuses,
    take,
)
from tests.integration.test_engine_maps import claim_items, complete_items, fail_items, map_over

SKIPPED = "09000"


def skip(db: Connection, table: str, event: str, returned: str, condition: str = "true") -> None:
    """Have a trigger skip all writes of a kind."""
    db.execute(
        f"""CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF {condition} THEN RETURN {returned}; END IF; RETURN NEW; END $$;
            CREATE TRIGGER skip BEFORE {event} ON pgflow.{table} FOR EACH ROW EXECUTE FUNCTION skip()""".encode()
    )


TRANSITIONS: dict[str, tuple[str, Callable[[Connection, UUID], object]]] = {
    "claim_step": ("step_states", lambda db, run_id: claim(db, run_id, "b")),
    "complete_step": ("step_states", lambda db, run_id: complete(db, run_id, "a")),
    "complete_step's count": ("runs", lambda db, run_id: complete(db, run_id, "a")),
    "fail_step": ("step_states", lambda db, run_id: fail(db, run_id, "a")),
    "fail_step's run": ("runs", lambda db, run_id: fail(db, run_id, "a")),
    "cancel_run": ("runs", cancel),
    "cancel_run's steps": ("step_states", cancel),
    "take_run": ("runs", take),
}


@pytest.mark.parametrize("returned", ["NULL", "OLD"])
@pytest.mark.parametrize("transition", TRANSITIONS)
def test_an_update_that_a_trigger_skips_is_an_error(db: Connection, transition: str, returned: str) -> None:
    table, act = TRANSITIONS[transition]
    run_id = start_run(db, "wide", {"a": [], "b": []})
    claim(db, run_id, "a")
    skip(db, table, "UPDATE", returned)
    before = get_run(db, run_id), get_state(db, run_id, "a"), get_state(db, run_id, "b")
    with refused(SKIPPED, f"a trigger or rule on pgflow.{table} skipped") as caught:
        act(db, run_id)
    assert caught.value.diag.message_hint == "A BEFORE trigger has to RETURN NEW."
    assert (get_run(db, run_id), get_state(db, run_id, "a"), get_state(db, run_id, "b")) == before
    db.execute("DROP TRIGGER skip ON pgflow." + table)
    act(db, run_id)


ITEM_TRANSITIONS: dict[str, tuple[str, str | None, Callable[[Connection, UUID], object]]] = {
    "a claim": ("step_items", None, lambda db, run_id: claim_items(db, run_id, 1)),
    "a claim with a lease": ("step_items", None, lambda db, run_id: claim_items(db, run_id, 1, lease="1 hour")),
    "a claim of a due item": ("step_items", "0 s", lambda db, run_id: claim_items(db, run_id, 1)),
    "a claim's cursor": ("step_maps", None, lambda db, run_id: claim_items(db, run_id, 1)),
    "a claim's epoch": ("step_maps", "0 s", lambda db, run_id: claim_items(db, run_id, 1, epoch=1)),
    "a completion": ("step_items", None, lambda db, run_id: complete_items(db, run_id, [0])),
    "a failure": ("step_items", None, lambda db, run_id: fail_items(db, run_id, [0])),
    "a retry": ("step_items", None, lambda db, run_id: fail_items(db, run_id, [0], "1 hour")),
    "a report on an item that was not claimed": (
        "step_items",
        None,
        lambda db, run_id: complete_items(db, run_id, [3]),
    ),
    "a completion's count": ("step_maps", None, lambda db, run_id: complete_items(db, run_id, [0])),
    "a failure's count": ("step_maps", None, lambda db, run_id: fail_items(db, run_id, [0])),
}


@pytest.mark.parametrize("returned", ["NULL", "OLD"])
@pytest.mark.parametrize("transition", ITEM_TRANSITIONS)
def test_an_update_of_a_map_or_its_items_that_a_trigger_skips_is_an_error(
    db: Connection, transition: str, returned: str
) -> None:
    table, again_in, act = ITEM_TRANSITIONS[transition]
    run_id = map_over(db, [*range(4)])
    take(db, run_id)
    claim_items(db, run_id, 1)
    if again_in is not None:
        fail_items(db, run_id, [0], again_in)
    skip(db, table, "UPDATE", returned)
    before = rows_of_map(db)
    with refused(SKIPPED, f"a trigger or rule on pgflow.{table} skipped") as caught:
        act(db, run_id)
    assert caught.value.diag.message_hint == "A BEFORE trigger has to RETURN NEW."
    assert rows_of_map(db) == before
    db.execute("DROP TRIGGER skip ON pgflow." + table)
    assert act(db, run_id)
    assert rows_of_map(db) != before


def claim_anew(db: Connection, run_id: UUID) -> None:
    claim_items(db, run_id, 1, epoch=take(db, run_id))


def release(db: Connection, run_id: UUID) -> None:
    db.execute("SELECT pgflow.release_items(m, 1, '{}') FROM pgflow.step_maps m WHERE m.run_id = %s", [run_id])


def fail_and_claim(db: Connection, run_id: UUID) -> None:
    """Fail an item by hand that no process has claimed, and claim all that is left."""
    fail_items(db, run_id, [3], "0 s")
    claim_items(db, run_id, 4, epoch=1)


def fail_and_reopen(db: Connection, run_id: UUID) -> None:
    fail_items(db, run_id, [0])
    reopen(db, run_id)


FRESH = "OLD.due_at IS NOT NULL AND NEW.due_at IS NULL"
RELEASES: dict[str, tuple[str, str, Callable[[Connection, UUID], object]]] = {
    "the next owner's first claim": ("step_items", "OLD.claimed_in IS NOT NULL AND NEW.claimed_in IS NULL", claim_anew),
    "a release by the owner": ("step_items", "OLD.claimed_in IS NOT NULL AND NEW.claimed_in IS NULL", release),
    "a claim of an item that failed before any claim": ("step_items", FRESH, fail_and_claim),
    "a reopening of failed items": ("step_items", "OLD.status = 'failed'", fail_and_reopen),
    "a reopening of items under way": ("step_items", "OLD.status = NEW.status", fail_and_reopen),
    "a reopening's count": ("step_maps", "OLD.failed > 0", fail_and_reopen),
}


@pytest.mark.parametrize("returned", ["NULL", "OLD"])
@pytest.mark.parametrize("transition", RELEASES)
def test_a_release_of_items_that_a_trigger_skips_is_an_error(db: Connection, transition: str, returned: str) -> None:
    table, condition, act = RELEASES[transition]
    run_id = map_over(db, [*range(4)])
    claim_items(db, run_id, 2, epoch=take(db, run_id))
    skip(db, table, "UPDATE", returned, condition)
    before = get_run(db, run_id), rows_of_map(db)
    with refused(SKIPPED, f"a trigger or rule on pgflow.{table} skipped") as caught, db.transaction():
        act(db, run_id)
    assert caught.value.diag.message_hint == "A BEFORE trigger has to RETURN NEW."
    assert (get_run(db, run_id), rows_of_map(db)) == before
    db.execute("DROP TRIGGER skip ON pgflow." + table)
    act(db, run_id)
    assert rows_of_map(db) != before[1]


def rows_of_map(db: Connection) -> list[object]:
    return column(
        db,
        "SELECT to_jsonb(i) FROM pgflow.step_items i UNION ALL SELECT to_jsonb(m) FROM pgflow.step_maps m ORDER BY 1",
    )


def test_a_late_report_on_an_item_is_no_error_where_a_trigger_skips_updates(db: Connection) -> None:
    run_id = map_over(db, [*range(4)])
    claim_items(db, run_id, 1)
    complete_items(db, run_id, [0])
    claim_items(db, run_id, 1)
    skip(db, "step_items", "UPDATE", "NULL")
    assert complete_items(db, run_id, [0]) == 0, "it has ended"
    assert complete_items(db, run_id, [1], attempts=[7]) == 0, "this attempt is over"
    assert complete_items(db, run_id, [2], attempts=[1]) == 0, "it was never claimed"
    assert complete_items(db, run_id, [9]) == 0, "there is no such item"


def test_a_late_report_is_no_error_where_a_trigger_skips_updates(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    claim(db, run_id, "a")
    take(db, run_id)
    skip(db, "step_states", "UPDATE", "NULL")
    assert complete(db, run_id, "a", epoch=0).status == "pending", "another owner has the run"
    assert complete(db, run_id, "a", attempt=7).status == "pending", "this attempt is over"
    assert fail(db, run_id, "a", epoch=0).status == "pending"


def test_a_run_that_a_trigger_does_not_store_is_an_error(db: Connection) -> None:
    define(db, "chain", CHAIN)
    skip(db, "runs", "INSERT", "NULL")
    with refused(SKIPPED, 'the run of workflow "chain" was not stored'):
        run_workflow(db, "chain")


@pytest.mark.parametrize("step", ["a", "b"])
def test_a_root_step_that_a_trigger_does_not_store_is_an_error(db: Connection, step: str) -> None:
    define(db, "wide", {"a": [], "b": []})
    skip(db, "step_states", "INSERT", "NULL", f"NEW.step_slug = '{step}'")
    with refused(SKIPPED, "a step of run .* was not started"):
        run_workflow(db, "wide")
    inserted = insert_run(db, "wide")
    with refused(SKIPPED, "a step of run .* was not started"):
        repair(db, inserted)


def test_a_downstream_step_that_a_trigger_does_not_store_is_an_error(db: Connection) -> None:
    run_id = start_run(db, "fan", {"a": [], "b": ["a"], "c": ["a"]})
    skip(db, "step_states", "INSERT", "NULL", "NEW.step_slug = 'c'")
    with refused(SKIPPED, f'step "c" of run {run_id} was not started'):
        complete(db, run_id, "a")
    assert statuses(db, run_id) == {"a": "pending"}


def test_start_step_says_that_a_trigger_skipped_it(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    db.execute("DELETE FROM pgflow.step_states")
    skip(db, "step_states", "INSERT", "NULL")
    with refused(SKIPPED, 'step "a" .* was not started'):
        start_step(db, run_id, "a")


def test_a_downstream_step_that_was_started_by_hand_is_no_error(db: Connection) -> None:
    run_id = start_run(db, "fan", {"a": [], "b": ["a"], "c": ["a"]})
    db.execute("INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug) VALUES ('fan', %s, 'c')", [run_id])
    complete(db, run_id, "a")
    assert finish(db, run_id) == ["b", "c"]
    assert get_run(db, run_id).status == "completed"


@pytest.mark.parametrize("table", ["definitions", "definition_steps"])
def test_a_snapshot_that_a_trigger_skips_is_an_error(db: Connection, table: str) -> None:
    define(db, "chain", CHAIN)
    skip(db, table, "INSERT", "NULL")
    with refused(SKIPPED, 'the snapshot of workflow "chain" was not stored'):
        run_workflow(db, "chain")
