"""A run's steps through the store: claimed, completed, failed, and refused if it comes late."""

from uuid import UUID, uuid4

import pytest

from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import (
    PgflowPrefectError,
    ResultInvalidError,
    RunNotPendingError,
    SupersededError,
    UsageError,
)
from pgflow_prefect.models import Claim, ClaimRequest, Completion, Report, Status, StepState, TaskKey
from pgflow_prefect.raw_json import RawJson
from tests.conftest import Connection
from tests.engine import CHAIN, DIAMOND, define
from tests.json_values import decode

pytestmark = pytest.mark.anyio

FLOW_RUN, TASK_RUN = uuid4(), uuid4()


async def start(store: Store, workflow: str = "chain", payload: str = '{"n": 1}') -> tuple[UUID, int]:
    """Start a run, take it, and return its id and epoch."""
    epoch = await store.create_run(workflow, payload, run_id := uuid4(), FLOW_RUN)
    assert epoch is not None
    return run_id, epoch


async def claim(
    store: Store, run_id: UUID, step: str, epoch: int, *, upstream: list[str] | None = None, with_payload: bool = True
) -> Claim:
    return await store.claim_step(run_id, epoch, ClaimRequest(TaskKey(step), TASK_RUN, upstream, with_payload))


async def complete(store: Store, run_id: UUID, step: str, result: str, epoch: int, attempt: int = 1) -> Report:
    return await store.complete_step(run_id, epoch, Completion(TaskKey(step), result, attempt, TASK_RUN))


async def fail(store: Store, run_id: UUID, step: str, epoch: int, attempt: int = 1) -> Report:
    return await store.fail_step(
        run_id, TaskKey(step), "broken", state_name="Failed", epoch=epoch, attempt=attempt, task_run_id=TASK_RUN
    )


async def do(store: Store, run_id: UUID, step: str, epoch: int, result: str = "null") -> None:
    """Claim a step and complete it."""
    claimed = await claim(store, run_id, step, epoch)
    assert await complete(store, run_id, step, result, epoch, claimed.attempt) == Report(
        status=Status.COMPLETED, error_message=None
    )


async def read_states(store: Store, run_id: UUID) -> dict[str, StepState]:
    return {state.step_slug: state for state in await store.list_step_states(run_id)}


