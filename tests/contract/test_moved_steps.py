"""Single steps of the released pgflow that were moved to Prefect, while pgflow's own workers do the others."""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import LiteralString
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.errors import PgflowPrefectError
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
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.contract.worlds import ReleasedWorld
from tests.engine import refused, value, wait_until_blocked
from tests.released_lab import read_objects, run_released_script

pytestmark = pytest.mark.anyio

FLOW = "photos"
STEPS = {"list": [], "resize": ["list"], "report": ["resize"]}
OURS = "SELECT array_agg(tgname::text ORDER BY tgname) FROM pg_trigger WHERE starts_with(tgname, 'pgflow_prefect')"
TRIGGERS = [
    "pgflow_prefect_keep_claimed",
    "pgflow_prefect_return",
    "pgflow_prefect_take_again",
    "pgflow_prefect_take_new",
]
QUEUED = "SELECT count(*) FROM pgmq.q_photos"
TAKEN_OUT = "SELECT count(*) FROM pgflow_prefect.taken_out"
ARCHIVED = "SELECT count(*) FROM pgmq.a_photos"
MESSAGES = "SELECT msg_id, read_ct, enqueued_at, vt, message FROM pgmq.q_photos ORDER BY msg_id"
AGE: LiteralString = """
    UPDATE pgflow.step_tasks SET queued_at = now() - interval '2 days', started_at = now() - interval '1 day'
    WHERE status = 'started'
"""


@pytest.fixture
async def store(released: ReleasedWorld) -> AsyncIterator[Store]:
    async with open_store(Settings(dsn=SecretStr(released.dsn)), size=2, executes_moved=True) as opened:
        yield opened


def find_triggers(released: ReleasedWorld) -> object:
    """Return our triggers on tables of pgflow, without the one that a version without requeueing does not need."""
    return value(released.db, OURS)


def expect_triggers(released: ReleasedWorld) -> list[str]:
    return TRIGGERS if released.implementation.skips else TRIGGERS[1:]


def request(step: str, **other: object) -> ClaimRequest:
    asked = ClaimRequest(TaskKey(step), uuid4(), upstream=None, with_payload=True)
    return asked._replace(**other)  # type: ignore[arg-type]


async def take(store: Store, run_id: UUID, *, force: bool = False) -> int:
    epoch = await store.take_run(run_id, uuid4(), force=force)
    assert epoch is not None
    return epoch


async def complete(store: Store, run_id: UUID, epoch: int, step: str, claim: Claim, result: str = '"done"') -> Report:
    return await store.complete_step(run_id, epoch, Completion(TaskKey(step), result, claim.attempt, uuid4()))


async def fail(store: Store, run_id: UUID, epoch: int, step: str, claim: Claim) -> Report:
    fence = {"epoch": epoch, "attempt": claim.attempt, "task_run_id": uuid4()}
    return await store.fail_step(run_id, TaskKey(step), "broken", state_name="Failed", **fence)


def work(released: ReleasedWorld, output: object = "by edge") -> list[str]:
    """Do what an Edge worker finds in the queue, and return the steps."""
    return [step for step, _ in released.flows.work(FLOW, lambda step, index: output)]


def delete_flow(released: ReleasedWorld) -> None:
    """Delete the flow as pgflow does, whether this version has a function for it or not."""
    if value(released.db, "SELECT to_regprocedure('pgflow.delete_flow_and_data(text)')") is not None:
        released.db.execute("SELECT pgflow.delete_flow_and_data(%s)", [FLOW])
        return
    released.db.execute("SELECT pgmq.drop_queue(%s)", [FLOW])
    for table in ("step_tasks", "step_states", "runs", "deps", "steps", "flows"):
        released.db.execute(sql.SQL("DELETE FROM pgflow.{}").format(sql.Identifier(table)))


def read_messages(db: Connection) -> list[tuple[object, ...]]:
    return db.execute(MESSAGES.encode()).fetchall()


# Moving, and who executes


