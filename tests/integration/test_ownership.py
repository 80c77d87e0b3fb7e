"""Who may write for a run: owners, their leases, and what becomes of a run that they leave behind."""

from uuid import UUID, uuid4

import pytest

from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import RunHeldError, SupersededError
from pgflow_prefect.models import ClaimRequest, Completion, Held, Report, Status, TaskElement, TaskKey
from tests.conftest import Connect, Connection
from tests.engine import CHAIN, complete, define, run_workflow, value
from tests.integration.conftest import TENURE

pytestmark = pytest.mark.anyio

# As if the server had been up for long: for one lease length after its start, every lease holds.
LONG_UP = """
CREATE OR REPLACE FUNCTION pgflow_prefect.is_leased(lease_until timestamptz, lease double precision) RETURNS boolean
LANGUAGE sql STABLE AS 'SELECT lease_until > clock_timestamp()'
"""


@pytest.fixture
def workflow(db: Connection) -> str:
    """An enabled workflow, on a server that has been up for long."""
    define(db, "chain", CHAIN)
    db.execute("SELECT pgflow_prefect.enable_workflow('chain')")
    db.execute(LONG_UP)
    return "chain"


def expire(db: Connection, run_id: UUID) -> None:
    """Let a run's lease run out."""
    db.execute(
        "UPDATE pgflow_prefect.owners SET lease_until = clock_timestamp() - interval '1 s' WHERE run_id = %s", [run_id]
    )


async def take(store: Store, run_id: UUID, flow_run_id: UUID | None = None) -> int:
    epoch = await store.take_run(run_id, flow_run_id or uuid4())
    assert epoch is not None
    return epoch


async def test_a_run_is_held_until_its_lease_runs_out(store: Store, db: Connection, workflow: str) -> None:
    run_id = run_workflow(db, workflow).id
    assert (await store.read_run(run_id)).held is None
    first = await take(store, run_id)
    assert (await store.read_run(run_id)).held is Held.LEASED
    with pytest.raises(RunHeldError, match=f"run {run_id} is held by the tests. Its lease ends at"):
        await store.take_run(run_id, uuid4())

    expire(db, run_id)
    assert (await store.read_run(run_id)).held is Held.EXPIRED
    assert await take(store, run_id) == first + 1


async def test_the_same_flow_run_may_take_its_run_again(store: Store, db: Connection, workflow: str) -> None:
    run_id, flow_run_id = run_workflow(db, workflow).id, uuid4()
    first = await take(store, run_id, flow_run_id)
    assert await take(store, run_id, flow_run_id) == first + 1, "in a new epoch: its former process may still live"