async def test_a_run_step_by_step(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id, epoch = await start(store)
    pending = Claim(status=Status.PENDING, attempt=1, payload=RawJson('{"n": 1}'), upstream_results=RawJson("{}"))
    assert await claim(store, run_id, "a", epoch) == pending
    assert (await read_states(store, run_id))["a"].task_state == "Running"
    await complete(store, run_id, "a", '{"rows": [1, 2]}', epoch)
    claimed = await claim(store, run_id, "b", epoch)
    assert decode(claimed.upstream_results) == {"a": {"rows": [1, 2]}}
    await complete(store, run_id, "b", "null", epoch)
    await do(store, run_id, "c", epoch, '"end"')

    run = await store.read_run(run_id)
    assert (run.status, run.remaining) == (Status.COMPLETED, 0)
    assert run.finished_at is not None
    states = await read_states(store, run_id)
    assert list(states) == ["a", "b", "c"]
    results: list[object] = [{"rows": [1, 2]}, None, "end"]
    assert [decode(state.step_result) for state in states.values()] == results
    for state in states.values():
        assert (state.status, state.attempts, state.task_state) == (Status.COMPLETED, 1, "Completed")
        assert state.created_at is not None
        assert state.started_at is not None
        assert state.finished_at is not None
    results_by_slug = await store.read_results(run_id, ["c", "b", "unknown"])
    assert {slug: result.text for slug, result in results_by_slug.items()} == {"b": "null", "c": '"end"'}
    end = await store.read_end(run_id, ["c", "b", "unknown"])
    assert (end.status, end.epoch, end.error_message) == (Status.COMPLETED, epoch, None)
    assert end.results == {"b": None, "c": "end"}


async def test_a_run_that_is_not_completed_ends_without_results(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id, epoch = await start(store)
    await do(store, run_id, "a", epoch)
    pending = await store.read_end(run_id, ["a"])
    assert (pending.status, pending.results) == (Status.PENDING, {})
    await claim(store, run_id, "b", epoch)
    await fail(store, run_id, "b", epoch)
    failed = await store.read_end(run_id, ["a"])
    assert (failed.status, failed.is_cancelled, failed.results) == (Status.FAILED, False, {})
    assert failed.error_message


async def test_a_claim_brings_what_was_asked_for_only(store: Store, db: Connection) -> None:
    define(db, "diamond", DIAMOND)
    run_id, epoch = await start(store, "diamond")
    for step in "abc":
        await do(store, run_id, step, epoch, f'"{step}"')
    assert decode((await claim(store, run_id, "d", epoch)).upstream_results) == {"b": "b", "c": "c"}
    assert decode((await claim(store, run_id, "d", epoch, upstream=["c"])).upstream_results) == {"c": "c"}
    nothing = await claim(store, run_id, "d", epoch, upstream=[], with_payload=False)
    assert (decode(nothing.upstream_results), nothing.payload, nothing.attempt) == ({}, None, 3)


async def test_a_claim_of_a_completed_step_says_so(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id, epoch = await start(store)
    await do(store, run_id, "a", epoch)
    claimed = await claim(store, run_id, "a", epoch)
    assert (claimed.status, claimed.attempt, claimed.upstream_results) == (Status.COMPLETED, 1, None)
    assert (await read_states(store, run_id))["a"].task_state == "Cached"


async def test_the_first_report_wins(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id, epoch = await start(store)
    await do(store, run_id, "a", epoch, "1")
    assert (await fail(store, run_id, "a", epoch)).status is Status.COMPLETED
    assert (await complete(store, run_id, "a", "2", epoch)).status is Status.COMPLETED
    assert await store.read_results(run_id, ["a"]) == {"a": RawJson("1")}


async def test_a_failed_step_fails_its_run_and_both_say_why(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id, epoch = await start(store)
    await claim(store, run_id, "a", epoch)
    assert await fail(store, run_id, "a", epoch) == Report(status=Status.FAILED, error_message="broken")
    run = await store.read_run(run_id)
    assert (run.status, run.error_message) == (Status.FAILED, 'step "a" failed: broken')
    state = (await read_states(store, run_id))["a"]
    assert (state.status, state.error_message, state.task_state) == (Status.FAILED, "broken", "Failed")


async def test_a_process_that_lost_the_run_claims_and_reports_nothing_more(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id, stale = await start(store)
    await claim(store, run_id, "a", stale)
    epoch = await store.take_run(run_id, uuid4(), force=True)
    assert epoch is not None
    with pytest.raises(SupersededError, match=f"run {run_id} was taken over") as refused:
        await claim(store, run_id, "a", stale)
    assert refused.value.run_id == run_id
    assert (await complete(store, run_id, "a", "1", stale)).status is Status.PENDING
    assert (await fail(store, run_id, "a", stale)).status is Status.PENDING
    assert (await claim(store, run_id, "a", epoch)).attempt == 2
    assert (await complete(store, run_id, "a", "1", epoch, attempt=1)).status is Status.PENDING, "of an old attempt"
    assert (await complete(store, run_id, "a", "2", epoch, attempt=2)).status is Status.COMPLETED


async def test_nothing_of_a_run_that_has_ended_is_taken_or_claimed(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id, epoch = await start(store)
    await store.cancel_run(run_id, "enough")
    assert await store.take_run(run_id, FLOW_RUN) is None
    with pytest.raises(RunNotPendingError, match=r"can't be claimed: run .* is failed"):
        await claim(store, run_id, "a", epoch)
    run = await store.read_run(run_id)
    assert (run.status, run.error_message) == (Status.FAILED, "enough")


async def test_a_step_that_has_not_started_can_t_be_claimed_or_completed(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id, epoch = await start(store)
    with pytest.raises(PgflowPrefectError, match=r"step \"b\" .* can't be claimed: it has not been started"):
        await claim(store, run_id, "b", epoch)
    with pytest.raises(PgflowPrefectError, match=r"step \"b\" .* can't be completed: it has not been started"):
        await complete(store, run_id, "b", "1", epoch)
    with pytest.raises(UsageError, match='unknown step "x"'):
        await claim(store, run_id, "x", epoch)


async def test_a_reopened_run_keeps_what_is_completed(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id, epoch = await start(store)
    await do(store, run_id, "a", epoch, "1")
    await claim(store, run_id, "b", epoch)
    await fail(store, run_id, "b", epoch)
    await store.reopen_run(run_id)
    run = await store.read_run(run_id)
    assert (run.status, run.epoch, run.error_message, run.remaining) == (Status.PENDING, epoch + 1, None, 2)
    assert {slug: state.status.value for slug, state in (await read_states(store, run_id)).items()} == {
        "a": "completed",
        "b": "pending",
    }
    await store.reopen_run(run_id)
    assert (await store.read_run(run_id)).epoch == epoch + 1, "a pending run stays as it is"


async def test_repairing_a_run_starts_what_is_ready(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id, _ = await start(store)
    db.execute("UPDATE pgflow.step_states SET status = 'completed' WHERE run_id = %s", [run_id])
    await store.repair_run(run_id)
    assert list(await read_states(store, run_id)) == ["a", "b"]
    assert (await store.read_run(run_id)).remaining == 2


async def test_a_retry_s_state_is_noted_for_the_task_run_that_has_the_step(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id, epoch = await start(store)
    await claim(store, run_id, "a", epoch)
    await store.note_state(
        run_id, TaskKey("a"), task_run_id=TASK_RUN, state_name="AwaitingRetry", message="try 1 failed"
    )
    assert (await read_states(store, run_id))["a"].task_state == "AwaitingRetry"
    await store.note_state(run_id, TaskKey("a"), task_run_id=uuid4(), state_name="Late", message="of another")
    assert (await read_states(store, run_id))["a"].task_state == "AwaitingRetry"


@pytest.mark.parametrize("result", ['"\\u0000"', '"\ud800"', '{"\\ud800": 1}', "NaN", "", "{"])
async def test_a_result_that_jsonb_can_t_hold_is_refused_and_the_step_is_still_pending(
    store: Store, db: Connection, result: str
) -> None:
    define(db, "chain", CHAIN)
    run_id, epoch = await start(store)
    await claim(store, run_id, "a", epoch)
    with pytest.raises(ResultInvalidError):
        await complete(store, run_id, "a", result, epoch)
    assert (await read_states(store, run_id))["a"].status is Status.PENDING
    assert (await complete(store, run_id, "a", '"good"', epoch)).status is Status.COMPLETED
