"""claim_step: what the process that executes a step is told, and when it is refused."""

import pytest

from tests.conftest import Connection
from tests.engine import (
    CHAIN,
    NOT_READY,
    Claim,
    cancel,
    claim,
    complete,
    define,
    fail,
    finish,
    get_state,
    one,
    refused,
    run_workflow,
    start_run,
    take,
)

JOIN = {"a": [], "b": [], "join": ["a", "b"]}


def test_a_claim_gives_the_payload_and_counts_the_attempt(db: Connection) -> None:
    define(db, "chain", CHAIN)
    run = run_workflow(db, "chain", {"key": "value"})
    assert get_state(db, run.id, "a").started_at is None
    assert claim(db, run.id, "a") == Claim("pending", 1, None, {"key": "value"}, {})
    first = get_state(db, run.id, "a")
    assert (first.status, first.attempts) == ("pending", 1)
    assert claim(db, run.id, "a").attempt == 2
    second = get_state(db, run.id, "a")
    assert first.started_at is not None
    assert second.started_at is not None
    assert second.started_at > first.started_at


def test_a_claim_gives_the_results_of_all_direct_upstreams(db: Connection) -> None:
    run_id = start_run(db, "deep", JOIN | {"last": ["join"]})
    complete(db, run_id, "a", [1])
    complete(db, run_id, "b", None)
    assert claim(db, run_id, "join").upstream_results == {"a": [1], "b": None}
    complete(db, run_id, "join", "joined")
    assert claim(db, run_id, "last").upstream_results == {"join": "joined"}


@pytest.mark.parametrize(
    ("wanted", "given"), [([], {}), (["a"], {"a": 1}), (["a", "b"], {"a": 1, "b": 2}), (["z"], {})]
)
def test_a_claim_gives_only_the_results_that_it_asks_for(
    db: Connection, wanted: list[str], given: dict[str, int]
) -> None:
    run_id = start_run(db, "join", JOIN)
    complete(db, run_id, "a", 1)
    complete(db, run_id, "b", 2)
    claimed = one(db, Claim, "SELECT * FROM pgflow.claim_step(%s, 'join', NULL, %s, false)", run_id, wanted)
    assert (claimed.payload, claimed.upstream_results) == (None, given)


def test_a_completed_step_returns_its_stored_result_and_counts_nothing(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    claim(db, run_id, "a")
    complete(db, run_id, "a", {"stored": True})
    assert claim(db, run_id, "a") == Claim("completed", 1, {"stored": True}, None, None)
    assert get_state(db, run_id, "a").attempts == 1


def test_a_step_that_is_not_started_cannot_be_claimed(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    with refused(NOT_READY, "can't be claimed: it has not been started"):
        claim(db, run_id, "b")


def test_nothing_of_a_failed_run_can_be_claimed(db: Connection) -> None:
    run_id = start_run(db, "join", JOIN)
    fail(db, run_id, "a")
    for step in ("a", "b"):
        with refused(NOT_READY, f"""step "{step}" can't be claimed: run {run_id} is failed"""):
            claim(db, run_id, step)
    assert get_state(db, run_id, "b").attempts == 0


def test_nothing_of_a_completed_or_cancelled_run_can_be_claimed(db: Connection) -> None:
    completed = start_run(db, "chain", CHAIN)
    finish(db, completed)
    cancelled = cancel(db, run_workflow(db, "chain").id)
    with refused(NOT_READY, "is completed"):
        claim(db, completed, "a")
    with refused(NOT_READY, "is failed"):
        claim(db, cancelled.id, "a")


def test_a_step_that_failed_by_hand_in_a_pending_run_cannot_be_claimed(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    db.execute("UPDATE pgflow.step_states SET status = 'failed'")
    with refused(NOT_READY, "can't be claimed: it has failed"):
        claim(db, run_id, "a")


def test_a_claim_of_a_stale_epoch_is_sent_away(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    old, new = take(db, run_id), take(db, run_id)
    with refused(NOT_READY, f"can't be claimed in epoch {old}: the run is in epoch {new}") as caught:
        claim(db, run_id, "a", epoch=old)
    assert caught.value.diag.constraint_name == "runs_epoch"
    assert get_state(db, run_id, "a").attempts == 0
    assert claim(db, run_id, "a", epoch=new).attempt == 1


def test_a_claim_without_an_epoch_needs_no_owner(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    take(db, run_id)
    assert claim(db, run_id, "a").attempt == 1
