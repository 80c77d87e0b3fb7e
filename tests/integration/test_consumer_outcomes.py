"""Queue workers that skip their step, or take branches."""

import json
from uuid import UUID

import pytest

from pgflow_prefect import Branch, Skip
from pgflow_prefect.consumer import perform
from tests.conftest import Connection
from tests.engine import define, get_state, run_workflow

pytestmark = pytest.mark.anyio


def hand_over(db: Connection) -> tuple[UUID, str]:
    """Return a run whose step `a` waits on a queue, and the message of it."""
    define(db, "w", {"a": [], "b": ["a"], "c": ["a"]})
    run_id = run_workflow(db, "w", {}).id
    db.execute(
        "SELECT pgflow_prefect.claim_step(%s, 'a', 0, 0, gen_random_uuid(), NULL, true, 'queue', false, "
        "'queue pgqueuer:mails')",
        [run_id],
    )
    message = {"run_id": str(run_id), "workflow_slug": "w", "step_slug": "a", "attempt": 1, "idempotency_key": "key"}
    return run_id, json.dumps(message | {"input": {}})


async def test_a_queue_worker_skips_its_step(db: Connection, dsn: str) -> None:
    run_id, message = hand_over(db)

    def work(given: object) -> None:
        raise Skip("no mail today")

    await perform(message, work, dsn)
    state = get_state(db, run_id, "a")
    assert (state.status, state.skip_reason, state.skip_note) == ("completed", "requested", "no mail today")
    assert get_state(db, run_id, "b").skip_reason == "dependency_skipped"


async def test_a_queue_worker_takes_a_branch(db: Connection, dsn: str) -> None:
    run_id, message = hand_over(db)
    await perform(message, lambda given: Branch("b", result=2), dsn)
    assert get_state(db, run_id, "a").step_result == 2
    assert get_state(db, run_id, "b").status == "pending"
    assert get_state(db, run_id, "c").skip_reason == "branch_not_taken"


async def test_a_branch_that_there_is_not_fails_the_step(db: Connection, dsn: str) -> None:
    run_id, message = hand_over(db)
    await perform(message, lambda given: Branch(["b", "d"]), dsn)
    state = get_state(db, run_id, "a")
    assert state.status == "failed"
    assert 'take the branch "d"' in str(state.error_message)