async def test_an_edge_worker_does_the_other_steps_and_never_sees_the_moved_one(
    store: Store, released: ReleasedWorld
) -> None:
    released.flows.define(FLOW, STEPS)
    assert await store.bind_step(FLOW, "resize", "python")
    assert find_triggers(released) == expect_triggers(released)
    run_id = released.flows.start(FLOW, {"n": 1})
    [taken] = await store.take_runs([FLOW], 1)
    assert (await store.claim_step(run_id, taken.epoch, request("list"))).waits, "an Edge worker does it"
    assert work(released) == ["list"]
    assert work(released) == [], "the moved step has no message in the queue"
    claim = await store.claim_step(run_id, taken.epoch, request("resize"))
    assert (claim.waits, claim.attempt) == (False, 1)
    assert (await complete(store, run_id, taken.epoch, "resize", claim)).status is Status.COMPLETED
    assert work(released) == ["report"]
    assert value(released.db, "SELECT status FROM pgflow.runs") == "completed"
    assert (value(released.db, QUEUED), value(released.db, TAKEN_OUT), value(released.db, ARCHIVED)) == (0, 0, 3)


async def test_the_triggers_come_with_the_first_step_and_go_with_the_last(
    store: Store, released: ReleasedWorld
) -> None:
    released.flows.define(FLOW, STEPS)
    before = read_objects(released.db)
    await store.bind_step(FLOW, "resize", "python")
    await store.bind_step(FLOW, "report", "sql", "public.report")
    await store.bind_step(FLOW, "resize", "external")
    assert find_triggers(released) == expect_triggers(released)
    assert await store.undo_binding(FLOW, "report")
    assert read_objects(released.db) == before
    assert await store.list_moved_flows() == {}


async def test_undo_moves_a_step_there_and_back(store: Store, released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS)
    kinds = {step: each.kind for step, each in (await store.list_bindings(FLOW)).items()}
    assert kinds == dict.fromkeys(STEPS, "external")
    await store.bind_step(FLOW, "resize", "python")
    assert (await store.list_bindings(FLOW))["resize"].kind == "python"
    assert (await store.list_bindings(FLOW))["list"].kind == "external"
    assert await store.bind_step(FLOW, "resize", "external")
    assert await store.undo_binding(FLOW, "resize")
    assert (await store.list_bindings(FLOW))["resize"].kind == "python"
    assert await store.undo_binding(FLOW, "resize")
    assert (await store.list_bindings(FLOW))["resize"].kind == "external"
    assert not await store.undo_binding(FLOW, "resize")


async def test_messages_come_back_as_they_were(store: Store, released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS, list="start_delay => 1000")
    released.flows.start(FLOW, {})
    released.db.execute("SELECT pgmq.set_vt(%s, msg_id, 1000) FROM pgmq.q_photos", [FLOW])
    before = read_messages(released.db)
    await store.bind_step(FLOW, "list", "python")
    assert read_messages(released.db) == []
    await store.undo_binding(FLOW, "list")
    assert read_messages(released.db) == before


async def test_a_message_that_an_edge_worker_has_read_stays_its_own(store: Store, released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS)
    run_id = released.flows.start(FLOW, {})
    [read] = released.db.execute("SELECT msg_id FROM pgmq.read(%s, 1000, 10)", [FLOW]).fetchall()
    await store.bind_step(FLOW, "list", "python")
    epoch = await take(store, run_id)
    assert (await store.claim_step(run_id, epoch, request("list"))).waits, "it may begin it in a moment"
    worker = uuid4()
    register = "INSERT INTO pgflow.workers (worker_id, queue_name, function_name) VALUES (%s, %s, 'edge')"
    released.db.execute(register, [worker, FLOW])
    released.db.execute("SELECT pgflow.start_tasks(%s, %s::bigint[], %s)", [FLOW, [*read], worker])
    released.flows.complete((run_id, "list", 0), "by edge")
    assert (await store.claim_step(run_id, epoch, request("list"))).status is Status.COMPLETED
    assert (value(released.db, TAKEN_OUT), value(released.db, ARCHIVED)) == (0, 1)
    assert work(released) == ["resize"]


async def test_a_step_that_was_moved_back_while_it_is_under_way_is_ended_here(
    store: Store, released: ReleasedWorld
) -> None:
    released.flows.define(FLOW, STEPS)
    await store.bind_step(FLOW, "list", "python")
    run_id = released.flows.start(FLOW, {})
    epoch = await take(store, run_id)
    claim = await store.claim_step(run_id, epoch, request("list"))
    await store.undo_binding(FLOW, "list")
    assert value(released.db, "SELECT vt > now() FROM pgmq.q_photos"), "as pgflow hides what is begun"
    assert (await complete(store, run_id, epoch, "list", claim)).status is Status.COMPLETED
    assert (value(released.db, QUEUED), value(released.db, ARCHIVED)) == (1, 1)
    assert work(released) == ["resize"]


