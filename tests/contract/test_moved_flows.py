"""Flows of the released pgflow that were moved to Prefect: who may write for their runs, and what pgflow decides."""

from collections.abc import AsyncIterator
from typing import LiteralString
from uuid import UUID, uuid4

import pytest
from psycopg.types.json import Jsonb
from pydantic import SecretStr

from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.errors import PgflowPrefectError, RunHeldError, SupersededError, UsageError
from pgflow_prefect.models import (
    AwaitedStep,
    Claim,
    ClaimRequest,
    Completion,
    Doing,
    ItemReport,
    Outcome,
    Report,
    Status,
    TaskKey,
)
from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.settings import Settings
from tests.contract.worlds import ReleasedWorld
from tests.engine import value
from tests.json_values import decode
from tests.released_lab import read_objects

pytestmark = pytest.mark.anyio

CHAIN = {"first": [], "second": ["first"]}
FUNCTIONS: LiteralString = """
    CREATE TABLE IF NOT EXISTS pgflow.worker_functions (
        function_name text PRIMARY KEY, enabled boolean NOT NULL DEFAULT true, updated_at timestamptz DEFAULT now());
    INSERT INTO pgflow.worker_functions (function_name) VALUES ('edge'), ('other')
"""
AGE: LiteralString = """
    UPDATE pgflow.step_tasks SET queued_at = now() - interval '2 days', started_at = now() - interval '1 day'
"""
GUARD = "SELECT count(*) FROM pg_trigger WHERE tgname = 'pgflow_prefect_keep_claimed'"


@pytest.fixture
async def store(released: ReleasedWorld) -> AsyncIterator[Store]:
    async with open_store(Settings(dsn=SecretStr(released.dsn)), size=2, executes_moved=True) as opened:
        yield opened


def request(step: str, **other: object) -> ClaimRequest:
    asked = ClaimRequest(TaskKey(step), uuid4(), upstream=None, with_payload=True)
    return asked._replace(**other)  # type: ignore[arg-type]


async def start(store: Store, released: ReleasedWorld, *, attempts: int = 1, payload: object = None) -> UUID:
    """Define a chain, move it, and start a run."""
    released.flows.define("chain", CHAIN, attempts=attempts)
    await store.move_flow("chain")
    return released.flows.start("chain", payload or {"n": 1})


async def take(store: Store, run_id: UUID, *, force: bool = False) -> int:
    epoch = await store.take_run(run_id, uuid4(), force=force)
    assert epoch is not None
    return epoch


async def complete(store: Store, run_id: UUID, epoch: int, step: str, claim: Claim, result: str = '"done"') -> Report:
    return await store.complete_step(run_id, epoch, Completion(TaskKey(step), result, claim.attempt, uuid4()))


async def fail(store: Store, run_id: UUID, epoch: int, step: str, claim: Claim) -> Report:
    fence = {"epoch": epoch, "attempt": claim.attempt, "task_run_id": uuid4()}
    return await store.fail_step(run_id, TaskKey(step), "broken", state_name="Failed", **fence)


def read_task(released: ReleasedWorld, run_id: UUID, step: str) -> tuple[object, ...]:
    row = released.db.execute(
        "SELECT status, attempts_count FROM pgflow.step_tasks WHERE run_id = %s AND step_slug = %s", [run_id, step]
    ).fetchone()
    assert row is not None
    return row


# Moving


async def test_a_flow_is_moved_by_the_switches_of_pgflow_and_back(store: Store, released: ReleasedWorld) -> None:
    released.db.execute(FUNCTIONS)
    released.flows.define("chain", CHAIN)
    released.flows.claim("chain")  # an Edge worker registers itself
    on = "SELECT array_agg(function_name::text ORDER BY function_name) FROM pgflow.worker_functions WHERE enabled"
    live = "SELECT count(*) FROM pgflow.workers WHERE function_name = 'edge' AND deprecated_at IS NULL"
    moved = await store.move_flow("chain")
    assert (moved.changed, moved.workers, moved.functions) == (True, 1, ("edge",))
    assert (value(released.db, on), value(released.db, live)) == (["other"], 0)
    assert [*await store.list_moved_flows()] == ["chain"]
    assert not (await store.move_flow("chain")).changed, "it is there already"
    back = await store.move_flow_back("chain")
    assert (back.changed, back.functions) == (True, ("edge",))
    assert value(released.db, on) == ["edge", "other"]
    assert await store.list_moved_flows() == {}
    assert not (await store.move_flow_back("chain")).changed


