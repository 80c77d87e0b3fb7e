"""What claims of moved flows leave in tables: our worker's row, claims of items, and what a copy takes over."""

from uuid import UUID, uuid4

import anyio
import psycopg
import pytest

from pgflow_prefect.database.store import Store
from pgflow_prefect.models import Doing, ItemReport, Status
from tests.contract.test_moved_flows import complete, request, start, store, take
from tests.contract.worlds import ReleasedWorld
from tests.engine import value
from tests.integration.waiting import await_value

pytestmark = pytest.mark.anyio

__all__ = ["store"]  # the fixture

OURS = "SELECT count(*) FROM pgflow.workers WHERE function_name = 'pgflow-prefect'"
CLAIMS = "SELECT array_agg(item_index ORDER BY item_index) FROM pgflow_prefect.item_claims"
GIVE_UP = """
    UPDATE pgflow.step_tasks SET permanently_stalled_at = now(), requeued_count = 3 WHERE status = 'started'
"""
WAITING = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock' AND query ~ 'end_given_up_tasks'
"""


async def begin_map(store: Store, released: ReleasedWorld, items: int, attempts: int = 1) -> tuple[UUID, int]:
    """Start a run whose map has so many tasks, and return it with its epoch."""
    released.flows.define("mapped", {"list": [], "resize": ["list"]}, maps=["resize"], attempts=attempts)
    await store.move_flow("mapped")
    run_id = released.flows.start("mapped", {})
    epoch = await take(store, run_id)
    claim = await store.claim_step(run_id, epoch, request("list"))
    await complete(store, run_id, epoch, "list", claim, str([*range(items)]))
    await store.claim_step(run_id, epoch, request("resize"))
    return run_id, epoch


async def test_our_worker_is_registered_by_its_first_claim_and_not_by_the_move(
    store: Store, released: ReleasedWorld
) -> None:
    run_id = await start(store, released)
    await store.take_runs(["chain"], 1)
    assert value(released.db, OURS) == 0, "pgflow's own table has no row of a flow that is only moved"
    claim = await store.claim_step(run_id, 1, request("first"))
    assert (claim.attempt, value(released.db, OURS)) == (1, 1)
    active = f"{OURS} AND deprecated_at IS NULL"
    await store.move_flow_back("chain")
    assert value(released.db, active) == 0
    await store.move_flow("chain")
    assert (value(released.db, OURS), value(released.db, active)) == (1, 1), "the same row again"


async def test_a_failure_before_the_first_claim_registers_our_worker_too(store: Store, released: ReleasedWorld) -> None:
    run_id = await start(store, released)
    epoch = await take(store, run_id)
    fence = {"epoch": epoch, "attempt": None, "task_run_id": uuid4()}
    report = await store.fail_step(run_id, request("first").task, "no handler", state_name="Failed", **fence)
    assert (report.status, value(released.db, OURS)) == (Status.FAILED, 1)


async def test_only_tasks_in_work_keep_a_claim(store: Store, released: ReleasedWorld) -> None:
    """What a call of `work_items` reads must not grow with what the map has done."""
    run_id, epoch = await begin_map(store, released, 4, attempts=2)
    await store.work_items(run_id, "resize", epoch, [], wanted=3)
    assert value(released.db, CLAIMS) == [0, 1, 2]
    reports = [ItemReport(0, 1, Doing.COMPLETE, "1"), ItemReport(1, 1, Doing.FAIL, None, "broken")]
    await store.work_items(run_id, "resize", epoch, reports, wanted=0)
    assert value(released.db, CLAIMS) == [2]
    more = await store.work_items(run_id, "resize", epoch, [], wanted=2)
    assert sorted((each.index, each.attempt) for each in more.items) == [(1, 2), (3, 1)]
    assert value(released.db, CLAIMS) == [1, 2, 3], "a task that is tried again is claimed again"


async def test_a_copy_takes_over_what_the_original_had_begun(store: Store, released: ReleasedWorld) -> None:
    run_id, epoch = await begin_map(store, released, 2)
    for _ in range(3):
        epoch = await take(store, run_id, force=True)
    begun = await store.work_items(run_id, "resize", epoch, [], wanted=2)
    deferred = [ItemReport(1, 1, Doing.DEFER)]  # it waits for a program of the original
    await store.work_items(run_id, "resize", epoch, deferred, wanted=0, held=[0])
    released.db.execute("SELECT pgflow_prefect.set_aside(%s, 'the original met an error')", [run_id])
    released.db.execute("SELECT pgflow_prefect.new_installation()")
    [taken] = await store.take_runs(["mapped"], 1)
    assert taken.epoch < epoch, "the copy counts anew"
    again = await store.work_items(run_id, "resize", taken.epoch, [], wanted=2)
    assert [(each.index, each.attempt) for each in again.items] == [(each.index, 1) for each in begun.items]
    rest = [ItemReport(each.index, 1, Doing.COMPLETE, "1") for each in again.items]
    done = await store.work_items(run_id, "resize", taken.epoch, rest, wanted=2)
    assert done.report.status is Status.COMPLETED


async def test_a_given_up_task_that_is_put_back_meanwhile_is_not_ended(store: Store, released: ReleasedWorld) -> None:
    if not released.implementation.skips:
        pytest.skip("this version of pgflow gives no task up")
    run_id = await start(store, released, attempts=3)
    released.flows.claim("chain")
    released.db.execute(GIVE_UP)
    async with anyio.create_task_group() as ending, await psycopg.AsyncConnection.connect(released.dsn) as person:
        await person.execute("SELECT FROM pgflow.runs WHERE run_id = %s FOR UPDATE", [run_id])
        ended: list[object] = []

        async def end() -> None:
            ended.extend(await store.end_given_up_tasks(limit=5))

        ending.start_soon(end)
        await await_value(released.db, 1, WAITING)
        await person.execute("UPDATE pgflow.step_tasks SET permanently_stalled_at = NULL, started_at = now()")
        await person.commit()
    assert ended == []
    row = "SELECT status || ' ' || attempts_count FROM pgflow.step_tasks"
    assert value(released.db, row) == "started 1", "its worker may report it"
