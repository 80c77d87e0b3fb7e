"""What handlers say shows in Prefect, under the task of their step."""

import signal
import sys
from typing import NoReturn
from uuid import UUID

import anyio
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.settings import PREFECT_API_URL, temporary_settings

from pgflow_prefect import AsyncStepContext, StepContext, Workflow
from pgflow_prefect.execution.process.signals import Switch, run_service
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
    async def async_step(context: AsyncStepContext) -> None:
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
    with anyio.fail_after(180):
        while not expected <= shown:
            logs = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id])))
            shown = {(log.message, log.task_run_id) for log in logs}
            await anyio.sleep(0.1)


def test_print_reaches_prefect_after_another_run_of_the_process_has_ended(
    define: Define, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # they are the tests' own
    short, long = Workflow(make_slug()), Workflow(make_slug())
    define(short.slug, ["step"])
    define(long.slug, ["step"])
    shown: list[str] = []

    async def run_both(client: PrefectClient) -> None:
        short_works, long_works, short_has_ended = anyio.Event(), anyio.Event(), anyio.Event()

        @short.step("step")
        async def end_first() -> None:
            short_works.set()
            await long_works.wait()

        @long.step("step")
        async def end_last() -> None:
            long_works.set()
            await short_has_ended.wait()
            print("said when the other one has ended")

        async def run_short() -> None:
            await short.flow()
            short_has_ended.set()

        async with anyio.create_task_group() as group:
            group.start_soon(run_short)
            await short_works.wait()
            await long.flow()
        flow_run = await read_flow_run(client, long.slug)
        while "said when the other one has ended" not in shown:
            logs = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id])))
            shown[:] = [log.message for log in logs]
            await anyio.sleep(0.1)

    async def serve(switch: Switch) -> None:
        with temporary_settings({PREFECT_API_URL: prefect_api}), anyio.fail_after(180):  # it is another thread
            async with get_client() as client:
                await run_both(client)

    assert run_service(serve) == 0


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_traceback_begins_at_the_handler_and_ends_where_it_was_raised(
    kind: str, define: Define, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["exits", "fails", "does_not_fit"])

    def look_up(key: str) -> NoReturn:
        raise KeyError(key)

    def fails() -> None:
        look_up("no such customer")

    async def fails_on_the_loop() -> None:
        look_up("no such customer")

    def exits() -> None:
        sys.exit("config file missing")

    async def exits_on_the_loop() -> None:
        sys.exit("config file missing")

    def does_not_fit() -> int:
        return "two"  # type: ignore[return-value]

    workflow.step("fails")(fails if kind == "sync" else fails_on_the_loop)
    workflow.step("exits")(exits if kind == "sync" else exits_on_the_loop)
    workflow.step("does_not_fit")(does_not_fit)

    await workflow.flow(return_state=True)
    flow_run = await read_flow_run(client, workflow.slug)
    wanted = {"KeyError", "SystemExit: config file missing", "ResultInvalidError"}
    shown: list[str] = []
    with anyio.fail_after(180):
        while not all(any(f"failed with exception: {each}" in message for message in shown) for each in wanted):
            logs = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id])))
            shown = [log.message for log in logs]
            await anyio.sleep(0.1)
    traces = [message for message in shown if "Traceback" in message]
    assert len(traces) == 2, "what does not fit is said in a sentence, and so is why the run has failed"
    for trace in traces:
        files = [line.split('"')[1] for line in trace.splitlines() if line.strip().startswith("File ")]
        assert set(files) == {__file__}, trace