async def test_a_function_that_works_on_another_flow_too_keeps_its_flow(store: Store, released: ReleasedWorld) -> None:
    released.db.execute(FUNCTIONS)
    for slug in ("chain", "photos"):
        released.flows.define(slug, CHAIN)
        released.flows.claim(slug)
    with pytest.raises(PgflowPrefectError, match='"edge" works on flow "photos", too'):
        await store.move_flow("chain")
    assert await store.list_moved_flows() == {}


async def test_a_version_without_the_switch_is_refused_with_a_sentence(store: Store, released: ReleasedWorld) -> None:
    released.flows.define("chain", CHAIN)
    released.db.execute("ALTER TABLE pgflow.workers DROP COLUMN deprecated_at CASCADE")
    with pytest.raises(PgflowPrefectError, match="has no switch that stops them"):
        await store.move_flow("chain")


async def test_an_edge_worker_that_begins_after_the_move_is_told_to_stop(store: Store, released: ReleasedWorld) -> None:
    await start(store, released)
    released.flows.claim("chain")
    await store.take_runs(["chain"], 1)
    live = "SELECT count(*) FROM pgflow.workers WHERE function_name = 'edge' AND deprecated_at IS NULL"
    assert value(released.db, live) == 0


async def test_the_only_object_on_a_table_of_pgflow_goes_with_the_last_flow(
    store: Store, released: ReleasedWorld
) -> None:
    before = read_objects(released.db)
    for slug in ("chain", "photos"):
        released.flows.define(slug, CHAIN)
        await store.move_flow(slug)
    assert value(released.db, GUARD) == int(released.implementation.skips), "only a version that requeues needs it"
    await store.move_flow_back("chain")
    assert value(released.db, GUARD) == int(released.implementation.skips)
    await store.move_flow_back("photos")
    assert read_objects(released.db) == before


async def test_a_run_of_a_flow_that_was_not_moved_is_not_taken(store: Store, released: ReleasedWorld) -> None:
    released.flows.define("chain", CHAIN)
    run_id = released.flows.start("chain", {})
    assert await store.take_runs(["chain"], 5) == []
    with pytest.raises(PgflowPrefectError, match="own workers execute flow"):
        await store.take_run(run_id, uuid4())
    with pytest.raises(UsageError, match="bind chain --python"):
        await store.refuse_unmoved(["chain"])


# Claims and reports


async def test_a_chain_is_executed_by_the_functions_of_pgflow(store: Store, released: ReleasedWorld) -> None:
    run_id = await start(store, released)
    [taken] = await store.take_runs(["chain"], 5)
    assert (taken.run_id, taken.epoch) == (run_id, 1)
    assert await store.link_flow_run(run_id, 1, uuid4(), queued=False)
    assert await store.take_runs(["chain"], 5) == [], "it is held"
    first = await store.claim_step(run_id, 1, request("first"))
    assert (first.status, first.attempt, first.waits) == (Status.PENDING, 1, False)
    assert first.payload is not None
    assert decode(first.payload) == {"n": 1}
    assert (await complete(store, run_id, 1, "first", first, '{"a": 1}')).status is Status.COMPLETED
    second = await store.claim_step(run_id, 1, request("second"))
    assert second.upstream_results is not None
    assert decode(second.upstream_results) == {"first": {"a": 1}}
    assert (await complete(store, run_id, 1, "second", second, "2")).status is Status.COMPLETED
    end = await store.read_end(run_id, ["second"])
    assert (end.status, end.epoch, end.results) == (Status.COMPLETED, 1, {"second": 2})
    output = value(released.db, "SELECT output FROM pgflow.runs WHERE run_id = %s", run_id)
    assert output == {"second": 2}, "pgflow ended the run"
    assert value(released.db, "SELECT count(*) FROM pgmq.q_chain") == 0, "no message is left"
    assert await store.extend_leases([(run_id, 1)]) == [(run_id, 1, "completed")]


async def test_a_new_run_is_started_by_pgflow_and_held_at_once(store: Store, released: ReleasedWorld) -> None:
    await start(store, released)
    run_id = uuid4()
    assert await store.create_run("chain", '{"n": 7}', run_id, uuid4()) == 1
    assert (await store.read_run(run_id)).held == "leased"
    with pytest.raises(RunHeldError):
        await store.take_run(run_id, uuid4())
    with pytest.raises(UsageError, match="with another payload"):
        await store.create_run("chain", '{"n": 8}', run_id)


