"""Our deployments on a real Prefect server: what deploying again leaves as people set it, and how they are found."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings

from pgflow_prefect import Workflow
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.deployment.deployments import Deployed, Options, Outcome, deploy, find_deployments
from pgflow_prefect.deployment.handler_files import load_workflow
from pgflow_prefect.errors import PgflowPrefectError, PrefectUnavailableError, UsageError
from tests.integration.conftest import make_slug

pytestmark = pytest.mark.anyio

HANDLERS = """
from pgflow_prefect import Workflow

workflow = Workflow("{slug}")

@workflow.step
def first(payload: dict[str, int]) -> int:
    return payload["n"]

flow = workflow.flow
"""


class Project:
    """A file of handlers in a directory, ready to be deployed."""

    def __init__(self, directory: Path) -> None:
        self.slug = make_slug()
        self.directory = directory
        self.source = str(directory / "handlers.py")
        Path(self.source).write_text(HANDLERS.format(slug=self.slug), encoding="utf-8")
        self.workflow: Workflow = load_workflow(self.slug, self.source)[0]
        self.definition = WorkflowDefinition(slug=self.slug, steps=("first",), deps=())

    async def deploy(self, client: PrefectClient, work_pool: str | None = None) -> Deployed:
        options = Options(work_pool=work_pool, here=self.directory)
        return await deploy(client, self.workflow, self.definition, self.source, options=options)

    def edit(self) -> None:
        """Add a step to the definition."""
        self.definition = WorkflowDefinition(slug=self.slug, steps=("first", "second"), deps=())


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
async def pools(client: PrefectClient) -> AsyncIterator[tuple[str, str]]:
    names = (f"pool-{uuid4().hex[:8]}", f"pool-{uuid4().hex[:8]}")
    for name in names:
        await client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    yield names
    for name in names:
        await client.delete_work_pool(name)


async def test_a_deployment_says_where_the_flow_is_and_what_it_takes(client: PrefectClient, project: Project) -> None:
    made = await project.deploy(client)

    found = await client.read_deployment(made.id)
    assert (made.outcome, made.name, made.work_pool) == (Outcome.CREATED, f"{project.slug}/pgflow", None)
    assert made.url is not None
    assert made.url.endswith(f"/deployments/deployment/{made.id}")
    assert (found.name, found.entrypoint, found.tags) == ("pgflow", "handlers.py:flow", ["pgflow"])
    assert found.version == project.definition.definition_hash
    assert found.enforce_parameter_schema
    assert found.parameter_openapi_schema is not None
    assert set(found.parameter_openapi_schema["properties"]) == {"payload", "run_id", "schedule_id"}
    [step] = found.pull_steps or []
    assert step == {"prefect.deployments.steps.set_working_directory": {"directory": str(project.directory)}}


async def test_deploying_again_changes_nothing_unless_the_workflow_has_changed(
    client: PrefectClient, project: Project
) -> None:
    made = await project.deploy(client)
    before = await client.read_deployment(made.id)

    again = await project.deploy(client)
    assert again == replace(made, outcome=Outcome.UNCHANGED)
    assert (await client.read_deployment(made.id)).updated == before.updated

    project.edit()
    edited = await project.deploy(client)
    assert edited == replace(made, outcome=Outcome.UPDATED)
    assert (await client.read_deployment(made.id)).version == project.definition.definition_hash


async def test_what_people_set_in_prefect_stays(
    client: PrefectClient, project: Project, pools: tuple[str, str]
) -> None:
    made = await project.deploy(client, pools[0])
    schedules = [
        DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(days=1)), active=False, slug="daily"),
        DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(days=7)), active=True),
    ]
    await client.create_deployment_schedules(made.id, schedules)
    settings = DeploymentUpdate(
        paused=True,
        concurrency_limit=3,
        parameters={"payload": {"n": 1}},
        job_variables={"env": {"A": "1"}},
        tags=["theirs"],
        description="their words",
        work_pool_name=pools[1],
        work_queue_name="their-queue",
    )
    await client.update_deployment(made.id, settings)
    before = await client.read_deployment(made.id)

    project.edit()
    for work_pool in (None, pools[1]):
        assert (await project.deploy(client, work_pool)).work_pool == pools[1]

    after = await client.read_deployment(made.id)
    ours = {"version", "tags", "updated", "updated_by", "version_id", "version_info"}
    assert after.model_dump(exclude=ours) == before.model_dump(exclude=ours)
    assert after.tags == ["theirs", "pgflow"]
    assert (after.paused, len(after.schedules), after.work_queue_name) == (True, 2, "their-queue")
    assert after.global_concurrency_limit is not None
    assert after.global_concurrency_limit.limit == 3


async def test_a_work_pool_that_is_named_replaces_the_other_one(
    client: PrefectClient, project: Project, pools: tuple[str, str]
) -> None:
    made = await project.deploy(client, pools[0])
    await client.update_deployment(made.id, DeploymentUpdate(job_variables={"env": {"A": "1"}}))

    assert await project.deploy(client, pools[1]) == replace(made, outcome=Outcome.UPDATED, work_pool=pools[1])

    found = await client.read_deployment(made.id)
    assert (found.work_pool_name, found.job_variables) == (pools[1], {"env": {"A": "1"}})


async def test_an_unknown_work_pool_is_refused_before_anything_is_made(
    client: PrefectClient, project: Project, pools: tuple[str, str]
) -> None:
    with pytest.raises(UsageError, match=f"unknown work pool 'nowhere'.*{pools[0]!r}"):
        await project.deploy(client, "nowhere")

    assert (await find_deployments(client, [project.slug])).chosen == {}


async def test_what_prefect_refuses_is_said_with_its_reason(client: PrefectClient, project: Project) -> None:
    made = await project.deploy(client)
    loose = DeploymentUpdate(enforce_parameter_schema=False, parameters={"run_id": 7})
    await client.update_deployment(made.id, loose)

    with pytest.raises(PgflowPrefectError, match=r"Prefect refuses the deployment of workflow .*7") as caught:
        await project.deploy(client)

    assert not isinstance(caught.value, PrefectUnavailableError)


async def test_an_api_that_does_not_answer_is_named(project: Project) -> None:
    gone = "http://127.0.0.1:9/api"
    with temporary_settings({PREFECT_API_URL: gone}):
        async with get_client() as client:
            with pytest.raises(PrefectUnavailableError, match=f"Prefect's API at {gone} can't be used"):
                await project.deploy(client)
            with pytest.raises(PrefectUnavailableError, match=f"Prefect's API at {gone} can't be used"):
                await find_deployments(client, [project.slug])


async def make_deployments(client: PrefectClient, *names: str) -> tuple[str, dict[str, UUID]]:
    """Create a flow with these deployments, and return its name and their ids."""
    flow = make_slug()
    flow_id = await client.create_flow_from_name(flow)
    return flow, {name: await client.create_deployment(flow_id, name) for name in names}


async def test_a_flow_s_deployment_is_ours_or_the_only_one(client: PrefectClient) -> None:
    ours, of_ours = await make_deployments(client, "nightly", "pgflow", "weekly")
    only, of_only = await make_deployments(client, "nightly")
    several, _ = await make_deployments(client, "weekly", "nightly")
    none, _ = await make_deployments(client)

    found = await find_deployments(client, [ours, only, several, none, "unheard-of"])

    assert {flow: each.id for flow, each in found.chosen.items()} == {ours: of_ours["pgflow"], only: of_only["nightly"]}
    assert found.ambiguous == {several: ("nightly", "weekly")}


async def test_no_deployments_are_found_for_no_flow(client: PrefectClient) -> None:
    await make_deployments(client, "nightly")

    found = await find_deployments(client, [])

    assert (found.chosen, found.ambiguous) == ({}, {})


async def test_all_pages_are_read_and_no_flow_costs_a_request_of_its_own(
    client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, ids = await make_deployments(client, "pgflow", *(f"variant-{number}" for number in range(5)))
    monkeypatch.setattr("pgflow_prefect.deployment.deployments.find._PAGE", 4)
    calls: list[str] = []
    request = client.request

    async def count(method: str, path: str, **options: object) -> object:
        calls.append(path)
        return await request(method, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "request", count)

    found = await find_deployments(client, [flow, *(f"unheard-of-{number}" for number in range(150))])

    assert found.chosen[flow].id == ids["pgflow"], "on the second page, for it is the oldest"
    assert calls == ["/flows/filter", "/deployments/filter", "/deployments/filter", *calls[:2]]