async def test_another_owner_takes_over_what_was_begun_before_the_step_was_moved_back(
    store: Store, released: ReleasedWorld
) -> None:
    released.flows.define(FLOW, STEPS)
    await store.bind_step(FLOW, "list", "python")
    await store.bind_step(FLOW, "report", "python")
    run_id = released.flows.start(FLOW, {})
    epoch = await take(store, run_id)
    await store.claim_step(run_id, epoch, request("list"))
    await store.undo_binding(FLOW, "list")
    later = await take(store, run_id, force=True)
    claim = await store.claim_step(run_id, later, request("list"))
    assert (claim.waits, claim.attempt) == (False, 1)
    assert (await complete(store, run_id, later, "list", claim)).status is Status.COMPLETED


async def test_the_whole_flow_can_be_moved_while_a_step_is(store: Store, released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS)
    await store.bind_step(FLOW, "list", "python")
    run_id = released.flows.start(FLOW, {})
    assert (await store.move_flow(FLOW)).changed
    assert (value(released.db, QUEUED), value(released.db, TAKEN_OUT)) == (1, 0)
    epoch = await take(store, run_id)
    claim = await store.claim_step(run_id, epoch, request("list"))
    await complete(store, run_id, epoch, "list", claim)
    assert not (await store.claim_step(run_id, epoch, request("resize"))).waits
    await store.move_flow_back(FLOW)
    assert (await store.list_bindings(FLOW))["list"].kind == "external"


async def test_a_flow_whose_steps_were_moved_is_given_back_as_a_whole(store: Store, released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS)
    await store.bind_step(FLOW, "list", "python")
    await store.bind_step(FLOW, "report", "python")
    released.flows.start(FLOW, {})
    assert (await store.move_flow_back(FLOW)).changed
    assert find_triggers(released) is None
    assert work(released) == ["list"]


# Retries, requeues and ends


async def test_a_retry_waits_here_for_as_long_as_pgflow_says(store: Store, released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS, attempts=2)
    released.db.execute("UPDATE pgflow.flows SET opt_base_delay = 100")
    await store.bind_step(FLOW, "list", "python")
    run_id = released.flows.start(FLOW, {})
    epoch = await take(store, run_id)
    asked = request("list")
    report = await fail(store, run_id, epoch, "list", await store.claim_step(run_id, epoch, asked))
    assert report.retry_after is not None
    assert 100 < report.retry_after <= 200
    assert (value(released.db, QUEUED), value(released.db, TAKEN_OUT)) == (0, 1)
    assert (await store.claim_step(run_id, epoch, asked)).waits, "it is not due"
    awaited = AwaitedStep(
        run_id=run_id, task=asked.task, epoch=epoch, task_run_id=asked.task_run_id, bound="python", has_function=True
    )
    assert await store.watch_steps([awaited]) == []
    released.db.execute("UPDATE pgflow_prefect.taken_out SET due_at = now()")
    [end] = await store.watch_steps([awaited])
    assert end.outcome is Outcome.REBOUND
    assert (await store.claim_step(run_id, epoch, asked)).attempt == 2


async def test_the_retry_of_an_edge_workers_attempt_comes_here(store: Store, released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS, attempts=2)
    run_id = released.flows.start(FLOW, {})
    [begun] = released.flows.claim(FLOW)
    await store.bind_step(FLOW, "list", "python")
    assert value(released.db, QUEUED) == 1, "the Edge worker has it"
    released.db.execute("SELECT pgflow.fail_task(%s, %s, %s, 'broken')", [*begun])
    assert (value(released.db, QUEUED), value(released.db, TAKEN_OUT)) == (0, 1)
    epoch = await take(store, run_id)
    assert (await store.claim_step(run_id, epoch, request("list"))).attempt == 2