async def test_a_former_owner_changes_nothing(store: Store, released: ReleasedWorld) -> None:
    run_id = await start(store, released, attempts=3)
    epoch = await take(store, run_id)
    claim = await store.claim_step(run_id, epoch, request("first"))
    later = await take(store, run_id, force=True)
    with pytest.raises(SupersededError):
        await store.claim_step(run_id, epoch, request("first"))
    assert (await complete(store, run_id, epoch, "first", claim)).status is Status.PENDING
    assert (await fail(store, run_id, epoch, "first", claim)).retry_after is None
    assert read_task(released, run_id, "first") == ("started", 1)
    assert (await store.read_run(run_id)).stale_writes == 3
    again = await store.claim_step(run_id, later, request("first"))
    assert (again.attempt, again.waits) == (1, False), "taken over in place: no attempt is counted"
    assert (await complete(store, run_id, later, "first", again)).status is Status.COMPLETED


async def test_the_first_report_wins(store: Store, released: ReleasedWorld) -> None:
    run_id = await start(store, released)
    epoch = await take(store, run_id)
    claim = await store.claim_step(run_id, epoch, request("first"))
    await complete(store, run_id, epoch, "first", claim, "1")
    assert (await complete(store, run_id, epoch, "first", claim, "2")).status is Status.COMPLETED
    assert (await fail(store, run_id, epoch, "first", claim)).status is Status.COMPLETED
    assert await store.read_results(run_id, ["first"]) == {"first": RawJson("1")}


async def test_pgflow_decides_when_a_failed_task_is_tried_again(store: Store, released: ReleasedWorld) -> None:
    run_id = await start(store, released, attempts=2)
    released.db.execute("UPDATE pgflow.flows SET opt_base_delay = 100")
    epoch = await take(store, run_id)
    claim = await store.claim_step(run_id, epoch, request("first"))
    report = await fail(store, run_id, epoch, "first", claim)
    assert report.status is Status.PENDING
    assert report.retry_after is not None
    assert 150 < report.retry_after <= 200, "base delay * 2 ^ attempts"
    assert (await store.claim_step(run_id, epoch, request("first"))).waits, "it is not due"
    released.db.execute("UPDATE pgmq.q_chain SET vt = now()")
    second = await store.claim_step(run_id, epoch, request("first"))
    assert (second.attempt, second.waits) == (2, False)
    assert (await complete(store, run_id, epoch, "first", claim)).status is Status.PENDING, "of the former attempt"
    last = await fail(store, run_id, epoch, "first", second)
    assert (last.status, last.error_message, last.retry_after) == (Status.FAILED, "broken", None)
    run = await store.read_run(run_id)
    assert (run.status, run.error_message) == (Status.FAILED, 'step "first" failed: broken')
    assert await store.extend_leases([(run_id, epoch)]) == [(run_id, epoch, "ended")]


async def test_a_message_that_an_edge_worker_has_read_stays_with_that_worker(
    store: Store, released: ReleasedWorld
) -> None:
    run_id = await start(store, released)
    epoch = await take(store, run_id)
    released.db.execute("SELECT pgmq.read('chain', 1000, 10)")  # the first half of its poll
    assert (await store.claim_step(run_id, epoch, request("first"))).waits
    assert read_task(released, run_id, "first") == ("queued", 0)


async def test_what_an_edge_worker_has_begun_it_ends(store: Store, released: ReleasedWorld) -> None:
    released.flows.define("chain", CHAIN)
    run_id = released.flows.start("chain", {})
    [task] = released.flows.claim("chain")
    await store.move_flow("chain")
    epoch = await take(store, run_id)
    assert (await store.claim_step(run_id, epoch, request("first"))).waits
    released.flows.complete(task, 5)
    seen = await store.claim_step(run_id, epoch, request("first"))
    assert (seen.status, seen.note) == (Status.COMPLETED, "5")
    assert not (await store.claim_step(run_id, epoch, request("second"))).waits


