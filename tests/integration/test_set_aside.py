"""A run that can't begin keeps no worker from the other runs."""

from uuid import UUID

import anyio
import pytest
from prefect.client.orchestration import PrefectClient

from pgflow_prefect.database.diagnosis import DiagnosisStatements
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import PgflowPrefectError
from pgflow_prefect.execution.process.slots import Slot
from pgflow_prefect.models import Held, TakenRun
from pgflow_prefect.services.bridge import Bridge
from pgflow_prefect.services.run_fetcher import RunFetcher
from pgflow_prefect.settings import Settings
from pgflow_prefect.waiting import Wakeup
from tests.conftest import Connection
from tests.engine import CHAIN, cancel, define, get_run, insert_run, reopen, repair, run_workflow, value
from tests.integration.conftest import make_slug

pytestmark = pytest.mark.anyio

# What a user's trigger does where it meets the one run with the payload "bad".
TRIGGERS = {
    "raises an error": "RAISE EXCEPTION 'the stock is empty';",
    "asserts something": "ASSERT false, 'the stock is empty';",
    "divides by zero": "PERFORM 1 / 0;",
    "reads a missing table": "PERFORM FROM stock;",
    "raises our own code": "RAISE EXCEPTION 'the stock is empty' USING ERRCODE = '55000';",
    "raises a code of the moment": "RAISE EXCEPTION 'the stock is empty' USING ERRCODE = '40001';",
    "returns NULL": "RETURN NULL;",
    "returns OLD": "RETURN OLD;",
    "cancels the statement": "PERFORM pg_cancel_backend(pg_backend_pid()), pg_sleep(60);",
}
REASONS = {
    "divides by zero": "division by zero",
    "reads a missing table": 'relation "stock" does not exist',
    "returns NULL": "a trigger or rule on pgflow.runs skipped the update",
    "returns OLD": "a trigger or rule on pgflow.runs skipped the update",
    "cancels the statement": "canceling statement due to user request",
}


WAIT = "SELECT extract(epoch FROM next_try - clock_timestamp())::float FROM pgflow_prefect.set_aside_runs"


@pytest.fixture
def workflow(db: Connection) -> str:
    """An enabled workflow."""
    define(db, "chain", CHAIN)
    db.execute("SELECT pgflow_prefect.enable_workflow('chain')")
    return "chain"


def add_trigger(db: Connection, body: str, timing: str = "BEFORE UPDATE", options: str = "") -> None:
    """Add a trigger on runs that does something for the run with the payload "bad"."""
    db.execute(
        f"""CREATE FUNCTION guard_stock() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN IF NEW.payload = '"bad"' THEN {body} END IF; RETURN NEW; END $$;
            CREATE {"CONSTRAINT" if options else ""} TRIGGER guard_stock {timing} ON pgflow.runs {options}
            FOR EACH ROW EXECUTE FUNCTION guard_stock()""".encode()
    )


async def take(store: Store, wanted: int = 10) -> list[UUID]:
    return [taken.run_id for taken in await store.take_runs(["chain"], wanted)]


def let_try(db: Connection) -> None:
    """Let the time come at which a run that is set aside is tried again."""
    db.execute("UPDATE pgflow_prefect.set_aside_runs SET next_try = clock_timestamp()")


@pytest.mark.parametrize("trigger", TRIGGERS)
async def test_a_trigger_that_refuses_one_run_does_not_stop_workers_from_taking_others(
    store: Store, db: Connection, workflow: str, trigger: str
) -> None:
    bad, good = run_workflow(db, workflow, "bad").id, run_workflow(db, workflow, "good").id
    add_trigger(db, TRIGGERS[trigger])
    assert await take(store) + await take(store) == [good]

    run = await store.read_run(bad)
    assert run.status == "pending"
    assert REASONS.get(trigger, "the stock is empty") in str(run.set_aside)
    assert run.next_try is not None
    db.execute("DROP TRIGGER guard_stock ON pgflow.runs")
    let_try(db)
    assert await take(store) == [bad]
    assert (await store.read_run(bad)).set_aside is None, "it was taken: the error is history"


