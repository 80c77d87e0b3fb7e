"""Schedules with payloads: the payload stays in PostgreSQL, and Prefect gets the id of its row only."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import DeploymentSchedule, FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort

from pgflow_prefect.cli.candidates import Candidate
from pgflow_prefect.cli.deploy import deploy_all, preview_all
from pgflow_prefect.database.schedules import ScheduledPayload
from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.deployment.deployments import Options, Outcome
from pgflow_prefect.deployment.deployments.plan import Plan
from pgflow_prefect.deployment.deployments.schedules import parse_schedule
from pgflow_prefect.deployment.drift import compare_deployment
from pgflow_prefect.deployment.handler_files import load_workflow
from pgflow_prefect.errors import PayloadInvalidError, PgflowPrefectError, PrefectUnavailableError, UsageError
from pgflow_prefect.execution.scheduled_payloads import find_schedule_id
from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.workflow import Workflow
from tests.conftest import Connection
from tests.engine import value
from tests.integration.conftest import Define, make_slug, read_run
from tests.integration.live import Engine, continue_by, execute_by
from tests.integration.waiting import TIMEOUT

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

HANDLERS = """
from pydantic import BaseModel
from pgflow_prefect import Workflow

class Report(BaseModel):
    days: int
    password: str = ""

workflow = Workflow("{slug}")

@workflow.step
def first(payload: Report) -> int:
    return payload.days
