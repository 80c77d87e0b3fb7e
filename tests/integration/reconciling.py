"""What the tests of reconcile share: runs of a small workflow in all kinds of trouble."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.states import Running, Scheduled

from pgflow_prefect import Workflow
from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.statements import LeaseTerms
from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.reconciliation.disagreements import Disagreement, Kind
from pgflow_prefect.deployment.reconciliation.reconcile import reconcile
from pgflow_prefect.prefect_api.ownership import make_ownership_tag
from tests.conftest import Connection
from tests.engine import wait_until_true
from tests.integration.conftest import (
    Define,
    await_task_runs,
    make_slug,
    read_flow_run,
)

COMPLETED = {"first": "Completed", "second": "Completed"}


@asynccontextmanager
async def open_impatient_store(dsn: str) -> AsyncIterator[Store]:
    """Open a store with leases of a second: they hold for their own length after the server's start, too."""
    async with open_pool(dsn, size=4, timeout=10) as pool:
        yield Store(pool, LeaseTerms("the tests", lease=1, max_recoveries=3))


def make_workflow(define: Define) -> Workflow:
    """Define a workflow first -> second, which completes."""
    workflow = Workflow(make_slug())
    define(workflow.slug, ["first", "second"], [("first", "second")])

    @workflow.step
    async def first() -> int:
        return 1

    @workflow.step
    async def second(first: int) -> int:
        return first + 1

    return workflow


async def compare(store: Store, client: PrefectClient, *, apply: bool = False) -> list[Disagreement]:
    return await reconcile(store, client, apply=apply, strangers=True, grace=0, lag=0)


async def repair_all(store: Store, client: PrefectClient) -> list[Kind]:
    """Look first, which changes nothing; then repair everything, after which there is nothing more to be found."""
    seen = await compare(store, client)
    assert [each.kind for each in await compare(store, client)] == [each.kind for each in seen]
    repaired = await compare(store, client, apply=True)
    assert [each.kind for each in repaired] == [each.kind for each in seen]
    assert all(each.repaired for each in repaired), repaired
    assert await compare(store, client, apply=True) == []
    assert await reconcile(store, client, apply=False, everything=True, grace=0, lag=0) == []
    return [each.kind for each in repaired]


async def complete_run(client: PrefectClient, db: Connection, workflow: Workflow) -> tuple[FlowRun, dict[str, TaskRun]]:
    """Run a workflow to its end, and wait until Prefect shows all of it and no process holds it any more."""
    await workflow.flow()
    flow_run = await read_flow_run(client, workflow.flow.name)
    tasks = await await_task_runs(client, flow_run, COMPLETED)
    expire(db)
    return flow_run, tasks


async def begin_run(
    store: Store, client: PrefectClient, workflow: Workflow, state: State[None] | None = None
) -> tuple[UUID, FlowRun]:
    """Begin a run as a process does that is killed before its first step."""
    run_id = uuid4()
    flow_run = await create_flow_run(store, client, workflow, run_id, state or Running())
    await store.create_run(workflow.slug, "{}", run_id, flow_run.id)
    return run_id, flow_run


async def submit_run(store: Store, client: PrefectClient, workflow: Workflow) -> tuple[UUID, FlowRun]:
    """Submit a run as a bridge does."""
    run_id = uuid4()
    epoch = await store.create_run(workflow.slug, "{}", run_id)
    flow_run = await create_flow_run(store, client, workflow, run_id, Scheduled())
    assert epoch is not None
    assert await store.link_flow_run(run_id, epoch, flow_run.id, queued=True)
    return run_id, flow_run


async def create_flow_run(
    store: Store, client: PrefectClient, workflow: Workflow, run_id: UUID, state: State[None]
) -> FlowRun:
    tags = [make_ownership_tag(await store.read_installation())]
    created = await client.create_flow_run(workflow.flow, tags=tags, parameters={"run_id": str(run_id)})
    await client.set_flow_run_state(created.id, state, force=True)
    return created


def expire(db: Connection) -> None:
    """Let all leases run out: each also holds for its own length after the start of PostgreSQL."""
    wait_until_true(db, "SELECT clock_timestamp() > pg_postmaster_start_time() + interval '1 s'")
    db.execute("UPDATE pgflow_prefect.owners SET lease_until = clock_timestamp() - interval '1 hour'")


def hold(db: Connection) -> None:
    """Let no lease run out, however long the test takes."""
    db.execute("UPDATE pgflow_prefect.owners SET lease_until = clock_timestamp() + interval '1 hour'")


def count_settled(db: Connection) -> int:
    return len(db.execute("SELECT FROM pgflow_prefect.owners WHERE settled").fetchall())


async def read_state(client: PrefectClient, flow_run: FlowRun) -> str | None:
    return (await client.read_flow_run(flow_run.id)).state_name