async def test_a_bridge_submits_the_others_and_goes_on(
    store: Store, db: Connection, dsn: str, client: PrefectClient
) -> None:
    """`serve` has a bridge of the same kind."""
    define(db, slug := make_slug(), CHAIN)
    await store.enable_workflow(slug)
    flow_id = await client.create_flow_from_name(slug)
    await client.create_deployment(flow_id, "pgflow")
    bad, good = run_workflow(db, slug, "bad").id, run_workflow(db, slug, "good").id
    add_trigger(db, TRIGGERS["raises an error"])
    bridge = Bridge(store, client, Settings.model_validate({"dsn": dsn}), dsn, adopt=True)
    await bridge.register()
    await bridge.refresh()
    with anyio.fail_after(180):
        async with anyio.create_task_group() as group:
            group.start_soon(bridge.run)
            while (await store.read_run(good)).held is not Held.QUEUED:
                await anyio.sleep(0.05)
            while (await store.read_run(bad)).set_aside is None:
                await anyio.sleep(0.05)
            later = run_workflow(db, slug, "good").id
            while (await store.read_run(later)).held is not Held.QUEUED:
                await anyio.sleep(0.05)
            bridge.stop()
    assert bridge.failure is None
    assert (await store.read_run(bad)).flow_run_id is None, "Prefect shows no flow run of it"


async def test_a_trigger_that_waits_for_the_commit_keeps_no_worker_from_the_others(
    store: Store, db: Connection, workflow: str
) -> None:
    bad, good = run_workflow(db, workflow, "bad").id, run_workflow(db, workflow, "good").id
    options = "DEFERRABLE INITIALLY DEFERRED"
    add_trigger(db, TRIGGERS["raises an error"], "AFTER UPDATE", options)
    assert await take(store) == [good]
    assert "the stock is empty" in str((await store.read_run(bad)).set_aside)


async def test_the_worker_waits_longer_after_each_try(store: Store, db: Connection, workflow: str) -> None:
    run_workflow(db, workflow, "bad")
    add_trigger(db, TRIGGERS["raises an error"])
    waits: list[float] = []
    for _ in range(12):
        let_try(db)
        assert await take(store) == []
        wait = value(db, WAIT)
        assert isinstance(wait, float)
        waits.append(wait)
    assert await take(store) == [], "the time has not come"
    assert value(db, "SELECT tries FROM pgflow_prefect.set_aside_runs") == 12
    assert waits[2] < waits[5] < waits[8], "doubled each time"
    assert 200 < waits[-1] <= 300


async def test_many_refused_runs_do_not_hide_later_runs(store: Store, db: Connection, workflow: str) -> None:
    for _ in range(30):
        run_workflow(db, workflow, "bad")
    good = run_workflow(db, workflow, "good").id
    add_trigger(db, TRIGGERS["raises an error"])
    assert await take(store, wanted=2) == [good]


async def test_a_refused_run_can_be_cancelled_where_the_trigger_allows_it(
    store: Store, db: Connection, workflow: str
) -> None:
    run_id = run_workflow(db, workflow, "bad").id
    add_trigger(db, "IF NEW.epoch <> OLD.epoch THEN RAISE EXCEPTION 'the stock is empty'; END IF;")
    assert await take(store) == []
    await store.cancel_run(run_id, "cancelled")
    run = await store.read_run(run_id)
    assert (run.status, run.error_message, run.set_aside) == ("failed", "cancelled", None)


async def test_a_refused_cancellation_shows_the_triggers_error(store: Store, db: Connection, workflow: str) -> None:
    run_id = run_workflow(db, workflow, "bad").id
    add_trigger(db, TRIGGERS["raises an error"])
    with pytest.raises(PgflowPrefectError, match="the stock is empty"):
        await store.cancel_run(run_id, "cancelled")
    assert get_run(db, run_id).status == "pending"


async def test_doctor_counts_runs_that_are_set_aside(store: Store, db: Connection, workflow: str) -> None:
    run_id = run_workflow(db, workflow, "bad").id
    run_workflow(db, workflow, "bad")
    add_trigger(db, TRIGGERS["raises an error"])
    await take(store)
    doctor = DiagnosisStatements(store._pool, store.lease_terms)
    first, second = await doctor.list_set_aside(10)
    assert run_id in (first.run_id, second.run_id)
    assert (first.workflow_slug, first.runs) == (workflow, 2)
    assert "the stock is empty" in first.reason
    assert len(await doctor.list_set_aside(1)) == 1