async def test_a_lease_holds_for_one_length_after_the_servers_start(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id = run_workflow(db, "chain").id
    await take(store, run_id)
    expire(db, run_id)
    up = value(db, "SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())::float")
    assert isinstance(up, float)
    assert value(db, "SELECT pgflow_prefect.is_leased(now() - interval '1 s', %s)", up + 60)
    assert not value(db, "SELECT pgflow_prefect.is_leased(now() - interval '1 s', %s)", up / 2)
    assert not value(db, "SELECT pgflow_prefect.is_leased('-infinity', %s)", up + 60), "what was handed back is free"


async def test_refused_writes_are_counted(store: Store, db: Connection, workflow: str) -> None:
    run_id = run_workflow(db, workflow).id
    stale = await take(store, run_id)
    fence = {"epoch": stale, "attempt": 1, "task_run_id": uuid4()}
    completion = Completion(TaskKey("a"), "1", 1, uuid4())
    await store.claim_step(run_id, stale, ClaimRequest(TaskKey("a"), uuid4(), [], with_payload=True))
    epoch = await store.take_run(run_id, uuid4(), force=True)
    assert epoch

    assert (await store.complete_step(run_id, stale, completion)).status is Status.PENDING
    assert (await store.fail_step(run_id, TaskKey("a"), "late", state_name="Failed", **fence)).status is Status.PENDING
    with pytest.raises(SupersededError):
        await store.claim_step(run_id, stale, ClaimRequest(TaskKey("a"), uuid4(), [], with_payload=True))
    assert (await store.read_run(run_id)).stale_writes == 3
    claim = ClaimRequest(TaskKey("a"), uuid4(), [], with_payload=True)
    report, refused = await store.perform_tasks([TaskElement(run_id, stale, each) for each in (completion, claim)])
    assert isinstance(report, Report)
    assert (report.status, type(refused)) == (Status.PENDING, SupersededError)
    assert (await store.read_run(run_id)).stale_writes == 5

    await store.claim_step(run_id, epoch, claim)
    done = await store.complete_step(run_id, epoch, completion._replace(attempt=2))
    again = await store.complete_step(run_id, epoch, completion._replace(attempt=2))
    assert (done.status, again.status) == (Status.COMPLETED, Status.COMPLETED)
    assert (await store.read_run(run_id)).stale_writes == 5, "its own report, also a second time, is none"
    assert (await store.complete_step(run_id, stale, completion)).status is Status.COMPLETED
    assert (await store.read_run(run_id)).stale_writes == 6, "a late one is, though the step is completed"


async def test_owners_that_vanish_without_progress_are_counted_to_the_limit(
    store: Store, db: Connection, workflow: str
) -> None:
    run_id = run_workflow(db, workflow).id
    await take(store, run_id)
    for recoveries in range(1, TENURE.max_recoveries + 1):
        expire(db, run_id)
        await take(store, run_id)
        assert (await store.read_run(run_id)).recoveries == recoveries
    expire(db, run_id)
    assert await store.take_run(run_id, uuid4()) is None
    run = await store.read_run(run_id)
    assert run.status is Status.FAILED
    assert run.error_message == (
        "given up: 4 owners in a row have vanished while no further step completed, the last one was the tests"
    )

    await store.reopen_run(run_id)
    await take(store, run_id)
    assert (await store.read_run(run_id)).recoveries == 0, "reopening resets it"


async def test_progress_begins_the_count_anew(store: Store, db: Connection, workflow: str) -> None:
    run_id = run_workflow(db, workflow).id
    await take(store, run_id)
    for _ in range(TENURE.max_recoveries):
        expire(db, run_id)
        await take(store, run_id)
    complete(db, run_id, "a")
    expire(db, run_id)
    await take(store, run_id)
    assert (await store.read_run(run_id)).recoveries == 0


async def test_what_was_handed_back_is_no_recovery(store: Store, db: Connection, workflow: str) -> None:
    run_id = run_workflow(db, workflow).id
    for _ in range(TENURE.max_recoveries + 2):
        await store.release_run(run_id, await take(store, run_id))
        assert (await store.read_run(run_id)).held is Held.RELEASED
    assert (await store.read_run(run_id)).recoveries == 0


async def test_a_former_owner_hands_nothing_back(store: Store, db: Connection, workflow: str) -> None:
    run_id = run_workflow(db, workflow).id
    stale = await take(store, run_id)
    await store.take_run(run_id, uuid4(), force=True)
    await store.release_run(run_id, stale)
    assert (await store.read_run(run_id)).held is Held.LEASED


async def test_runs_are_reserved_once_the_oldest_first(store: Store, db: Connection, workflow: str) -> None:
    ids = [run_workflow(db, workflow).id for _ in range(5)]
    first = await store.take_runs([workflow], 2)
    second = await store.take_runs([workflow], 10)
    assert [each.run_id for each in first + second] == ids
    assert {each.former_flow_run_id for each in first + second} == {None}
    assert await store.take_runs([workflow], 10) == []


async def test_what_others_look_at_is_skipped_and_not_waited_for(
    store: Store, db: Connection, connect: Connect, workflow: str
) -> None:
    ids = [run_workflow(db, workflow).id for _ in range(2)]
    other = connect()
    with other.transaction():
        other.execute("SELECT FROM pgflow.runs WHERE id = %s FOR NO KEY UPDATE", [ids[0]])
        assert [each.run_id for each in await store.take_runs([workflow], 10)] == [ids[1]]


async def test_only_enabled_workflows_and_runs_begun_since_are_taken(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    older = run_workflow(db, "chain").id
    assert await store.take_runs(["chain"], 10) == []
    await store.enable_workflow("chain")
    newer = run_workflow(db, "chain").id
    assert await store.list_older_runs(["chain"]) == [("chain", older)]
    assert [each.run_id for each in await store.take_runs(["chain"], 10)] == [newer]

    await store.enable_workflow("chain", enabled=False)
    assert await store.take_runs(["chain"], 10, adopt=True) == []
    await store.enable_workflow("chain")
    assert [each.run_id for each in await store.take_runs(["chain"], 10, adopt=True)] == [older]


async def test_a_run_whose_lease_ran_out_is_reserved_with_its_former_flow_run(
    store: Store, db: Connection, workflow: str
) -> None:
    run_id, flow_run_id = run_workflow(db, workflow).id, uuid4()
    epoch = await take(store, run_id, flow_run_id)
    assert await store.take_runs([workflow], 10) == []
    expire(db, run_id)
    [taken] = await store.take_runs([workflow], 10)
    assert (taken.run_id, taken.epoch, taken.former_flow_run_id) == (run_id, epoch + 1, flow_run_id)


async def test_a_reservation_that_led_to_nothing_keeps_its_epoch_and_its_key(
    store: Store, db: Connection, workflow: str
) -> None:
    run_id = run_workflow(db, workflow).id
    [first] = await store.take_runs([workflow], 10)
    expire(db, run_id)
    [second] = await store.take_runs([workflow], 10)
    assert second.idempotency_key == first.idempotency_key, (
        "so that Prefect returns the flow run that may have been created"
    )
    await store.release_run(run_id, second.epoch)
    assert await store.take_runs([workflow], 10) == [first], "handed back because Prefect did not answer: the same"
    assert second.idempotency_key == f"pgflow/{run_id}/1"


async def test_a_reservation_that_ran_out_is_not_handed_back_for_the_next_owner(
    store: Store, dsn: str, db: Connection, workflow: str
) -> None:
    run_id = run_workflow(db, workflow).id
    [late] = await store.take_runs([workflow], 10)
    expire(db, run_id)
    async with open_pool(dsn, size=2, timeout=10) as pool:
        other = Store(pool, TENURE._replace(held_by="another process"))
        [taken] = await other.take_runs([workflow], 10)
        assert taken.epoch == late.epoch
        await store.release_reservation(run_id, late.epoch)
        assert (await store.read_run(run_id)).held is Held.LEASED, "reserved by the other one"

        assert await other.link_flow_run(run_id, taken.epoch, uuid4(), queued=False)
        for each in (store, other):
            await each.release_reservation(run_id, late.epoch)
            assert (await store.read_run(run_id)).held is Held.LEASED, "a flow run executes it"


async def test_a_process_fails_only_runs_that_it_holds(store: Store, dsn: str, db: Connection, workflow: str) -> None:
    run_id = run_workflow(db, workflow).id
    [late] = await store.take_runs([workflow], 10)
    expire(db, run_id)
    async with open_pool(dsn, size=2, timeout=10) as pool:
        other = Store(pool, TENURE._replace(held_by="another process"))
        [taken] = await other.take_runs([workflow], 10)
        assert taken.epoch == late.epoch, "reserved a second time"
        assert not await store.fail_run(run_id, late.epoch, "Prefect refuses it")
        assert (await store.read_run(run_id)).status == "pending"

        epoch = await store.take_run(run_id, uuid4(), force=True)
        assert not await other.fail_run(run_id, taken.epoch, "Prefect refuses it"), "executed by the former one"
        assert (await store.read_run(run_id)).status == "pending"
        assert epoch is not None
        assert await store.fail_run(run_id, epoch, "it can't be executed")
    run = await store.read_run(run_id)
    assert (run.status, run.error_message) == ("failed", "it can't be executed")
    assert not await store.fail_run(uuid4(), 1, "of no run")


async def test_a_run_that_was_taken_by_hand_is_failed_by_no_former_owner(
    store: Store, db: Connection, workflow: str
) -> None:
    run_id = run_workflow(db, workflow).id
    [taken] = await store.take_runs([workflow], 10)
    db.execute("SELECT pgflow.take_run(%s)", [run_id])
    assert not await store.fail_run(run_id, taken.epoch, "Prefect refuses it")
    assert (await store.read_run(run_id)).status == "pending"


async def test_a_reservation_is_handed_back(store: Store, db: Connection, workflow: str) -> None:
    run_id = run_workflow(db, workflow).id
    [taken] = await store.take_runs([workflow], 10)
    await store.release_reservation(run_id, taken.epoch)
    assert (await store.read_run(run_id)).held is Held.RELEASED
    assert await store.take_runs([workflow], 10) == [taken]


async def test_a_queued_run_waits_for_its_flow_run_and_no_other(store: Store, db: Connection, workflow: str) -> None:
    run_id, flow_run_id = run_workflow(db, workflow).id, uuid4()
    [taken] = await store.take_runs([workflow], 10)
    assert await store.link_flow_run(run_id, taken.epoch, flow_run_id, queued=True)
    assert await store.link_flow_run(run_id, taken.epoch, flow_run_id, queued=True), "again: nothing new"
    assert not await store.link_flow_run(run_id, taken.epoch, uuid4(), queued=True)
    assert (await store.read_run(run_id)).held is Held.QUEUED
    assert await store.take_runs([workflow], 10) == []
    with pytest.raises(RunHeldError):
        await store.take_run(run_id, uuid4())
    assert await store.take_run(run_id, flow_run_id) == taken.epoch + 1


async def test_a_flow_run_that_starts_before_it_is_linked_has_its_run(
    store: Store, db: Connection, workflow: str
) -> None:
    run_id, flow_run_id = run_workflow(db, workflow).id, uuid4()
    [taken] = await store.take_runs([workflow], 10)
    epoch = await take(store, run_id, flow_run_id)
    assert await store.link_flow_run(run_id, taken.epoch, flow_run_id, queued=True)
    run = await store.read_run(run_id)
    assert (run.epoch, run.held) == (epoch, Held.LEASED), "the late link does not take it back"


async def test_a_run_that_was_reopened_has_no_owner(store: Store, db: Connection, workflow: str) -> None:
    run_id = run_workflow(db, workflow).id
    await take(store, run_id)
    await store.cancel_run(run_id, "cancelled")
    await store.reopen_run(run_id)
    assert (await store.read_run(run_id)).held is Held.RELEASED
    assert [each.run_id for each in await store.take_runs([workflow], 10)] == [run_id]


async def test_leases_are_extended_and_losses_are_told(store: Store, db: Connection, workflow: str) -> None:
    held, lost, ended = (run_workflow(db, workflow).id for _ in range(3))
    epochs = [await take(store, run_id) for run_id in (held, lost, ended)]
    for run_id in (held, lost, ended):
        expire(db, run_id)
    await store.take_run(lost, uuid4())
    await store.cancel_run(ended, "cancelled")

    rows = db.execute(
        "SELECT run_id, holds FROM pgflow_prefect.extend_leases(%s, %s, 60)", [[held, lost, ended], epochs]
    ).fetchall()
    assert dict(rows) == {held: "held", lost: "lost", ended: "ended"}  # type: ignore[arg-type]
    assert (await store.read_run(held)).held is Held.LEASED


async def test_a_completed_run_is_held_until_it_is_shown(store: Store, db: Connection, workflow: str) -> None:
    define(db, "single", {"only": []})
    run_id = run_workflow(db, "single").id
    epoch = await take(store, run_id)
    db.execute("SELECT pgflow.complete_step(%s, 'only', '1')", [run_id])
    extend = "SELECT holds FROM pgflow_prefect.extend_leases(ARRAY[%s]::uuid[], ARRAY[%s]::int[], 60)"
    assert value(db, extend, run_id, epoch) == "completed"


async def test_a_failed_run_is_held_while_a_claimed_step_may_still_finish(
    store: Store, db: Connection, workflow: str
) -> None:
    define(db, "pair", {"left": [], "right": []})
    run_id = run_workflow(db, "pair").id
    epoch = await take(store, run_id)
    for step in ("left", "right"):
        await store.claim_step(run_id, epoch, ClaimRequest(TaskKey(step), uuid4(), [], with_payload=False))
    extend = "SELECT holds FROM pgflow_prefect.extend_leases(ARRAY[%s]::uuid[], ARRAY[%s]::int[], 60)"
    db.execute("SELECT pgflow.fail_step(%s, 'left', 'broken')", [run_id])
    assert value(db, extend, run_id, epoch) == "held"
    db.execute("SELECT pgflow.complete_step(%s, 'right', '1')", [run_id])
    assert value(db, extend, run_id, epoch) == "ended"


async def test_enabling_twice_changes_nothing(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    first = await store.enable_workflow("chain")
    assert await store.enable_workflow("chain") == first
    assert await store.list_enabled() == {"chain": first}
    disabled = await store.enable_workflow("chain", enabled=False)
    assert await store.enable_workflow("chain", enabled=False) == disabled


async def test_a_process_never_takes_over_a_run_that_it_executes(store: Store, db: Connection, workflow: str) -> None:
    ids = [run_workflow(db, workflow).id for _ in range(2)]
    for run_id in ids:
        await take(store, run_id)
        expire(db, run_id)
    taken = await store.take_runs([workflow], 10, besides=[ids[0]])
    assert [each.run_id for each in taken] == [ids[1]], "another one that ran out is free"
    assert (await store.read_run(ids[0])).held is Held.EXPIRED


async def interrupt(store: Store, db: Connection, *, flow_run_id: UUID | None = None) -> UUID:
    """Begin a run as `pgflow-prefect run` does, and let the lease run out."""
    run_id = uuid4()
    assert await store.create_run("chain", "1", run_id, flow_run_id or uuid4()) is not None
    expire(db, run_id)
    return run_id


async def take_ids(store: Store, *, adopt: bool = False) -> list[UUID]:
    return [each.run_id for each in await store.take_runs(["chain"], 10, adopt=adopt)]


async def test_a_run_interrupted_before_the_first_enabling_is_left_alone(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    db.execute(LONG_UP)
    older = await interrupt(store, db)
    await store.enable_workflow("chain")
    newer = await interrupt(store, db)
    assert await store.list_older_runs(["chain"]) == [("chain", older)]
    assert ((await store.read_run(older)).is_older, (await store.read_run(newer)).is_older) == (True, False)
    assert await take_ids(store) == [newer]


@pytest.mark.parametrize("times", [1, 2])
async def test_a_run_interrupted_before_a_disabling_goes_on_after_it(store: Store, db: Connection, times: int) -> None:
    define(db, "chain", CHAIN)
    db.execute(LONG_UP)
    await store.enable_workflow("chain")
    run_id = await interrupt(store, db)
    untaken = run_workflow(db, "chain").id
    for _ in range(times):
        await store.enable_workflow("chain", enabled=False)
        assert await take_ids(store) == []
        await store.enable_workflow("chain")
    assert await store.list_older_runs(["chain"]) == [("chain", untaken)]
    assert await take_ids(store) == [run_id]


async def test_a_disabling_that_comes_first_is_no_enabling(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    db.execute(LONG_UP)
    await store.enable_workflow("chain", enabled=False)
    older = await interrupt(store, db)
    await store.enable_workflow("chain")
    assert await take_ids(store) == []
    assert await take_ids(store, adopt=True) == [older]


async def test_a_run_that_a_service_has_adopted_goes_on_without_adopting(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    db.execute(LONG_UP)
    owned, untouched = await interrupt(store, db), run_workflow(db, "chain").id
    await store.enable_workflow("chain")
    assert sorted(await take_ids(store, adopt=True)) == sorted([owned, untouched])
    for run_id in (owned, untouched):
        expire(db, run_id)
    assert sorted(await take_ids(store)) == sorted([owned, untouched])
    assert await store.list_older_runs(["chain"]) == []


async def test_an_older_run_that_is_retried_goes_on(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    db.execute(LONG_UP)
    run_id = await interrupt(store, db)
    await store.cancel_run(run_id, "cancelled")
    await store.enable_workflow("chain")
    await store.reopen_run(run_id)
    assert await take_ids(store) == [run_id]