async def test_after_a_flow_was_moved_back_its_owner_claims_no_more(store: Store, released: ReleasedWorld) -> None:
    run_id = await start(store, released)
    epoch = await take(store, run_id)
    claim = await store.claim_step(run_id, epoch, request("first"))
    await store.move_flow_back("chain")
    assert (await complete(store, run_id, epoch, "first", claim)).status is Status.COMPLETED, "it had begun this one"
    assert (await store.claim_step(run_id, epoch, request("second"))).waits
    assert released.flows.work("chain", lambda step, index: "edge") == [("second", 0)]
    assert (await store.read_run(run_id)).status is Status.COMPLETED


async def test_pgflow_never_puts_back_a_live_task_of_ours(store: Store, released: ReleasedWorld) -> None:
    if not released.implementation.skips:
        pytest.skip("this version of pgflow puts no task back")
    run_id = await start(store, released)
    epoch = await take(store, run_id)
    claim = await store.claim_step(run_id, epoch, request("first"))
    released.db.execute(AGE)
    for _ in range(5):  # it gives a task up at the fourth time
        released.db.execute("SELECT pgflow.requeue_stalled_tasks()")
    assert read_task(released, run_id, "first") == ("started", 1)
    assert value(released.db, "SELECT requeued_count FROM pgflow.step_tasks") == 0
    assert (await complete(store, run_id, epoch, "first", claim)).status is Status.COMPLETED


async def test_a_task_of_an_edge_worker_is_still_put_back(store: Store, released: ReleasedWorld) -> None:
    if not released.implementation.skips:
        pytest.skip("this version of pgflow puts no task back")
    run_id = await start(store, released)
    released.flows.claim("chain")
    released.db.execute(AGE)
    assert value(released.db, "SELECT pgflow.requeue_stalled_tasks()") == 1
    epoch = await take(store, run_id)
    assert (await store.claim_step(run_id, epoch, request("first"))).attempt == 2


async def test_where_owners_vanish_in_a_row_the_attempt_fails(store: Store, released: ReleasedWorld) -> None:
    run_id = await start(store, released, attempts=2)
    epochs = []
    for _ in range(2 * (store.lease_terms.max_recoveries + 2)):
        epoch = await store.take_run(run_id, uuid4())
        if epoch is None:
            break
        epochs.append(epoch)
        await store.claim_step(run_id, epoch, request("first"))
        released.db.execute("UPDATE pgflow_prefect.run_owners SET lease_until = 'epoch'")
        released.db.execute("UPDATE pgmq.q_chain SET vt = now()")
    assert len(epochs) == 2 * (store.lease_terms.max_recoveries + 1)
    run = await store.read_run(run_id)
    assert run.status is Status.FAILED
    assert run.error_message is not None
    assert "owners in a row have vanished" in run.error_message


async def test_a_run_that_can_not_go_on_fails_in_all_its_attempts(store: Store, released: ReleasedWorld) -> None:
    run_id = await start(store, released, attempts=3)
    [taken] = await store.take_runs(["chain"], 1)
    assert await store.fail_run(run_id, taken.epoch, "no handler fits")
    assert read_task(released, run_id, "first") == ("failed", 3)
    assert (await store.read_run(run_id)).error_message == 'step "first" failed: no handler fits'


# What pgflow has given up


async def test_a_task_that_pgflow_has_given_up_is_named_and_ended(store: Store, released: ReleasedWorld) -> None:
    if not released.implementation.skips:
        pytest.skip("this version of pgflow gives no task up")
    released.flows.define("chain", CHAIN, attempts=3)
    run_id = released.flows.start("chain", {})
    released.flows.claim("chain")
    given_up = "UPDATE pgflow.step_tasks SET permanently_stalled_at = now(), requeued_count = 3"
    released.db.execute(given_up)
    released.db.execute("SELECT pgmq.archive('chain', msg_id) FROM pgmq.q_chain")
    [ended] = await store.end_given_up_tasks(limit=5)
    assert (ended.run_id, ended.step_slug, ended.task_index, ended.run_status) == (run_id, "first", 0, "failed")
    assert await store.end_given_up_tasks(limit=5) == []
    run = await store.read_run(run_id)
    assert run.error_message is not None
    assert "given up: pgflow has put the task back 3 times" in run.error_message


# Maps


