"""What `deploy` may be told beyond the workflows, on a real Prefect server: asked for twice, nothing changes."""

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.deployments.steps.core import run_steps
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings

from pgflow_prefect.deployment.deployments import Deployed, Options, Outcome, deploy, register
from pgflow_prefect.deployment.deployments.apply import make_plans
from pgflow_prefect.deployment.deployments.find import check_that_prefect_answers
from pgflow_prefect.deployment.deployments.location import parse_location
from pgflow_prefect.deployment.deployments.plan import Plan
from pgflow_prefect.deployment.deployments.schedules import ScheduleWish, parse_schedule
from pgflow_prefect.deployment.deployments.wanted import NO_LIMIT, describe_wanted
from pgflow_prefect.deployment.handler_files import load_workflow
from pgflow_prefect.errors import PrefectUnavailableError, UsageError
from pgflow_prefect.models import WorkflowDefinition
from tests.integration.conftest import make_slug

pytestmark = pytest.mark.anyio

HANDLERS = """
from pydantic import BaseModel
from pgflow_prefect import Workflow

class Order(BaseModel):
    item: str
    count: int = 1

workflow = Workflow("{slug}", tags=["shop"])

@workflow.step
def first(payload: Order) -> int:
    return payload.count
"""
INSTALLATION = uuid4()
OWNED = f"pgflow-db-{INSTALLATION.hex[:8]}"


class Project:
    """A file of handlers, and the deployment that is made of it with some options."""

    def __init__(self, client: PrefectClient, directory: Path) -> None:
        self.client = client
        self.directory = directory
        self.slug = make_slug()
        self.source = str(directory / "handlers.py")
        Path(self.source).write_text(HANDLERS.format(slug=self.slug), encoding="utf-8")
        self.workflow = load_workflow(self.slug, self.source)[0]
        self.definition = WorkflowDefinition(slug=self.slug, steps=("first",), deps=())

    async def deploy(self, **options: Any) -> Deployed:
        chosen = Options(here=self.directory, **options)
        made = await deploy(
            self.client, self.workflow, self.definition, self.source, options=chosen, installation=INSTALLATION
        )
        again = await self.plan(**options)
        assert (again.outcome, again.changes) == (Outcome.UNCHANGED, ()), "asked for twice, nothing changes"
        return made

    async def plan(self, **options: Any) -> Plan:
        chosen = Options(here=self.directory, **options)
        wanted = describe_wanted(self.workflow, self.definition, self.source, chosen, INSTALLATION)
        [plan] = (await make_plans(self.client, [wanted])).plans
        return plan

    async def read(self, deployment_id: UUID) -> DeploymentResponse:
        return await self.client.read_deployment(deployment_id)

    async def find_schedules(self, deployment_id: UUID) -> dict[str | None, DeploymentSchedule]:
        return {each.slug: each for each in (await self.read(deployment_id)).schedules}


@pytest.fixture
def project(client: PrefectClient, tmp_path: Path) -> Project:
    return Project(client, tmp_path)


@pytest.fixture
async def pool(client: PrefectClient) -> AsyncIterator[str]:
    name = f"pool-{uuid4().hex[:8]}"
    await client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    yield name
    await client.delete_work_pool(name)


def cron(expression: str, timezone: str | None = None) -> ScheduleWish | None:
    return parse_schedule(expression, None, timezone, remove=False)


async def test_a_new_deployment_gets_everything_at_once(project: Project, pool: str) -> None:
    made = await project.deploy(
        work_pool=pool, tags=("nightly",), schedule=cron("0 3 * * *"), concurrency_limit=2, image="shop:7", block="shop"
    )

    found = await project.read(made.id)
    assert found.tags == ["pgflow", "shop", "nightly", OWNED]
    assert (found.work_pool_name, found.version) == (pool, project.definition.definition_hash)
    assert found.job_variables == {"image": "shop:7", "env": {"PGFLOW_BLOCK": "shop"}}
    assert found.global_concurrency_limit is not None
    assert found.global_concurrency_limit.limit == 2
    assert [each.schedule for each in found.schedules] == [CronSchedule(cron="0 3 * * *", timezone="UTC")]


