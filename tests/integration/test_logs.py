"""What handlers say shows in Prefect, under the task of their step."""

from uuid import UUID

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

from pgflow_prefect import StepContext, Workflow
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]


async def test_logger_and_print_of_sync_and_async_handlers_reach_prefect(define: Define, client: PrefectClient) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["sync_step", "async_step"])

    @workflow.step
    def sync_step(context: StepContext) -> None:
        context.logger.info("logged in a thread")
        print("printed in a thread")

    @workflow.step
    async def async_step(context: StepContext) -> None:
        context.logger.warning("logged on the loop")
        print("printed on the loop")

    await workflow.flow()
    flow_run = await read_flow_run(client, workflow.slug)
    tasks = await await_task_runs(client, flow_run, {"sync_step": "Completed", "async_step": "Completed"})
    expected = {
        ("logged in a thread", tasks["sync_step"].id),
        ("printed in a thread", tasks["sync_step"].id),
        ("logged on the loop", tasks["async_step"].id),
        ("printed on the loop", tasks["async_step"].id),
    }
    shown: set[tuple[str, UUID | None]] = set()
    with anyio.fail_after(30):
        while not expected <= shown:
            logs = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id])))
            shown = {(log.message, log.task_run_id) for log in logs}
            await anyio.sleep(0.1)