async def test_pgflow_puts_back_what_an_edge_worker_has_left_and_never_what_is_ours(
    store: Store, released: ReleasedWorld
) -> None:
    if not released.implementation.skips:
        pytest.skip("this version of pgflow puts no task back")
    released.flows.define(FLOW, {"list": [], "other": []})
    run_id = released.flows.start(FLOW, {})
    released.flows.claim(FLOW)
    await store.bind_step(FLOW, "list", "python")
    epoch = await take(store, run_id)
    released.db.execute(AGE)
    assert value(released.db, "SELECT pgflow.requeue_stalled_tasks()") == 2
    assert (value(released.db, QUEUED), value(released.db, TAKEN_OUT)) == (1, 1)
    claim = await store.claim_step(run_id, epoch, request("list"))
    assert claim.attempt == 2
    released.db.execute(AGE)
    for _ in range(5):  # it gives a task up at the fourth time
        released.db.execute("SELECT pgflow.requeue_stalled_tasks()")
    assert (await complete(store, run_id, epoch, "list", claim)).status is Status.COMPLETED


async def test_a_run_that_fails_leaves_no_message(store: Store, released: ReleasedWorld) -> None:
    released.flows.define(FLOW, {"list": [], "other": []})
    await store.bind_step(FLOW, "other", "python")
    run_id = released.flows.start(FLOW, {})
    [begun] = released.flows.claim(FLOW)
    released.db.execute("SELECT pgflow.fail_task(%s, %s, %s, 'broken')", [*begun])
    assert (await store.read_run(run_id)).status is Status.FAILED
    assert (value(released.db, QUEUED), value(released.db, TAKEN_OUT), value(released.db, ARCHIVED)) == (0, 0, 2)


async def test_a_run_that_ends_while_its_message_is_out_leaves_none_behind(
    store: Store, released: ReleasedWorld
) -> None:
    released.flows.define(FLOW, {"list": []})
    await store.bind_step(FLOW, "list", "python")
    released.flows.start(FLOW, {})
    released.db.execute("UPDATE pgflow.runs SET status = 'failed', failed_at = now()")  # by hand
    assert await store.restore_messages(limit=10) == []
    assert (value(released.db, TAKEN_OUT), value(released.db, ARCHIVED)) == (0, 1)


async def test_a_flow_that_is_deleted_and_made_anew_has_its_own_messages(store: Store, released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS)
    await store.bind_step(FLOW, "list", "python")
    released.flows.start(FLOW, {})
    delete_flow(released)
    released.flows.define(FLOW, STEPS)
    run_id = released.flows.start(FLOW, {})
    assert value(released.db, "SELECT run_id FROM pgflow_prefect.taken_out") == run_id, "the ids begin anew"
    epoch = await take(store, run_id)
    claim = await store.claim_step(run_id, epoch, request("list"))
    assert (await complete(store, run_id, epoch, "list", claim)).status is Status.COMPLETED
    assert work(released) == ["resize"]


# Maps


async def test_both_sides_do_items_of_a_map_that_moves(store: Store, released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS, maps=["resize"], attempts=2)
    run_id = released.flows.start(FLOW, {})
    assert work(released, [10, 11, 12, 13]) == ["list"]
    [by_edge, *_] = released.flows.claim(FLOW, 1)
    await store.bind_step(FLOW, "resize", "python")
    epoch = await take(store, run_id)
    assert not (await store.claim_step(run_id, epoch, request("resize"))).waits
    begun = await store.work_items(run_id, "resize", epoch, [], wanted=2)
    assert [each.index for each in begun.items] == [1, 2]
    reports = [ItemReport(1, 1, Doing.COMPLETE, '"b"'), ItemReport(2, 1, Doing.FAIL, None, "broken")]
    more = await store.work_items(run_id, "resize", epoch, reports, wanted=1)
    assert [(each.index, each.attempt) for each in more.items] == [(2, 2)]
    await store.undo_binding(FLOW, "resize")
    last = await store.work_items(run_id, "resize", epoch, [ItemReport(2, 2, Doing.COMPLETE, '"c"')], wanted=5)
    assert last.items == ()
    assert work(released, "d") == ["resize"]
    released.flows.complete(by_edge, "a")
    assert work(released, "end") == ["report"]
    outputs = "SELECT jsonb_agg(output ORDER BY task_index) FROM pgflow.step_tasks WHERE step_slug = 'resize'"
    assert value(released.db, outputs) == ["a", "b", "c", "d"]
    assert (value(released.db, QUEUED), value(released.db, TAKEN_OUT)) == (0, 0)