def break_definition(db: Connection, how: str) -> str:
    if how == "no steps":
        db.execute("INSERT INTO pgflow.workflows VALUES ('broken')")
        return 'workflow "broken" has no steps'
    db.execute("ALTER TABLE pgflow.deps DISABLE TRIGGER USER")
    define(db, "broken", {"a": ["b"], "b": ["a"]})
    db.execute("ALTER TABLE pgflow.deps ENABLE TRIGGER USER")
    return 'workflow "broken" has a cycle: a -> b -> a'


@pytest.mark.parametrize("how", ["no steps", "a cycle"])
async def test_an_inserted_run_of_a_broken_workflow_fails_with_the_reason(
    store: Store, db: Connection, workflow: str, how: str
) -> None:
    reason = break_definition(db, how)
    await store.enable_workflow("broken")
    run_id = insert_run(db, "broken")
    good = run_workflow(db, workflow).id
    taken = await store.take_runs(["broken", workflow], 10)
    assert [each.run_id for each in taken] == [good]
    run = get_run(db, run_id)
    assert (run.status, run.error_message) == ("failed", f"the run can't begin: {reason}")
    assert run.finished_at is not None
    assert (await store.read_run(run_id)).error_message == run.error_message


@pytest.mark.parametrize("how", ["no steps", "a cycle"])
def test_an_inserted_run_of_a_broken_workflow_can_be_cancelled_repaired_and_reopened(db: Connection, how: str) -> None:
    break_definition(db, how)
    cancelled, repaired = insert_run(db, "broken"), insert_run(db, "broken")
    assert cancel(db, cancelled, "not needed").error_message == "not needed"
    assert repair(db, repaired).status == "failed"
    db.execute("DELETE FROM pgflow.deps WHERE workflow_slug = 'broken'")
    db.execute("INSERT INTO pgflow.steps VALUES ('broken', 'a') ON CONFLICT DO NOTHING")
    assert reopen(db, repaired).status == "pending", "after its workflow was mended"


async def test_a_run_that_a_process_could_not_begin_is_tried_again_later_each_time(
    store: Store, db: Connection, workflow: str
) -> None:
    bad, good = run_workflow(db, workflow, "bad").id, run_workflow(db, workflow, "good").id
    waits: list[float] = []
    for _ in range(3):
        taken = {each.run_id: each for each in await store.take_runs(["chain"], 10)}
        assert await store.put_off_run(bad, taken[bad].epoch, "KeyError: 'id'")
        assert not await store.put_off_run(bad, taken[bad].epoch + 1, "KeyError: 'id'"), "another owner has it"
        assert await take(store) == []
        waits.append(float(str(value(db, WAIT))))
        let_try(db)
    assert waits[2] > waits[1] > waits[0]
    assert (await store.read_run(bad)).set_aside == "KeyError: 'id'"
    assert (await store.read_run(good)).set_aside is None
    assert await take(store) == [bad]
    assert (await store.read_run(bad)).set_aside is None


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (KeyError("id"), "KeyError: 'id'"),
        (PgflowPrefectError("PostgreSQL: the stock is empty"), "PostgreSQL: the stock is empty"),
    ],
)
async def test_a_fault_with_one_run_ends_no_fetcher(
    fault: Exception, reason: str, store: Store, db: Connection, workflow: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = run_workflow(db, workflow, "bad").id
    handled: list[UUID] = []

    async def handle(taken: TakenRun, slot: Slot) -> None:
        handled.append(taken.run_id)
        if taken.run_id == bad:
            raise fault
        await store.cancel_run(taken.run_id, "done")

    fetcher = RunFetcher(store, handle, 2, 3600.0, False, [workflow], Wakeup())
    with anyio.fail_after(180):
        async with anyio.create_task_group() as group:
            group.start_soon(fetcher.run, group)
            while (await store.read_run(bad)).set_aside is None:
                await anyio.sleep(0.01)
            good = run_workflow(db, workflow, "good").id
            fetcher.wakeup.wake()
            while good not in handled:
                await anyio.sleep(0.01)
            fetcher.stop()
    assert f"run {bad} of 'chain' can't be begun: {reason}" in caplog.text
    assert f"run {bad} of 'chain' is set aside" in caplog.text
    assert reason in str((await store.read_run(bad)).set_aside)
    assert fetcher.free == 2