"""
NIGHTLY, WEEKLY = "0 3 * * *", "0 5 * * 1"


class Project:
    """A file of handlers, its workflow in the database, and its deployment."""

    def __init__(self, store: Store, client: PrefectClient, directory: Path, slug: str) -> None:
        self.store, self.client, self.directory, self.slug = store, client, directory, slug
        self.source = str(directory / "handlers.py")
        Path(self.source).write_text(HANDLERS.format(slug=slug), encoding="utf-8")
        self.workflow: Workflow = load_workflow(slug, self.source)[0]
        definition = WorkflowDefinition(slug=slug, steps=("first",), deps=())
        self.candidates = [Candidate(self.workflow, self.source, definition)]

    def rewrite(self, handlers: str) -> None:
        """Change the file of handlers, and load it again."""
        Path(self.source).write_text(handlers.format(slug=self.slug), encoding="utf-8")
        self.workflow = load_workflow(self.slug, self.source)[0]
        self.candidates = [replace(self.candidates[0], workflow=self.workflow)]

    def _choose(self, cron: str | None, options: dict[str, Any]) -> Options:
        wish = parse_schedule(cron, None, None, options.pop("remove", False), **options)
        return Options(here=self.directory, schedule=wish)

    async def deploy(self, cron: str | None = None, *, prune: bool = False, **options: Any) -> UUID:
        """Deploy, and check that a second time changes nothing."""
        chosen = self._choose(cron, dict(options))
        done = await deploy_all(self.store, self.candidates, chosen, prune=prune, quiet=True)
        assert not done.failures
        [again] = await self._plan(chosen, prune=prune)
        assert (again.outcome, again.changes) == (Outcome.UNCHANGED, ()), "asked for twice, nothing changes"
        return next(each.deployed.id for each in done.reports if each.deployed.workflow_slug == self.slug)

    async def preview(self, cron: str | None = None, *, prune: bool = False, **options: Any) -> Plan:
        [plan] = await self._plan(self._choose(cron, dict(options)), prune=prune)
        return plan

    async def _plan(self, chosen: Options, *, prune: bool) -> Sequence[Plan]:
        foreseen = await preview_all(self.store, self.candidates, chosen, prune=prune)
        found = [each.plan for each in foreseen.previews]
        return [each for each in found if each.workflow_slug == self.slug]

    async def read_schedules(self, deployment_id: UUID) -> dict[str | None, DeploymentSchedule]:
        return {each.slug: each for each in (await self.client.read_deployment(deployment_id)).schedules}

    async def read_rows(self) -> dict[str, ScheduledPayload]:
        return {each.name: each for each in await self.store.list_schedules([self.slug])}

    async def diff(self) -> list[str]:
        return [each.message for each in compare_deployment(await self.preview(), [self.slug])]


@pytest.fixture
def project(store: Store, client: PrefectClient, tmp_path: Path, define: Define) -> Project:
    slug = make_slug()
    define(slug, ["first"])
    return Project(store, client, tmp_path, slug)


async def test_several_schedules_have_payloads_of_which_prefect_has_the_ids(project: Project) -> None:
    plan = await project.preview(NIGHTLY, name="nightly", payload='{"days": 1, "password": "hush"}')
    assert [str(each) for each in plan.schedules.changes] == [
        f"schedule nightly: cron {NIGHTLY} (UTC)",
        'payload of schedule nightly: {"days":1,"password":"********"}',
    ]
    assert await project.read_rows() == {}, "a plan writes nothing"

    await project.deploy(NIGHTLY, name="nightly", payload='{"days": 1, "password": "hush"}')
    await project.deploy(WEEKLY, payload='{"days": 7}')
    deployment = await project.deploy("0 6 * * *", name="plain")

    rows, schedules = await project.read_rows(), await project.read_schedules(deployment)
    assert {name: row.payload.decode() for name, row in rows.items() if row.payload} == {
        "nightly": {"days": 1, "password": "hush"},
        "default": {"days": 7},
    }
    assert {slug: each.parameters for slug, each in schedules.items()} == {
        f"pgflow nightly: cron {NIGHTLY} (UTC)": {"schedule_id": str(rows["nightly"].id)},
        f"pgflow: cron {WEEKLY} (UTC)": {"schedule_id": str(rows["default"].id)},
        "pgflow plain: cron 0 6 * * * (UTC)": {},
    }
    assert "hush" not in (await project.client.read_deployment(deployment)).model_dump_json()
    assert await project.diff() == []


async def test_a_paused_schedule_stays_paused_whatever_becomes_of_its_payload(project: Project) -> None:
    deployment = await project.deploy(NIGHTLY, name="nightly", payload='{"days": 1}')
    [schedule] = (await project.read_schedules(deployment)).values()
    [row] = (await project.read_rows()).values()
    await project.client.update_deployment_schedule(deployment, schedule.id, active=False)

    await project.deploy(NIGHTLY, name="nightly", payload='{"days": 2}')
    await project.deploy("0 4 * * *", name="nightly")

    [after] = (await project.read_schedules(deployment)).values()
    assert (after.active, after.slug) == (False, "pgflow nightly: cron 0 4 * * * (UTC)")
    assert after.parameters == {"schedule_id": str(row.id)}
    [kept] = (await project.read_rows()).values()
    assert (kept.id, kept.payload) == (row.id, RawJson('{"days": 2}')), "without --payload, the former one stays"


async def test_a_schedule_gets_a_payload_and_is_removed_with_it(project: Project) -> None:
    await project.deploy(NIGHTLY, name="nightly")
    deployment = await project.deploy(NIGHTLY, name="nightly", payload='{"days": 1}')
    [schedule] = (await project.read_schedules(deployment)).values()
    [row] = (await project.read_rows()).values()
    assert schedule.parameters == {"schedule_id": str(row.id)}

    await project.deploy(WEEKLY, name="weekly", payload='{"days": 7}')
    await project.deploy(name="nightly", remove=True)
    assert [*await project.read_rows()] == ["weekly"]
    assert [*await project.read_schedules(deployment)] == [f"pgflow weekly: cron {WEEKLY} (UTC)"]


@pytest.mark.thorough
async def test_diff_names_what_is_left_of_a_schedule_and_prune_deletes_it(project: Project, db: Connection) -> None:
    await project.deploy(NIGHTLY, name="nightly", payload='{"days": 1}')
    deployment = await project.deploy(WEEKLY, name="weekly", payload='{"days": 7}')
    schedules = await project.read_schedules(deployment)
    db.execute("DELETE FROM pgflow_prefect.schedules WHERE name = 'nightly'")
    await project.client.delete_deployment_schedule(deployment, schedules[f"pgflow weekly: cron {WEEKLY} (UTC)"].id)

    gone, left = await project.diff()
    assert gone.startswith("the payload of its schedule nightly is gone from the database, so its runs fail")
    assert left.startswith("Prefect no longer has its schedule weekly, whose payload is in the database")

    await project.deploy()
    assert len(await project.diff()) == 2, "without --prune, both stay"
    await project.deploy(prune=True)
    assert await project.diff() == []
    assert (await project.read_rows(), await project.read_schedules(deployment)) == ({}, {})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"payload": "{}"}, "--payload goes with --cron or --interval"),
        ({"name": "nightly"}, "--schedule-name goes with --cron, --interval or --no-schedule"),
        ({"payload": "{}", "remove": True}, "--payload goes with --cron or --interval"),
        ({"cron": NIGHTLY, "name": "at night"}, "--schedule-name 'at night' is no name of a schedule"),
        ({"cron": NIGHTLY, "name": ""}, "--schedule-name '' is no name of a schedule"),
        ({"cron": NIGHTLY, "name": "x" * 51}, "is no name of a schedule"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], problem: str) -> None:
    given = {"cron": None, "interval": None, "timezone": None, "remove": False, **options}
    with pytest.raises(UsageError, match=problem.replace("(", r"\(")):
        parse_schedule(**given)


async def test_a_payload_that_does_not_fit_is_refused_before_anything_is_written(project: Project) -> None:
    with pytest.raises(PayloadInvalidError, match="can't begin with this payload"):
        await project.deploy(NIGHTLY, payload='{"days": "many"}')
    assert await project.read_rows() == {}


async def test_a_schedule_that_starts_only_failing_runs_is_named(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    await project.deploy(NIGHTLY)
    said = capsys.readouterr().err
    assert "days: Field required" in said
    assert "The schedule starts runs with {}, and each will fail: add --payload" in " ".join(said.split())

    await project.deploy(NIGHTLY, payload='{"days": 3}')
    await project.deploy(WEEKLY)
    assert capsys.readouterr().err == "", "the former payload stays, and fits"
    project.rewrite(HANDLERS.replace("days: int", "nights: int").replace("payload.days", "payload.nights"))
    await project.deploy(WEEKLY)
    assert "with its former payload, and each will fail" in " ".join(capsys.readouterr().err.split())


async def test_a_scheduled_flow_run_begins_with_the_payload_of_the_row(
    engine: Engine, project: Project, db: Connection
) -> None:
    await project.deploy(NIGHTLY, payload='{"days": 3}')
    [row] = (await project.read_rows()).values()
    db.execute("UPDATE pgflow_prefect.schedules SET payload = '{\"days\": 4}'")
    with anyio.fail_after(TIMEOUT):
        state, flow_run = await execute_by(engine, project.workflow.make_flow(), {"schedule_id": str(row.id)})
    assert state.is_completed()
    assert value(db, "SELECT payload FROM pgflow.runs") == {"days": 4}
    assert "days" not in json.dumps(flow_run.parameters)


async def start_by_schedule(project: Project, deployment: UUID) -> FlowRun:
    """Let Prefect create the flow runs of the schedules, and return the first one."""
    body = {"start_time": None, "min_runs": 1}
    await project.client.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment}, json=body)
    runs = await project.client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
        sort=FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC,
    )
    return runs[0]


async def test_a_schedule_that_was_paused_and_resumed_in_the_ui_still_starts_runs_with_its_payload(
    engine: Engine, project: Project, db: Connection
) -> None:
    wish = parse_schedule(None, "1s", None, remove=False, name="often", payload='{"days": 5}')
    options = Options(here=project.directory, schedule=wish)
    [done] = (await deploy_all(project.store, project.candidates, options, quiet=True)).reports
    deployment = done.deployed.id
    [schedule] = (await project.read_schedules(deployment)).values()
    for is_active in (False, True):
        # As servers of Prefect do, which forget the parameters of a schedule that is paused or resumed.
        await project.client.update_deployment_schedule(deployment, schedule.id, active=is_active, parameters={})
    created = await start_by_schedule(project, deployment)
    assert created.parameters == {}
    with anyio.fail_after(TIMEOUT):
        state = await continue_by(engine, project.client, project.workflow.make_flow(), created)
    assert state.is_completed()
    assert value(db, "SELECT payload FROM pgflow.runs") == {"days": 5}


async def test_a_scheduled_run_waits_for_a_server_that_does_not_answer(
    project: Project, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = parse_schedule(None, "1s", None, remove=False, name="often", payload='{"days": 6}')
    options = Options(here=project.directory, schedule=wish)
    [done] = (await deploy_all(project.store, project.candidates, options, quiet=True)).reports
    deployment = done.deployed.id
    [schedule] = (await project.read_schedules(deployment)).values()
    await project.client.update_deployment_schedule(deployment, schedule.id, active=True, parameters={})
    created = await start_by_schedule(project, deployment)
    assert created.parameters == {}
    read, refused = PrefectClient.read_deployment, list[UUID]()

    async def refuse_twice(client: PrefectClient, deployment_id: UUID) -> DeploymentResponse:
        if len(refused) < 2:
            refused.append(deployment_id)
            raise httpx.ReadTimeout("no answer")
        return await read(client, deployment_id)

    monkeypatch.setattr(PrefectClient, "read_deployment", refuse_twice)
    with anyio.fail_after(TIMEOUT):
        state = await continue_by(Engine.OURS, project.client, project.workflow.make_flow(), created)
    assert state.is_completed()
    assert refused == [deployment, deployment]
    assert value(db, "SELECT payload FROM pgflow.runs") == {"days": 6}


async def test_a_scheduled_run_waits_no_longer_than_its_patience(
    project: Project, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = await project.deploy(NIGHTLY, name="nightly", payload='{"days": 6}')
    created = await start_by_schedule(project, deployment)

    async def refuse(client: PrefectClient, deployment_id: UUID) -> DeploymentResponse:
        raise httpx.ReadTimeout("no answer")

    monkeypatch.setattr(PrefectClient, "read_deployment", refuse)
    with pytest.raises(PrefectUnavailableError):
        await find_schedule_id(store, project.client, created, project.slug, patience=0.2)


@pytest.mark.parametrize("which", ["gone", "another workflow's", "no id"])
async def test_a_flow_run_whose_row_is_not_there_fails_with_a_reason(
    which: str, project: Project, define: Define, store: Store, db: Connection
) -> None:
    other = make_slug()
    define(other, ["first"])
    theirs = ScheduledPayload(uuid4(), other, "nightly", RawJson('{"days": 1}'))
    await store.write_schedule(theirs)
    ids = {"gone": str(uuid4()), "another workflow's": str(theirs.id), "no id": "tonight"}
    reasons = {
        "gone": "has no payload: its row in pgflow_prefect.schedules is gone. Set it again with",
        "another workflow's": f"is one of workflow '{other}', not '{project.slug}'",
        "no id": "the parameter schedule_id is 'tonight', and no UUID",
    }
    state, _ = await execute_by(Engine.OURS, project.workflow.make_flow(), {"schedule_id": ids[which]})
    assert state.is_failed()
    assert reasons[which] in str(state.message)
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 0


async def test_a_run_that_has_begun_goes_on_without_the_row(project: Project, db: Connection) -> None:
    await project.deploy(NIGHTLY, payload='{"days": 3}')
    [row] = (await project.read_rows()).values()
    flow = project.workflow.make_flow()
    _, flow_run = await execute_by(Engine.OURS, flow, {"schedule_id": str(row.id)})
    db.execute("DELETE FROM pgflow_prefect.schedules")
    state = await continue_by(Engine.PREFECT, project.client, flow, flow_run)
    assert state.is_completed()
    assert read_run(db)[0] == "completed"


async def test_a_payload_beyond_the_limits_is_refused(project: Project, db: Connection) -> None:
    db.execute("UPDATE pgflow.limits SET payload_bytes = 1000")
    row = ScheduledPayload(uuid4(), project.slug, "nightly", RawJson.of({"days": "x" * 2000}))
    with pytest.raises(PgflowPrefectError, match='the payload of schedule "nightly"'):
        await project.store.write_schedule(row)
