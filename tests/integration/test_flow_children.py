"""A step that is a run of another workflow, executed by processes, and shown by Prefect."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from pydantic import SecretStr

from pgflow_prefect import Child, Workflow
from pgflow_prefect.deployment.handler_files import BY_ROWS
from pgflow_prefect.execution.in_process import create_flow_run
from pgflow_prefect.execution.process.host import Host, open_host
from pgflow_prefect.models import TaskKey
from pgflow_prefect.prefect_api.ids import find_task_run_id
from pgflow_prefect.services.cancellation import execute_until_cancelled
from pgflow_prefect.services.child_runs import execute_children
from pgflow_prefect.services.worker import Worker
from pgflow_prefect.settings import Settings
from tests.conftest import Connect, Connection
from tests.engine import cancel, get_run, get_state, run_workflow, value
from tests.integration.conftest import await_task_runs, make_slug
from tests.integration.test_flow_rules import push

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]

FLOW_RUN = "SELECT flow_run_id FROM pgflow_prefect.flow_runs WHERE run_id = %s ORDER BY epoch DESC LIMIT 1"


@pytest.fixture
def settlement(pgflow_dsn: str) -> Workflow:
    """A workflow that doubles a number, in two steps."""
    workflow = Workflow(make_slug())

    @workflow.step
    async def pay(payload: int) -> int:
        return payload

    @workflow.step
    async def book(pay: int) -> int:
        return 2 * pay

    return workflow


@pytest.fixture
def orders(settlement: Workflow) -> Workflow:
    """A workflow that runs the other one as its step `settle`."""
    workflow = Workflow(make_slug())

    @workflow.step
    async def look(payload: dict[str, int]) -> dict[str, int]:
        return payload

    workflow.bind("settle", Child(settlement.slug, payload="look.price"), after=["look"])

    @workflow.step
    async def tell(settle: dict[str, int]) -> int:
        return settle["book"]

    return workflow


@asynccontextmanager
async def open_own_host(dsn: str, **settings: Any) -> AsyncIterator[Host]:
    async with open_host(Settings(**{"dsn": SecretStr(dsn), "lease": 600, **settings}), pool_size=6) as host:
        yield host


@asynccontextmanager
async def work(
    dsn: str, client: PrefectClient, *workflows: Workflow, concurrency: int = 5, lease: float = 600
) -> AsyncIterator[Worker]:
    """Have a worker execute runs of these workflows, until the block ends."""
    async with open_own_host(dsn, lease=lease) as host:
        worker = Worker(host, client, {each.slug: (each, BY_ROWS) for each in workflows}, concurrency, adopt=True)
        await worker.register()
        async with anyio.create_task_group() as group:
            group.start_soon(worker.run)
            with anyio.fail_after(180):
                yield worker
            worker.drain()


async def await_end(db: Connection, run_id: UUID) -> str:
    while get_run(db, run_id).status == "pending":
        await anyio.sleep(0.02)
    return get_run(db, run_id).status


async def await_child(db: Connection, run_id: UUID) -> UUID:
    """Return the child of a run, once it has one."""
    while not (found := db.execute("SELECT id FROM pgflow.runs WHERE parent_run_id = %s", [run_id]).fetchall()):
        await anyio.sleep(0.02)
    [[child]] = found
    return UUID(str(child))


async def read_shown(db: Connection, client: PrefectClient, run_id: UUID) -> FlowRun:
    """Return the flow run that shows a run, once there is one."""
    while not (found := db.execute(FLOW_RUN, [run_id]).fetchall()) or found[0][0] is None:
        await anyio.sleep(0.02)
    return await client.read_flow_run(UUID(str(found[0][0])))


async def test_a_worker_executes_a_child_and_prefect_nests_it_below_its_step(
    db: Connection, pgflow_dsn: str, client: PrefectClient, orders: Workflow, settlement: Workflow
) -> None:
    await push(pgflow_dsn, settlement)
    await push(pgflow_dsn, orders)
    # One slot: the parent gives it away while it waits.
    async with work(pgflow_dsn, client, orders, settlement, concurrency=1):
        run_id = run_workflow(db, orders.slug, {"price": 4}).id
        assert await await_end(db, run_id) == "completed"
    assert get_state(db, run_id, "tell").step_result == 8
    child = await await_child(db, run_id)
    parent_shown, shown = await read_shown(db, client, run_id), await read_shown(db, client, child)
    assert shown.parent_task_run_id == find_task_run_id(parent_shown.id, TaskKey("settle"))
    await await_task_runs(client, parent_shown, {"look": "Completed", "settle": "Completed", "tell": "Completed"})
    await await_task_runs(client, shown, {"pay": "Completed", "book": "Completed"})


async def test_one_process_executes_a_run_and_its_nested_children(
    db: Connection, pgflow_dsn: str, client: PrefectClient, orders: Workflow, settlement: Workflow
) -> None:
    whole = Workflow(make_slug())
    whole.bind("order", Child(orders.slug, payload="payload"))
    for workflow in (settlement, orders, whole):
        await push(pgflow_dsn, workflow)
    run_id = run_workflow(db, whole.slug, {"price": 3}).id
    async with open_own_host(pgflow_dsn) as host:
        flow = whole.make_flow(host.settings, host=host)
        created = await create_flow_run(client, flow, whole.slug, run_id, host.installation.id)
        known = {each.slug: each for each in (orders, settlement)}
        with anyio.fail_after(180):
            async with execute_children(host, client, known):
                await execute_until_cancelled(host, client, flow, created.flow_run, run_id)
    assert get_run(db, run_id).status == "completed"
    assert get_state(db, run_id, "order").step_result == {"tell": 6}
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 3


@pytest.mark.thorough
async def test_children_of_a_run_that_fails_by_another_step_end_before_its_command_does(
    db: Connection, pgflow_dsn: str, client: PrefectClient
) -> None:
    failed = anyio.Event()
    inner = Workflow(make_slug())

    @inner.step
    async def pay() -> int:
        await failed.wait()
        return 3

    middle = Workflow(make_slug())
    middle.bind("order", Child(inner.slug))
    whole = Workflow(make_slug())
    whole.bind("settle", Child(middle.slug))

    @whole.step
    async def other() -> None:
        while value(db, "SELECT count(*) < 3 FROM pgflow.runs"):
            await anyio.sleep(0.02)
        raise ValueError("no stock")

    for workflow in (inner, middle, whole):
        await push(pgflow_dsn, workflow)
    run_id = run_workflow(db, whole.slug, {}).id
    async with open_own_host(pgflow_dsn) as host:
        flow = whole.make_flow(host.settings, host=host)
        created = await create_flow_run(client, flow, whole.slug, run_id, host.installation.id)
        with anyio.fail_after(180):
            async with execute_children(host, client, {each.slug: each for each in (inner, middle)}):
                await execute_until_cancelled(host, client, flow, created.flow_run, run_id)
                failed.set()
    assert get_run(db, run_id).status == "failed"
    assert value(db, "SELECT count(*) FROM pgflow.runs WHERE status = 'completed'") == 2
    assert get_state(db, run_id, "settle").step_result == {"order": {"pay": 3}}


@pytest.mark.thorough
async def test_a_run_that_ends_leaves_no_child_pending_that_was_held_meanwhile(
    db: Connection, pgflow_dsn: str, connect: Connect, client: PrefectClient, orders: Workflow, settlement: Workflow
) -> None:
    await push(pgflow_dsn, settlement)
    await push(pgflow_dsn, orders)
    run_id = run_workflow(db, orders.slug, {"price": 3}).id
    held = connect()
    async with open_own_host(pgflow_dsn) as host:
        flow = orders.make_flow(host.settings, host=host)
        created = await create_flow_run(client, flow, orders.slug, run_id, host.installation.id)
        with anyio.fail_after(180):
            # Of another workflow: this process executes no child here, and looks for those that were left.
            async with execute_children(host, client, {"another": Workflow("another")}):
                async with anyio.create_task_group() as group:
                    group.start_soon(execute_until_cancelled, host, client, flow, created.flow_run, run_id)
                    child = await await_child(db, run_id)
                    held.execute("BEGIN")
                    held.execute("SELECT 1 FROM pgflow.runs WHERE id = %s FOR UPDATE", [child])
                    cancel(db, run_id, "not today")
                assert get_run(db, child).status == "pending"
                held.execute("ROLLBACK")  # no look comes between this and the end of the block
    assert get_run(db, child).ended_as == "cancelled"
    assert value(db, "SELECT count(*) FROM pgflow.child_requests") == 0


@pytest.mark.thorough
async def test_cancelling_the_parent_stops_the_handler_of_the_child(
    db: Connection, pgflow_dsn: str, client: PrefectClient
) -> None:
    begun, stopped = anyio.Event(), anyio.Event()
    settlement = Workflow(make_slug())

    @settlement.step
    async def pay() -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            stopped.set()

    orders = Workflow(make_slug())
    orders.bind("settle", Child(settlement.slug))
    await push(pgflow_dsn, settlement)
    await push(pgflow_dsn, orders)
    async with work(pgflow_dsn, client, orders, settlement):
        run_id = run_workflow(db, orders.slug, {}).id
        await begun.wait()
        cancel(db, run_id, "not today")
        await stopped.wait()
        child = await await_child(db, run_id)
        while (await read_shown(db, client, child)).state_name != "Cancelled":
            await anyio.sleep(0.05)
    assert get_run(db, child).error_message == f"its parent run {run_id} was cancelled: not today"


@pytest.mark.thorough
async def test_the_time_out_of_a_step_cancels_its_child(db: Connection, pgflow_dsn: str, client: PrefectClient) -> None:
    settlement = Workflow(make_slug())

    @settlement.step
    async def pay() -> None:
        await anyio.sleep_forever()

    orders = Workflow(make_slug())
    orders.bind("settle", Child(settlement.slug, timeout_seconds=0.3))
    await push(pgflow_dsn, settlement)
    await push(pgflow_dsn, orders)
    # The handler of the child stops when the worker extends its leases: after a third of this.
    async with work(pgflow_dsn, client, orders, settlement, lease=15):
        run_id = run_workflow(db, orders.slug, {}).id
        assert await await_end(db, run_id) == "failed"
        child = await await_child(db, run_id)
        assert await await_end(db, child) == "failed"
    assert get_run(db, child).ended_as == "cancelled"
    assert "0.3 s" in str(get_state(db, run_id, "settle").error_message)


@pytest.mark.thorough
async def test_a_child_that_fails_is_followed_by_another_one(
    db: Connection, pgflow_dsn: str, client: PrefectClient
) -> None:
    calls: list[int] = []
    settlement = Workflow(make_slug())

    @settlement.step
    async def pay() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("not yet")
        return len(calls)

    orders = Workflow(make_slug())
    orders.bind("settle", Child(settlement.slug, retries=1))
    await push(pgflow_dsn, settlement)
    await push(pgflow_dsn, orders)
    async with work(pgflow_dsn, client, orders, settlement):
        run_id = run_workflow(db, orders.slug, {}).id
        assert await await_end(db, run_id) == "completed"
    assert get_state(db, run_id, "settle").step_result == {"pay": 2}
    assert get_state(db, run_id, "settle").attempts == 2