async def test_a_map_is_executed_task_by_task(store: Store, released: ReleasedWorld) -> None:
    released.flows.define("mapped", {"list": [], "resize": ["list"], "report": ["resize"]}, maps=["resize"], attempts=2)
    await store.move_flow("mapped")
    run_id = released.flows.start("mapped", {})
    epoch = await take(store, run_id)
    claim = await store.claim_step(run_id, epoch, request("list"))
    await complete(store, run_id, epoch, "list", claim, "[10, 11, 12]")
    assert not (await store.claim_step(run_id, epoch, request("resize"))).waits
    begun = await store.work_items(run_id, "resize", epoch, [], wanted=2)
    assert [(each.index, each.attempt, decode(each.item)) for each in begun.items] == [(0, 1, 10), (1, 1, 11)]
    reports = [
        ItemReport(0, 1, Doing.COMPLETE, '"a"'),
        ItemReport(1, 1, Doing.FAIL, None, "broken"),
    ]
    more = await store.work_items(run_id, "resize", epoch, reports, wanted=2)
    assert sorted((each.index, each.attempt) for each in more.items) == [(1, 2), (2, 1)], "pgflow tries it again"
    later = await take(store, run_id, force=True)
    assert not (await store.claim_step(run_id, later, request("resize"))).waits
    again = await store.work_items(run_id, "resize", later, [], wanted=5)
    assert sorted((each.index, each.attempt) for each in again.items) == [(1, 2), (2, 1)], "taken over in place"
    rest = [ItemReport(1, 2, Doing.COMPLETE, '"b"'), ItemReport(2, 1, Doing.COMPLETE, '"c"')]
    done = await store.work_items(run_id, "resize", later, rest, wanted=2)
    assert (done.report.status, done.remaining, done.items) == (Status.COMPLETED, 0, ())
    last = await store.claim_step(run_id, later, request("report"))
    assert last.upstream_results is not None
    assert decode(last.upstream_results) == {"resize": ["a", "b", "c"]}


async def test_requests_of_several_runs_share_a_statement(store: Store, released: ReleasedWorld) -> None:
    first = await start(store, released)
    second = released.flows.start("chain", {"n": 2})
    told = [
        {"do": "claim", "run_id": str(run_id), "epoch": 1, "step_slug": "first", "task_index": 0,
         "task_run_id": str(uuid4()), "with_payload": True, "bound": "python", "has_function": True}
        for run_id in sorted((first, second))
    ]  # fmt: skip
    await store.take_runs(["chain"], 2)
    row = "SELECT array_agg(outcome || ' ' || attempt) FROM pgflow_prefect.perform_tasks(%s)"
    assert value(released.db, row, Jsonb(told)) == ["done 1", "done 1"]


# What another program does


async def test_what_was_handed_over_stays_with_its_program(store: Store, released: ReleasedWorld) -> None:
    run_id = await start(store, released, attempts=2)
    epoch = await take(store, run_id)
    asked = request("first")
    claim = await store.claim_step(run_id, epoch, asked)
    await store.note_state(run_id, asked.task, task_run_id=asked.task_run_id, state_name="Deferred", message="sent")
    later = await take(store, run_id, force=True)
    awaited = AwaitedStep(
        run_id=run_id, task=asked.task, epoch=later, task_run_id=asked.task_run_id, bound="queue", has_function=False
    )
    assert (await store.claim_step(run_id, later, asked)).waits, "the new owner does not send it again"
    assert await store.watch_steps([awaited]) == []
    report = "SELECT pgflow_prefect.report_completion(%s, 'first', 0, '5', %s, NULL)"
    assert value(released.db, report, run_id, claim.attempt + 1) == "pending", "of no attempt that there is"
    assert value(released.db, report, run_id, claim.attempt) == "completed"
    [end] = await store.watch_steps([awaited])
    assert (end.outcome, end.message) == (Outcome.COMPLETED, "5")


async def test_a_wait_is_over_once_pgflow_lets_the_task_be_tried_again(store: Store, released: ReleasedWorld) -> None:
    run_id = await start(store, released, attempts=2)
    released.db.execute("UPDATE pgflow.flows SET opt_base_delay = 100")
    epoch = await take(store, run_id)
    asked = request("first")
    await fail(store, run_id, epoch, "first", await store.claim_step(run_id, epoch, asked))
    awaited = AwaitedStep(
        run_id=run_id, task=asked.task, epoch=epoch, task_run_id=asked.task_run_id, bound="python", has_function=True
    )
    assert await store.watch_steps([awaited]) == []
    released.db.execute("UPDATE pgmq.q_chain SET vt = now()")
    [end] = await store.watch_steps([awaited])
    assert end.outcome is Outcome.REBOUND
