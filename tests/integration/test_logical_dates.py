"""The logical date of a run, in handlers of each kind: of a backfill, of Prefect's own schedule, and of none."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule
from prefect.states import Running

from pgflow_prefect import StepContext, Workflow
from pgflow_prefect.bindings import HttpEndpoint, SqlFunction
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.engine import column, value
from tests.http_server import http_server
from tests.integration.conftest import Define, make_slug
from tests.integration.live import Engine, continue_by

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

DATE = datetime(2026, 3, 2, 9, tzinfo=UTC)  # a Monday
BEFORE = datetime(2026, 2, 27, 9, tzinfo=UTC)  # the Friday before


def make_workflow(define: Define, db: Connection, url: str, seen: list[Any]) -> Workflow:
    """Return a workflow with a step in Python, one of an SQL function, and one of an endpoint."""
    workflow = Workflow(make_slug())
    define(workflow.slug, ["python", "sql", "http"])
    db.execute("CREATE SCHEMA app")
    db.execute("CREATE FUNCTION app.f(input jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT input'")

    @workflow.step
    def python(context: StepContext) -> None:
        seen.append((context.logical_date, context.data_interval_start, context.data_interval_end))

    workflow.bind("sql", SqlFunction("app.f"))
    workflow.bind("http", HttpEndpoint(url))
    return workflow


async def schedule(client: PrefectClient, workflow: Workflow) -> FlowRun:
    """Let Prefect's own scheduler make the flow run of a date."""
    flow = workflow.flow
    weekdays = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 9 * * 1-5", timezone="UTC"), active=False)
    deployment = await client.create_deployment(await client.create_flow(flow), workflow.slug, schedules=[weekdays])
    [known] = await client.read_deployment_schedules(deployment)
    await client.update_deployment_schedule(deployment, known.id, active=True)
    body = {"start_time": DATE.isoformat(), "end_time": (DATE + timedelta(hours=1)).isoformat(), "max_runs": 1}
    await client.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment}, json=body)
    await client.update_deployment_schedule(deployment, known.id, active=False)
    made = await client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])))
    [flow_run] = [each for each in made if each.expected_start_time is not None and each.expected_start_time <= DATE]
    await client.set_flow_run_state(flow_run.id, Running(), force=True)
    return await client.read_flow_run(flow_run.id)


@pytest.mark.thorough
async def test_a_run_that_prefect_scheduled_has_the_date_at_which_it_was_due(
    define: Define, db: Connection, client: PrefectClient
) -> None:
    seen: list[Any] = []
    async with http_server() as server:
        server.respond(200, b"{}")
        workflow = make_workflow(define, db, server.url, seen)
        ended = await continue_by(Engine.OURS, client, workflow.flow, await schedule(client, workflow))
        assert ended.is_completed(), ended
        [request] = server.requests
    assert seen == [(DATE, BEFORE, DATE)]
    dates = {
        "logical_date": "2026-03-02T09:00:00+00:00",
        "interval_start": "2026-02-27T09:00:00+00:00",
        "interval_end": "2026-03-02T09:00:00+00:00",
    }
    assert value(db, "SELECT step_result FROM pgflow.step_states WHERE step_slug = 'sql'") == {"payload": dates}
    assert request.json == {"input": {"payload": dates}}
    headers = ("pgflow-logical-date", "pgflow-data-interval-start", "pgflow-data-interval-end")
    assert [request.headers[name] for name in headers] == [*dates.values()]
    assert value(db, "SELECT payload FROM pgflow.runs") == {}, "what the deployment says stays as it is"
    backfill = value(db, "SELECT pgflow.start_backfill(%s, ARRAY[%s::timestamptz])", workflow.slug, DATE)
    assert column(db, "SELECT state FROM pgflow.backfill_dates WHERE backfill_id = %s", backfill) == ["left"]


async def test_a_run_of_a_backfill_has_its_date_and_any_other_run_has_none(define: Define, db: Connection) -> None:
    seen: list[Any] = []
    async with http_server() as server:
        server.respond(200, b"{}")
        workflow = make_workflow(define, db, server.url, seen)
        dates = [BEFORE, DATE]
        db.execute(
            "SELECT pgflow.start_backfill(%s, %s, payload => '{\"region\": 1.10}', max_active => 2)",
            [workflow.slug, dates],
        )
        [*runs] = column(db, "SELECT id FROM pgflow.runs ORDER BY logical_date")
        flow: Any = workflow.make_flow(Settings())
        await flow(run_id=str(runs[1]))
        await flow({})
        of_backfill, other = server.requests
    assert seen == [(DATE, BEFORE, DATE), (None, None, None)]
    assert b'"region": 1.10' in of_backfill.body
    assert of_backfill.json["input"]["payload"]["interval_start"] == "2026-02-27T09:00:00+00:00"
    assert other.json == {"input": {"payload": {}}}
    assert "pgflow-logical-date" not in other.headers
