"""Executing a flow in this process by Prefect's engine, or by ours as a worker does it."""

from enum import StrEnum
from typing import Any

from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.flow_engine import run_flow_async
from prefect.states import Pending, Running

from pgflow_prefect.execution.reporting.flow_runs import FlowRunEngine
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter


class Engine(StrEnum):
    """Whose engine executes a flow run."""

    PREFECT = "Prefect's engine"
    OURS = "our engine"

    @property
    def first_state(self) -> State[Any]:
        """The state in which a flow run is created that this engine is to execute."""
        return Pending() if self is Engine.PREFECT else Running()


chosen = Engine.PREFECT
"""The engine of the test that runs now, if the test has the fixture `engine`."""


async def execute_by(
    engine: Engine, flow: Flow[..., Any], parameters: dict[str, Any] | None = None
) -> tuple[State[Any], FlowRun]:
    """Execute a flow, and return how it ended and what Prefect shows of it."""
    async with get_client() as client:
        assert isinstance(client, PrefectClient)
        created = await client.create_flow_run(flow, parameters=parameters, state=engine.first_state)
        ended = await continue_by(engine, client, flow, created)
        return ended, await client.read_flow_run(created.id)


async def continue_by(engine: Engine, client: PrefectClient, flow: Flow[..., Any], created: FlowRun) -> State[Any]:
    """Execute a flow run that was created, and return how it ended."""
    if engine is Engine.OURS:
        return await FlowRunEngine(flow, FlowRunWriter(client), client).execute(created)
    given: Any = created.parameters
    state = await run_flow_async(flow, flow_run=created, parameters=given, return_type="state")
    assert isinstance(state, State)
    return state
