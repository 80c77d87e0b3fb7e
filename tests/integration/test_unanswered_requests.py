"""Requests to a Prefect server that accepts connections and never answers: each one ends."""

import socket
from collections.abc import Awaitable, Callable, Iterator
from uuid import uuid4

import anyio
import pytest
from anyio import CapacityLimiter
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Scheduled
from pydantic import SecretStr

from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.reconciliation import prefect_view
from pgflow_prefect.errors import PrefectUnavailableError
from pgflow_prefect.execution.process.host import open_host
from pgflow_prefect.execution.process.slots import Slot
from pgflow_prefect.models import Held
from pgflow_prefect.services.bridge import Bridge
from pgflow_prefect.services.cancellation import CancellationRequests
from pgflow_prefect.services.worker import Worker
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.engine import define, run_workflow

pytestmark = pytest.mark.anyio

ID = uuid4()

Request = Callable[[Store, PrefectClient], Awaitable[object]]


async def list_open(client: PrefectClient) -> list[object]:
    return [each async for each in prefect_view.list_open_flow_runs(client, ["one"], ID)]


REQUESTS: dict[str, Request] = {
    "cancelling": lambda store, client: CancellationRequests(store, client).find([ID], []),
    "cancelled": lambda store, client: CancellationRequests(store, client).find([], [ID]),
    "was cancelled": lambda store, client: CancellationRequests(store, client).was_cancelled(ID),
    "flow runs": lambda _, client: prefect_view.read_flow_runs(client, [ID], ID),
    "task runs": lambda _, client: prefect_view.read_task_runs(client, [ID]),
    "open task runs": lambda _, client: prefect_view.read_open_task_runs(client, [ID]),
    "open flow runs": lambda _, client: list_open(client),
}


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that accepts connections and never answers, and a patience that ends soon."""
    monkeypatch.setattr("pgflow_prefect.prefect_api.client.PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield f"http://127.0.0.1:{silent.getsockname()[1]}/api"


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS.keys())
async def test_a_request_without_an_answer_ends(store: Store, silent_server: str, request_: Request) -> None:
    unavailable = pytest.raises(PrefectUnavailableError, match=f"{silent_server} can't be used: no answer")
    with temporary_settings({PREFECT_API_URL: silent_server}):
        async with get_client() as client:
            with anyio.fail_after(180), unavailable:
                await request_(store, client)


async def test_a_bridge_hands_a_run_back_that_it_could_not_submit(
    store: Store, db: Connection, dsn: str, silent_server: str
) -> None:
    define(db, "one", {"step": []})
    run = run_workflow(db, "one")
    await store.enable_workflow("one")
    [taken] = await store.take_runs(["one"], 1, adopt=True)
    unavailable = pytest.raises(PrefectUnavailableError, match=f"{silent_server} can't be used: no answer")
    with temporary_settings({PREFECT_API_URL: silent_server}):
        async with get_client() as client:
            bridge = Bridge(store, client, Settings(), dsn, adopt=True)
            bridge.deployments = {"one": ID}

            with anyio.fail_after(180), unavailable:
                await bridge._submit(taken, Slot(CapacityLimiter(1), lambda: None))

    assert (await store.read_run(run.id)).held is Held.RELEASED


async def test_a_worker_gives_up_what_prefect_has_scheduled(dsn: str, silent_server: str) -> None:
    unavailable = pytest.raises(PrefectUnavailableError, match=f"{silent_server} can't be used: no answer")
    with temporary_settings({PREFECT_API_URL: silent_server}):
        async with get_client() as client, open_host(Settings(dsn=SecretStr(dsn))) as host:
            worker = Worker(host, client, {}, concurrency=1, adopt=True)
            flow_run = FlowRun(flow_id=ID, state=Scheduled())

            with anyio.fail_after(180), unavailable:
                await worker._claim(flow_run)