async def test_a_wait_for_a_map_is_over_when_it_is_moved(store: Store, released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS, maps=["resize"])
    run_id = released.flows.start(FLOW, {})
    work(released, [1, 2, 3])
    await store.bind_step(FLOW, "report", "python")
    epoch = await take(store, run_id)
    asked = request("resize")
    assert (await store.claim_step(run_id, epoch, asked)).waits
    [first, *_] = released.flows.claim(FLOW, 1)
    released.flows.complete(first, 1)
    awaited = AwaitedStep(
        run_id=run_id, task=asked.task, epoch=epoch, task_run_id=asked.task_run_id, bound="python", has_function=True
    )
    assert await store.watch_steps([awaited]) == []
    await store.bind_step(FLOW, "resize", "python")
    [end] = await store.watch_steps([awaited])
    assert end.outcome is Outcome.REBOUND


# What overlaps


async def test_what_a_transaction_from_before_the_move_leaves_in_the_queue_is_taken_out_later(
    store: Store, released: ReleasedWorld
) -> None:
    released.flows.define(FLOW, STEPS)
    await store.bind_step(FLOW, "report", "python")  # the triggers are there
    with psycopg.connect(released.dsn) as other:
        other.execute("SELECT pgflow.start_flow(%s, '{}')", [FLOW])
        await store.bind_step(FLOW, "list", "python")
        await store.take_runs([FLOW], 1, expired=True)
    assert (value(released.db, QUEUED), value(released.db, TAKEN_OUT)) == (1, 0)
    await store.take_runs([FLOW], 1, expired=True)
    assert (value(released.db, QUEUED), value(released.db, TAKEN_OUT)) == (0, 1)
    await store.take_runs([FLOW], 1, expired=True)
    assert value(released.db, "SELECT is_swept FROM pgflow_prefect.moved_steps WHERE step_slug = 'list'")


async def test_moving_a_step_back_waits_for_a_transaction_that_takes_messages_out(released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS)
    for step in ("report", "list"):
        released.db.execute("SELECT pgflow_prefect.bind_step(%s, %s, 'python')", [FLOW, step])
    with psycopg.connect(released.dsn) as other, psycopg.connect(released.dsn) as mover:
        other.execute("SELECT pgflow.start_flow(%s, '{}')", [FLOW])
        mover.execute("SET lock_timeout = '1ms'")
        with refused("55P03"):  # it waits for a lock
            mover.execute("DELETE FROM pgflow_prefect.moved_steps WHERE step_slug = 'list'")
    assert (value(released.db, QUEUED), value(released.db, TAKEN_OUT)) == (0, 1)
    released.db.execute("SELECT pgflow_prefect.bind_step(%s, 'list', 'external')", [FLOW])
    assert (value(released.db, QUEUED), value(released.db, TAKEN_OUT)) == (1, 0)


async def test_a_flow_is_given_back_beside_a_report_that_starts_several_moved_steps(released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS)
    for step in ("resize", "list"):
        released.db.execute("SELECT pgflow_prefect.bind_step(%s, %s, 'python')", [FLOW, step])
    with (
        psycopg.connect(released.dsn) as other,
        psycopg.connect(released.dsn) as mover,
        ThreadPoolExecutor(1) as pool,
    ):
        other.execute("SELECT pgflow.start_flow(%s, '{}')", [FLOW])  # it holds the row of `list`
        moved = pool.submit(mover.execute, "SELECT changed FROM pgflow_prefect.move_flow_back(%s)", [FLOW])
        wait_until_blocked(released.db, mover.info.backend_pid)
        other.execute(
            "INSERT INTO pgflow.step_tasks (flow_slug, run_id, step_slug, message_id) "
            "SELECT flow_slug, run_id, 'resize', 999 FROM pgflow.runs"
        )
        other.commit()
        assert moved.result().fetchone() == (True,)
        mover.commit()
    assert find_triggers(released) is None


@pytest.mark.parametrize("is_gone", [False, True])
async def test_a_flow_that_has_its_moved_step_no_more_is_given_back(
    store: Store, released: ReleasedWorld, is_gone: bool
) -> None:
    released.flows.define(FLOW, STEPS)
    await store.bind_step(FLOW, "list", "python")
    await store.bind_step(FLOW, "report", "python")
    released.flows.start(FLOW, {})
    delete_flow(released)
    if not is_gone:
        released.flows.define(FLOW, {"report": []})
    assert (await store.move_flow_back(FLOW)).changed
    assert find_triggers(released) is None
    assert value(released.db, "SELECT count(*) FROM pgflow_prefect.moved_steps") == 0
    assert value(released.db, TAKEN_OUT) == 0


