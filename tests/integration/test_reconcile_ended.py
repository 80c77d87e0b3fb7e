"""Runs that have ended, and that Prefect shows otherwise: it is told again."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State, StateType
from prefect.states import Completed, Crashed, Failed, Running
from prefect.utilities.engine import emit_task_run_state_change_event

from pgflow_prefect import Workflow
from pgflow_prefect.database.store import Store
from pgflow_prefect.database.unsettled import UnsettledRun
from pgflow_prefect.deployment.reconciliation.disagreements import Kind, ShownFlowRun
from pgflow_prefect.deployment.reconciliation.reconcile import reconcile
from tests.conftest import Connection
from tests.integration.conftest import (
    Define,
    await_task_runs,
    read_edges,
)
from tests.integration.reconciling import (
    COMPLETED,
    begin_run,
    compare,
    complete_run,
    count_settled,
    expire,
    make_workflow,
    open_impatient_store,
    read_state,
    repair_all,
    submit_run,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[Store]:
    async with open_impatient_store(dsn) as opened:
        yield opened


@pytest.fixture
def workflow(define: Define) -> Workflow:
    return make_workflow(define)


async def test_a_run_that_ended_in_order_is_not_looked_at_again(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    flow_run, _ = await complete_run(client, db, workflow)

    assert await compare(store, client) == []
    assert count_settled(db) == 0, "looking writes nothing"
    assert await compare(store, client, apply=True) == []
    assert count_settled(db) == 1

    await client.set_flow_run_state(flow_run.id, Crashed(), force=True)
    assert await compare(store, client) == []
    [found] = await reconcile(store, client, apply=False, everything=True, grace=0, lag=0)
    assert found.kind is Kind.CRASHED_THEN_COMPLETED


async def test_what_happened_a_moment_ago_is_left_alone(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    flow_run, _ = await complete_run(client, db, workflow)
    await client.set_flow_run_state(flow_run.id, Running(), force=True)

    assert await reconcile(store, client, apply=True, grace=60) == []
    assert count_settled(db) == 0
    assert await read_state(client, flow_run) == "Running"


async def test_a_completed_run_does_not_show_as_crashed(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    flow_run, _ = await complete_run(client, db, workflow)
    await client.set_flow_run_state(flow_run.id, Crashed(), force=True)

    assert await repair_all(store, client) == [Kind.CRASHED_THEN_COMPLETED]
    assert await read_state(client, flow_run) == "Completed"


async def test_a_cancel_in_postgres_ends_the_flow_run(store: Store, client: PrefectClient, workflow: Workflow) -> None:
    run_id, flow_run = await submit_run(store, client, workflow)
    await store.cancel_run(run_id, "cancelled by ann")

    assert await repair_all(store, client) == [Kind.CANCELLED_IN_POSTGRES]
    ended = await client.read_flow_run(flow_run.id)
    assert ended.state is not None
    assert (ended.state_name, ended.state.message) == ("Cancelled", "cancelled by ann")


@pytest.mark.parametrize("shown", [Failed(), Crashed(), Completed()], ids=lambda state: str(state.name))
async def test_a_cancelled_run_does_not_show_another_end(
    shown: State[None], store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    run_id, flow_run = await begin_run(store, client, workflow)
    await store.cancel_run(run_id, "cancelled by ann")
    await store.release_run(run_id, 1)
    await client.set_flow_run_state(flow_run.id, shown, force=True)

    assert await repair_all(store, client) == [Kind.CANCELLED_IN_POSTGRES]
    ended = await client.read_flow_run(flow_run.id)
    assert ended.state is not None
    assert (ended.state_name, ended.state.message) == ("Cancelled", "cancelled by ann")


@pytest.mark.parametrize("shown", [Running(), Crashed()], ids=lambda state: str(state.name))
async def test_a_failure_after_its_process_has_vanished_is_told_once(
    shown: State[None], store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    told: list[tuple[UUID, UUID, str | None]] = []

    def tell(run: UnsettledRun, flow_run: ShownFlowRun) -> None:
        told.append((run.id, flow_run.id, run.error_message))

    run_id, flow_run = await begin_run(store, client, workflow, shown)
    cancelled, _ = await begin_run(store, client, workflow, shown)
    expire(db)
    db.execute("SELECT pgflow.fail_run(%s, 'no file')", [run_id])
    await store.cancel_run(cancelled, "cancelled by ann")

    await reconcile(store, client, apply=False, grace=0, lag=0, tell=tell)
    assert told == [], "looking tells of nothing"
    for everything in (False, False, True):
        await reconcile(store, client, apply=True, everything=everything, grace=0, lag=0, tell=tell)
    assert told == [(run_id, flow_run.id, "no file")]


async def test_what_prefect_did_not_hear_of_is_told_again(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    flow_run, tasks = await complete_run(client, db, workflow)
    edges = await read_edges(client, flow_run)
    await client.set_flow_run_state(flow_run.id, Running(), force=True)
    await client.set_task_run_state(tasks["first"].id, Running(), force=True)
    await client.delete_task_run(tasks["second"].id)

    [found] = await compare(store, client)
    assert found.repair == "flow run to Completed, task run to Completed, task run created as Completed"
    assert await repair_all(store, client) == [Kind.LAGGING]

    shown = await await_task_runs(client, flow_run, COMPLETED)
    assert {name: each.id for name, each in shown.items()} == {name: each.id for name, each in tasks.items()}
    assert await read_state(client, flow_run) == "Completed"
    assert await read_edges(client, flow_run) == edges


async def test_an_event_that_arrives_late_does_not_undo_a_repair(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    flow_run, tasks = await complete_run(client, db, workflow)
    for each in tasks.values():
        await client.delete_task_run(each.id)
    assert await repair_all(store, client) == [Kind.LAGGING]

    earlier = State[None](type=StateType.RUNNING, timestamp=datetime.now(UTC) - timedelta(minutes=1))
    emit_task_run_state_change_event(tasks["first"], None, earlier)

    with anyio.fail_after(180):
        while not any(each.is_running() for each in await client.read_task_run_states(tasks["first"].id)):
            await anyio.sleep(0.1)
    await await_task_runs(client, flow_run, COMPLETED)


async def test_a_run_that_was_taken_again_is_not_settled_by_an_earlier_look(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    run_id, _ = await begin_run(store, client, workflow)
    await store.cancel_run(run_id, "cancelled")
    seen = await store.read_unsettled([run_id])
    await store.reopen_run(run_id)
    await store.take_run(run_id, force=True)
    await store.cancel_run(run_id, "cancelled")

    await store.settle_runs(seen)

    assert count_settled(db) == 0