async def test_prefect_refuses_a_payload_that_does_not_fit_the_handler(project: Project, client: PrefectClient) -> None:
    made = await project.deploy()
    with pytest.raises(PrefectHTTPStatusError) as refused:
        await client.create_flow_run_from_deployment(made.id, parameters={"payload": {"item": 7}})

    assert refused.value.response.status_code == 409
    assert "'item'" in refused.value.response.text or "payload.item" in refused.value.response.text
    for parameters in ({"payload": {"item": "tea"}}, {"run_id": str(uuid4())}):
        assert (await client.create_flow_run_from_deployment(made.id, parameters=parameters)).deployment_id == made.id


async def test_a_schedule_that_somebody_paused_stays_paused_and_theirs_stay(
    project: Project, client: PrefectClient
) -> None:
    made = await project.deploy(schedule=cron("0 3 * * *"))
    theirs = DeploymentScheduleCreate(schedule=CronSchedule(cron="5 5 5 5 *"), active=True, slug="theirs")
    nameless = DeploymentScheduleCreate(schedule=CronSchedule(cron="6 6 6 6 *"), active=False)
    await client.create_deployment_schedules(made.id, [theirs, nameless])
    before = await project.find_schedules(made.id)
    await client.update_deployment_schedule(made.id, before["pgflow"].id, active=False)

    await project.deploy()
    assert (await project.find_schedules(made.id))["pgflow"].schedule == before["pgflow"].schedule
    await project.deploy(schedule=cron("0 4 * * *", "Europe/Berlin"))

    after = await project.find_schedules(made.id)
    assert after["pgflow"].schedule == CronSchedule(cron="0 4 * * *", timezone="Europe/Berlin")
    assert not after["pgflow"].active
    assert (after["theirs"], after[None]) == (before["theirs"], before[None])

    await project.deploy(schedule=ScheduleWish(None))
    assert set(await project.find_schedules(made.id)) == {"theirs", None}


async def test_an_interval_counts_on_from_where_it_began(project: Project) -> None:
    made = await project.deploy()
    hourly = parse_schedule(None, "1h", None, remove=False)
    await project.deploy(schedule=hourly)
    before = (await project.find_schedules(made.id))["pgflow"]

    await project.deploy(schedule=parse_schedule(None, "60m", None, remove=False))
    assert (await project.find_schedules(made.id))["pgflow"] == before

    plan = await project.plan(schedule=cron("0 0 * * *"))
    assert [str(each) for each in plan.changes] == ["schedule: every 1:00:00 (UTC) -> cron 0 0 * * * (UTC)"]
    assert isinstance(before.schedule, IntervalSchedule)


async def test_tags_job_variables_and_limits_are_put_beside_what_people_set(
    project: Project, client: PrefectClient
) -> None:
    made = await project.deploy()
    theirs = DeploymentUpdate(tags=["theirs"], job_variables={"env": {"A": "1"}, "image": "old", "labels": {"x": "y"}})
    await client.update_deployment(made.id, theirs)

    plan = await project.plan(image="new", block="shop", concurrency_limit=3, tags=("mine",))
    assert [str(each) for each in plan.changes] == [
        f"tags: + pgflow, shop, mine, {OWNED}",
        "image: old -> new",
        "env.PGFLOW_BLOCK: shop",
        "concurrency limit: none -> 3",
    ]
    await project.deploy(image="new", block="shop", concurrency_limit=3, tags=("mine",))

    found = await project.read(made.id)
    assert found.tags == ["theirs", "pgflow", "shop", "mine", OWNED]
    variables = {"env": {"A": "1", "PGFLOW_BLOCK": "shop"}, "image": "new", "labels": {"x": "y"}}
    assert found.job_variables == variables
    await project.deploy()
    assert (await project.read(made.id)).global_concurrency_limit is not None, "what is not named stays"
    await project.deploy(concurrency_limit=NO_LIMIT)
    assert (await project.read(made.id)).global_concurrency_limit is None


