"""Flow runs that Prefect schedules become Running by its own policy: slots of concurrency limits hang on that."""

import threading
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.runtime import flow_run as runtime
from prefect.states import Pending, Running, Scheduled

from pgflow_prefect.execution.reporting.flow_runs import FlowRunEngine
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from pgflow_prefect.prefect_api.internals import propose_state
from tests.integration.conftest import make_slug
from tests.integration.live import Engine, continue_by

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]


async def claim(client: PrefectClient, flow_run: FlowRun) -> bool:
    """Claim a flow run as worker and runner do, and tell whether the server let it be Pending."""
    return (await propose_state(client, Pending(), flow_run_id=flow_run.id)).is_pending()


async def create_limited(client: PrefectClient, made: Any) -> list[FlowRun]:
    """Create two flow runs of a deployment that executes one at a time."""
    deployment = await client.create_deployment(await client.create_flow(made), made.name, concurrency_limit=1)
    return [await client.create_flow_run_from_deployment(deployment) for _ in range(2)]


async def test_a_flow_run_holds_its_deployments_slot_until_its_end(engine: Engine, client: PrefectClient) -> None:
    seen: list[str] = []

    @flow(name=make_slug())
    async def note() -> None:
        seen.extend(each.name for each in threading.enumerate() if each.name.startswith("concurrency-lease-renewal-"))
        assert not await claim(client, second), "the slot is held"

    first, second = await create_limited(client, note)
    assert await claim(client, first)
    claimed = await client.read_flow_run(first.id)
    assert claimed.state is not None
    lease: UUID | None = claimed.state.state_details.deployment_concurrency_lease_id
    ended = await continue_by(engine, client, note, claimed)
    assert ended.is_completed(), ended
    assert seen == [f"concurrency-lease-renewal-{lease}"], "its lease is extended as long as it is executed"
    third = await client.create_flow_run_from_deployment(first.deployment_id)  # type: ignore[arg-type]
    assert await claim(client, third), "the slot is free again"


async def test_a_scheduled_flow_run_has_the_states_and_counts_of_prefects_engine(
    engine: Engine, client: PrefectClient
) -> None:
    counts: list[Any] = []

    @flow(name=make_slug(), version="7")
    async def note() -> None:
        counts.append((runtime.run_count, runtime.parameters))

    first, _ = await create_limited(client, note)
    assert await claim(client, first)
    await continue_by(engine, client, note, await client.read_flow_run(first.id))
    shown = await client.read_flow_run(first.id)
    response = await client.request("GET", "/flow_run_states/", params={"flow_run_id": str(first.id)})
    names = [each["name"] for each in sorted(response.json(), key=lambda state: str(state["timestamp"]))]
    assert names == ["Scheduled", "Pending", "Running", "Completed"]
    assert (shown.run_count, shown.flow_version, counts) == (1, "7", [(1, {})])


async def test_our_engine_sends_few_requests_for_a_flow_run(
    client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    send = httpx.AsyncClient.send

    async def note(self: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
        if self is client._client:  # threads have clients of their own
            path = [part for part in request.url.path.split("/") if part and len(part) != len(str(uuid4()))]
            sent.append(f"{request.method} {'/'.join(path)}")
        return await send(self, request, **options)

    @flow(name=make_slug())
    async def nothing() -> None: ...

    engine = FlowRunEngine(nothing, FlowRunWriter(client), client)
    await engine.execute(
        await client.create_flow_run(nothing, state=Running())
    )  # where results go is known from now on
    created = await client.create_flow_run(nothing, state=Running())
    scheduled = await client.create_flow_run(nothing, state=Scheduled())
    monkeypatch.setattr(httpx.AsyncClient, "send", note)
    await engine.execute(created)
    assert sent == ["POST api/flow_runs/set_state"]
    sent.clear()
    await engine.execute(scheduled)
    begin = ["PATCH api/flow_runs", "POST api/flow_runs/set_state", "GET api/flow_runs"]
    assert sent == [*begin, "POST api/flow_runs/set_state"]