async def test_a_step_that_was_not_moved_is_given_back_without_a_lock(released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS)
    with psycopg.connect(released.dsn) as other:
        other.execute("SELECT FROM pgflow.step_tasks")
        released.db.execute("SET lock_timeout = '1ms'")
        released.db.execute("SELECT pgflow_prefect.bind_step(%s, 'list', NULL)", [FLOW])


# What is lost comes back


async def test_messages_that_are_nowhere_are_named_and_rebuilt(store: Store, released: ReleasedWorld) -> None:
    released.flows.define(FLOW, {"list": [], "other": []})
    await store.bind_step(FLOW, "list", "python")
    run_id = released.flows.start(FLOW, {})
    [before] = released.db.execute("SELECT message -> 'message' FROM pgflow_prefect.taken_out").fetchall()
    assert await store.list_lost_messages(limit=5) == []
    released.db.execute("SELECT pgmq.purge_queue(%s)", [FLOW])
    released.db.execute("TRUNCATE pgflow_prefect.taken_out")
    lost = await store.list_lost_messages(limit=5)
    assert {(each.run_id, each.step_slug, each.task_index) for each in lost} == {
        (run_id, "list", 0),
        (run_id, "other", 0),
    }
    assert len(await store.restore_messages(limit=5)) == 2
    assert await store.restore_messages(limit=5) == []
    assert (value(released.db, QUEUED), value(released.db, TAKEN_OUT)) == (1, 1)
    [after] = released.db.execute("SELECT message -> 'message' FROM pgflow_prefect.taken_out").fetchall()
    assert after[0].items() >= before[0].items()  # type: ignore[attr-defined]
    assert work(released) == ["other"]


async def test_pgflow_goes_on_without_our_schema_and_its_messages_come_back(released: ReleasedWorld) -> None:
    released.flows.define(FLOW, {"list": [], "other": []})
    before = read_objects(released.db)
    released.db.execute("SELECT pgflow_prefect.bind_step(%s, 'list', 'python')", [FLOW])
    released.flows.start(FLOW, {})
    released.db.execute("DROP SCHEMA pgflow_prefect CASCADE")
    assert read_objects(released.db) == before
    assert work(released) == ["other"]
    assert value(released.db, QUEUED) == 0
    run_released_script(released.db, "remove")
    assert work(released) == ["list"]
    assert value(released.db, "SELECT status FROM pgflow.runs") == "completed"


async def test_removing_everything_puts_every_message_back(released: ReleasedWorld) -> None:
    released.flows.define(FLOW, {"list": [], "other": []})
    before = read_objects(released.db)
    released.flows.start(FLOW, {})
    messages = read_messages(released.db)
    released.db.execute("SELECT pgflow_prefect.bind_step(%s, 'list', 'python')", [FLOW])
    run_released_script(released.db, "remove")
    assert read_messages(released.db) == messages
    assert read_objects(released.db) == before


# Versions


async def test_a_flow_whose_steps_have_queues_of_their_own_is_refused_by_name(
    store: Store, released: ReleasedWorld
) -> None:
    released.flows.define(FLOW, STEPS)
    released.db.execute("ALTER TABLE pgflow.flows ADD COLUMN queue_mode text NOT NULL DEFAULT 'flow'")
    await store.bind_step(FLOW, "list", "python")
    await store.undo_binding(FLOW, "list")
    released.db.execute("UPDATE pgflow.flows SET queue_mode = 'step'")
    with pytest.raises(PgflowPrefectError, match=r'flow "photos" stays .* queues of their own'):
        await store.bind_step(FLOW, "list", "python")
    with pytest.raises(PgflowPrefectError, match="queues of their own"):
        await store.move_flow(FLOW)


async def test_a_version_that_begins_tasks_in_another_way_is_refused(store: Store, released: ReleasedWorld) -> None:
    released.flows.define(FLOW, STEPS)
    released.db.execute("ALTER FUNCTION pgflow.start_tasks(text, bigint[], uuid) RENAME TO begin_tasks")
    with pytest.raises(PgflowPrefectError, match=r"does not know this version of pgflow\.start_tasks"):
        await store.bind_step(FLOW, "list", "python")
