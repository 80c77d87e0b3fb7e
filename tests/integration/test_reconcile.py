"""Runs that no process executes any more: PostgreSQL and Prefect are brought together."""

from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import anyio
import pytest
from prefect import task
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelling, Crashed, Running, Scheduled

from pgflow_prefect import Workflow
from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.reconciliation.disagreements import Disagreement, Kind, SetTaskRun, Target
from pgflow_prefect.deployment.reconciliation.reconcile import list_without_prefect, reconcile
from pgflow_prefect.deployment.reconciliation.repair import repair
from pgflow_prefect.models import Held, Status
from tests.conftest import Connection
from tests.integration.conftest import (
    Define,
    await_task_runs,
    read_run,
)
from tests.integration.reconciling import (
    COMPLETED,
    begin_run,
    compare,
    complete_run,
    create_flow_run,
    expire,
    hold,
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


async def test_a_run_that_a_process_executes_is_never_touched(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    run_id, flow_run = await begin_run(store, client, workflow)
    hold(db)

    assert await compare(store, client, apply=True) == []
    await client.set_flow_run_state(flow_run.id, Crashed(), force=True)
    assert await compare(store, client, apply=True) == []
    assert (await store.read_run(run_id)).held is Held.LEASED


async def test_a_process_never_repairs_a_run_that_it_executes_though_its_lease_ran_out(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    run_id, flow_run = await begin_run(store, client, workflow)
    expire(db)
    found = await reconcile(store, client, apply=True, strangers=True, grace=0, lag=0, executing=lambda: [run_id])
    assert found == []
    assert await read_state(client, flow_run) == "Running"


async def test_a_flow_run_whose_process_was_killed_is_shown_as_crashed(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    run_id, flow_run = await begin_run(store, client, workflow)
    working = await client.create_task_run(task(lambda: None), flow_run.id, "0", name="first", state=Running())
    expire(db)

    [found] = await compare(store, client)
    assert (found.kind, found.run_id, found.flow_run_id) == (Kind.ZOMBIE, run_id, flow_run.id)
    assert await repair_all(store, client) == [Kind.ZOMBIE]

    assert await read_state(client, flow_run) == "Crashed"
    assert (await client.read_task_run(working.id)).state_name == "Crashed"
    run = await store.read_run(run_id)
    assert (run.status, run.held) == (Status.PENDING, Held.EXPIRED), "left to the next owner"


async def test_a_flow_run_that_lost_its_run_is_shown_as_crashed(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    run_id, former = await begin_run(store, client, workflow)
    latest = await create_flow_run(store, client, workflow, run_id, Running())
    await store.take_run(run_id, latest.id, force=True)
    hold(db)

    assert await repair_all(store, client) == [Kind.ZOMBIE]

    assert await read_state(client, former) == "Crashed"
    assert await read_state(client, latest) == "Running"


async def test_a_run_whose_flow_run_was_deleted_is_handed_back(
    store: Store, client: PrefectClient, workflow: Workflow
) -> None:
    run_id, flow_run = await submit_run(store, client, workflow)
    assert await compare(store, client) == [], "it may wait"
    await client.delete_flow_run(flow_run.id)

    assert await repair_all(store, client) == [Kind.ORPHANED_RUN]
    assert (await store.read_run(run_id)).held is Held.RELEASED


async def test_a_run_whose_flow_run_crashed_before_it_began_is_handed_back(
    store: Store, client: PrefectClient, workflow: Workflow
) -> None:
    run_id, flow_run = await submit_run(store, client, workflow)
    await client.set_flow_run_state(flow_run.id, Crashed(message="no such image"), force=True)

    assert await repair_all(store, client) == [Kind.ORPHANED_RUN]
    assert (await store.read_run(run_id)).held is Held.RELEASED


async def test_flow_runs_without_a_run_are_ended_where_that_is_wanted(
    store: Store, client: PrefectClient, workflow: Workflow
) -> None:
    running = await create_flow_run(store, client, workflow, uuid4(), Running())
    scheduled = await create_flow_run(store, client, workflow, uuid4(), Scheduled())
    assert await reconcile(store, client, apply=True, grace=0, lag=0) == [], "they may be another database's"

    assert await repair_all(store, client) == [Kind.ORPHANED_FLOW_RUN] * 2
    assert await read_state(client, running) == "Crashed"
    assert await read_state(client, scheduled) == "Cancelled"


async def test_a_flow_run_that_never_took_its_run_is_shown_as_crashed(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    row = db.execute("SELECT id FROM pgflow.run_workflow(%s, '{}')", (workflow.slug,)).fetchone()
    assert row is not None
    flow_run = await create_flow_run(store, client, workflow, UUID(str(row[0])), Running())

    assert await repair_all(store, client) == [Kind.ZOMBIE]
    assert await read_state(client, flow_run) == "Crashed"
    assert read_run(db)[0] == "pending"


async def test_a_cancel_in_prefect_ends_a_run_whose_process_is_gone(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    _, flow_run = await begin_run(store, client, workflow)
    expire(db)
    await client.set_flow_run_state(flow_run.id, Cancelling(), force=True)

    assert await repair_all(store, client) == [Kind.CANCELLED_IN_PREFECT]
    assert read_run(db)[:2] == ("failed", "cancelled in Prefect")
    assert await read_state(client, flow_run) == "Cancelled"


async def test_a_run_that_is_tried_again_is_not_cancelled_a_second_time(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    run_id, flow_run = await begin_run(store, client, workflow)
    expire(db)
    await client.set_flow_run_state(flow_run.id, Cancelling(), force=True)
    await repair_all(store, client)

    await store.reopen_run(run_id)

    assert await compare(store, client, apply=True) == []
    assert read_run(db)[0] == "pending"


async def test_several_processes_may_reconcile_at_once(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    flow_run, tasks = await complete_run(client, db, workflow)
    await client.set_flow_run_state(flow_run.id, Running(), force=True)
    await client.delete_task_run(tasks["second"].id)
    _, zombie = await begin_run(store, client, workflow)
    expire(db)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(lambda: compare(store, client, apply=True))

    assert await compare(store, client) == []
    assert await read_state(client, flow_run) == "Completed"
    assert await read_state(client, zombie) == "Crashed"
    await await_task_runs(client, flow_run, COMPLETED)


async def test_more_runs_than_fit_into_one_batch_are_all_looked_at(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    db.execute("SELECT pgflow.run_workflow(%s, '{}') FROM generate_series(1, 230)", (workflow.slug,))
    db.execute("SELECT pgflow_prefect.take_run(id, NULL, 'a bridge', 1, 3) FROM pgflow.runs")
    db.execute("SELECT pgflow_prefect.link_flow_run(id, 1, gen_random_uuid(), 'a bridge', true) FROM pgflow.runs")

    found = await compare(store, client)

    assert [each.kind for each in found] == [Kind.ORPHANED_RUN] * 230
    assert len({each.run_id for each in found}) == 230


async def test_a_repair_that_prefect_refuses_is_named(store: Store, client: PrefectClient) -> None:
    gone = Disagreement(
        kind=Kind.LAGGING,
        run_id=uuid4(),
        workflow_slug="workflow",
        flow_run_id=None,
        found="a task run is behind",
        repair="task run to Completed",
        actions=(SetTaskRun(uuid4(), Target(StateType.COMPLETED, "completed")),),
    )

    failed = await repair(store, client, gone)

    assert not failed.repaired
    assert failed.error == "Prefect refuses the repair: Not Found"


async def test_without_prefect_the_rows_tell_who_has_vanished(
    store: Store, client: PrefectClient, db: Connection, workflow: Workflow
) -> None:
    run_id, flow_run = await begin_run(store, client, workflow)
    expire(db)

    [found] = await list_without_prefect(store)
    assert (found.kind, found.run_id, found.flow_run_id) == (Kind.ZOMBIE, run_id, flow_run.id)
