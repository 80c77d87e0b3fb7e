"""What Airflow executes, shown in Prefect with Airflow's times and tries, while it happens."""

from collections.abc import AsyncIterator, Iterator
from datetime import timedelta

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, LogFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun
from pydantic import SecretStr

from pgflow_prefect import Workflow
from pgflow_prefect.bindings import Kind
from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.deployment.reconciliation.reconcile import reconcile
from pgflow_prefect.execution.process.host import open_host
from pgflow_prefect.services.airflow import AirflowObserver
from pgflow_prefect.services.airflow_shadows import AirflowShadows
from pgflow_prefect.settings import Settings
from tests.airflow.replay import DAG_ID, Airflow, read_observed_dag
from tests.databases import Databases
from tests.integration.conftest import await_task_runs

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]

STATES = {
    **dict.fromkeys(("extract", "flaky", "choose", "left", "join", "numbers", "double", "total"), "Completed"),
    **dict.fromkeys(("double[0]", "double[1]", "double[2]"), "Completed"),
    "right": "Skipped",
}


@pytest.fixture
def airflow(databases: Databases) -> Iterator[Airflow]:
    dsn = databases.make(None)
    found = Airflow(dsn, "3.3")
    yield found
    found.close()
    databases.discard(dsn)


@pytest.fixture
async def observed(dsn: str, airflow: Airflow) -> AsyncIterator[tuple[Store, Settings]]:
    settings = Settings(dsn=SecretStr(dsn), airflow_poll_interval=0.1, sweep_interval=0.5)
    async with open_store(settings, size=4) as store:
        await store.replace_definition(None, read_observed_dag("3.3").definition)
        await store.observe_workflow(DAG_ID)
        await store.enable_workflow(DAG_ID)
        await store.add_mirror(DAG_ID)
        await store.bind_step(DAG_ID, "extract", Kind.EXTERNAL, options={"shadow": True})
        yield store, settings


async def await_run(store: Store, client: PrefectClient, state: str) -> FlowRun:
    """Return the flow run that shows the run, once it is in this state."""
    with anyio.fail_after(180):
        while True:
            for run in await store.list_runs(workflow_slug=DAG_ID):
                if run.flow_run_id is not None:
                    shown = await client.read_flow_run(run.flow_run_id)
                    if shown.state_name == state:
                        return shown
            await anyio.sleep(0.1)


async def compare(settings: Settings, client: PrefectClient, flow_run: FlowRun) -> None:
    """Execute a handler beside the task `extract`, and wait until Prefect names what came of it."""
    workflow = Workflow(DAG_ID)

    @workflow.step(shadow=True)
    def extract() -> dict[str, float]:
        print("beside Airflow")
        return {"price": 2}

    async with open_host(settings) as host:
        shadows = AirflowShadows(host, client, {DAG_ID: workflow})
        assert await shadows.look() == 1
    state, lines = None, set[str]()
    task_run_id = None
    while state != "completed in Airflow (shadow: different)" or "beside Airflow" not in lines:
        await anyio.sleep(0.1)
        [found] = await client.read_task_runs(
            flow_run_filter=FlowRunFilter(id={"any_": [flow_run.id]}),
            task_run_filter=TaskRunFilter(name={"any_": ["extract"]}),
        )
        state, task_run_id = found.state and found.state.message, found.id
        logs = await client.read_logs(LogFilter(task_run_id={"any_": [task_run_id]}))
        lines = {each.message.strip() for each in logs}
    assert any("$.rows: missing from the shadow's result" in line for line in lines)


async def test_prefect_shows_a_run_of_airflow_and_its_clear_with_airflows_times(
    observed: tuple[Store, Settings], airflow: Airflow, client: PrefectClient
) -> None:
    store, settings = observed
    service = AirflowObserver(store, client, settings, airflow.dsn)
    await service.register()
    async with anyio.create_task_group() as group:
        group.start_soon(service.run)
        with anyio.fail_after(600):
            looks = airflow.replay("run")
            next(looks)
            begun = await await_run(store, client, "Running")
            assert begun.deployment_id is None, "Prefect can't start such a run"
            for _ in looks:
                pass
            ended = await await_run(store, client, "Failed")
            assert (ended.id, ended.state and ended.state.message) == (begun.id, "failed in Airflow: broken")
            first = await await_task_runs(client, ended, {**STATES, "broken": "Failed", "after_broken": "NotReady"})
            await compare(settings, client, ended)
            clears = airflow.replay("clear")
            next(clears)
            assert (await await_run(store, client, "Running")).id == begun.id
            for _ in clears:
                pass
            await await_run(store, client, "Completed")
        service.stop()
    shown = await await_task_runs(client, begun, {**STATES, "broken": "Completed", "after_broken": "Completed"})
    times = {
        str(task): (begin, end)
        for task, begin, end in airflow.db.execute(
            "SELECT task_id, start_date, end_date FROM task_instance WHERE map_index < 0 AND try_number > 0"
        )
    }
    ends = {name: each.end_time for name, each in shown.items() if name in times}
    assert ends == {name: end for name, (_, end) in times.items()} | {"extract": ends["extract"]}
    assert ends["extract"] - times["extract"][1] == timedelta(microseconds=3), "what names its shadow comes later"
    assert {name: shown[name].run_count for name in ("extract", "flaky", "broken")} == {
        "extract": 1,
        "flaky": 2,
        "broken": 2,
    }
    assert {name: each.id for name, each in first.items()} == {name: each.id for name, each in shown.items()}
    runs = await client.read_flow_runs(flow_run_filter=FlowRunFilter(id={"any_": [begun.id]}))
    assert len(runs) == 1
    assert await reconcile(store, client, apply=False, everything=True, grace=0, lag=0) == []