async def test_where_the_code_is_stays_once_somebody_said_so(project: Project) -> None:
    location = parse_location("git+https://example.org/shop.git@main", None, None)
    made = await project.deploy(location=location)
    cloned = (await project.read(made.id)).pull_steps
    [step] = cloned or []
    assert step["prefect.deployments.steps.git_clone"]["repository"] == "https://example.org/shop.git"

    await project.deploy()
    assert (await project.read(made.id)).pull_steps == cloned
    await project.deploy(location=parse_location(None, None, "/app"))
    await project.deploy()
    found = await project.read(made.id)
    assert found.entrypoint == "handlers.py:workflow.flow"
    [step] = found.pull_steps or []
    assert step["prefect.deployments.steps.set_working_directory"]["directory"] == "/app"

    plan = await project.plan(location=parse_location(None, None, "."))
    assert [str(each) for each in plan.changes] == [f"code: /app -> {project.directory}"]


async def test_an_unknown_block_of_credentials_is_refused(project: Project) -> None:
    location = parse_location("https://example.org/shop.git", "secret/nowhere", None)

    with pytest.raises(UsageError, match="unknown block secret/nowhere"):
        await project.plan(location=location)


async def test_a_file_that_is_nowhere_in_the_repository_is_refused(project: Project, tmp_path: Path) -> None:
    project.directory = tmp_path / "below"
    project.directory.mkdir()

    with pytest.raises(UsageError, match="is not beneath"):
        await project.plan(location=parse_location("https://example.org/shop.git", None, None))


async def test_a_worker_s_deployment_is_known_as_made_for_its_database(
    project: Project, client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.directory)

    made = await register(client, project.workflow, project.definition, project.source, installation=INSTALLATION)

    assert OWNED in (await project.read(made.id)).tags
    assert (await project.plan()).outcome is Outcome.UNCHANGED


async def test_a_server_that_says_nothing_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgflow_prefect.deployment.deployments.find._PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        unanswered = pytest.raises(PrefectUnavailableError, match=f"{url} can't be used: no answer")
        with temporary_settings({PREFECT_API_URL: url}), anyio.fail_after(20), unanswered:
            await check_that_prefect_answers()


async def test_a_worker_finds_the_code_in_the_repository_s_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, elsewhere = tmp_path / "repository", tmp_path / "elsewhere"
    (repository / "backend").mkdir(parents=True)
    elsewhere.mkdir()
    (repository / "backend" / "handlers.py").write_text("")
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], [*author, "commit", "-q", "-m", "All of it."]):
        await anyio.run_process(["git", *command], cwd=repository)
    location = parse_location(f"git+file://{repository}@main", None, "backend")
    assert location is not None
    monkeypatch.chdir(elsewhere)

    await run_steps(location.make_steps(tmp_path))

    assert Path.cwd() != repository / "backend"
    assert Path.cwd().is_relative_to(elsewhere)
    assert await anyio.Path("handlers.py").is_file()


async def test_what_prefect_refuses_of_one_keeps_the_others_from_nothing(client: PrefectClient, tmp_path: Path) -> None:
    projects = []
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        projects.append(Project(client, tmp_path / name))
    made = await projects[1].deploy()
    unfit = DeploymentUpdate(enforce_parameter_schema=False, parameters={"payload": {"item": 7}})
    await client.update_deployment(made.id, unfit)
    wanted = [
        describe_wanted(each.workflow, each.definition, each.source, Options(here=each.directory), INSTALLATION)
        for each in projects
    ]

    carried = await (await make_plans(client, wanted)).carry_out()

    assert [each.workflow_slug for each in carried.deployed] == [projects[0].slug, projects[2].slug]
    [failure] = carried.failures
    assert f"Prefect refuses the deployment of workflow {projects[1].slug!r}" in str(failure)
