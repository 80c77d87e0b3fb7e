"""What `deploy` may be told beyond the workflows, on a real Prefect server: asked for twice, nothing changes."""

import socket
from collections.abc import AsyncIterator, Mapping
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
from pydantic import SecretStr

from pgflow_prefect.blocks import PgflowDatabase
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.deployment.deployments import Deployed, Options, Outcome, deploy, register
from pgflow_prefect.deployment.deployments.apply import Plans, make_plans, open_plans
from pgflow_prefect.deployment.deployments.location import parse_location
from pgflow_prefect.deployment.deployments.plan import Plan
from pgflow_prefect.deployment.deployments.schedules import ScheduleWish, parse_schedule
from pgflow_prefect.deployment.deployments.wanted import NO_LIMIT, NO_POOL, describe_wanted
from pgflow_prefect.deployment.deployments.write import write
from pgflow_prefect.deployment.handler_files import load_workflow
from pgflow_prefect.errors import PrefectUnavailableError, UsageError
from pgflow_prefect.prefect_api.client import check_that_prefect_answers
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


@pytest.fixture
async def block(client: PrefectClient) -> str:
    """The name of a block that says where a database is."""
    name = f"shop-{uuid4().hex[:8]}"
    await PgflowDatabase(dsn=SecretStr("postgresql://nowhere")).asave(name)
    return name


def cron(expression: str, timezone: str | None = None) -> ScheduleWish | None:
    return parse_schedule(expression, None, timezone, remove=False)


async def test_a_new_deployment_gets_everything_at_once(project: Project, pool: str, block: str) -> None:
    made = await project.deploy(
        work_pool=pool, tags=("nightly",), schedule=cron("0 3 * * *"), concurrency_limit=2, image="shop:7", block=block
    )

    found = await project.read(made.id)
    assert found.tags == ["pgflow", "shop", "nightly", OWNED]
    assert (found.work_pool_name, found.version) == (pool, project.definition.definition_hash)
    assert found.job_variables == {"image": "shop:7", "env": {"PGFLOW_BLOCK": block}}
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


async def test_a_schedule_that_a_user_paused_stays_paused_and_theirs_stay(
    project: Project, client: PrefectClient
) -> None:
    made = await project.deploy(schedule=cron("0 3 * * *"))
    theirs = DeploymentScheduleCreate(schedule=CronSchedule(cron="5 5 5 5 *"), active=True, slug="theirs")
    nameless = DeploymentScheduleCreate(schedule=CronSchedule(cron="6 6 6 6 *"), active=False)
    await client.create_deployment_schedules(made.id, [theirs, nameless])
    before = await project.find_schedules(made.id)
    await client.update_deployment_schedule(made.id, before["pgflow: cron 0 3 * * * (UTC)"].id, active=False)

    await project.deploy()
    assert await project.find_schedules(made.id) == {
        **before,
        "pgflow: cron 0 3 * * * (UTC)": (await project.find_schedules(made.id))["pgflow: cron 0 3 * * * (UTC)"],
    }
    await project.deploy(schedule=cron("0 4 * * *", "Europe/Berlin"))

    after = await project.find_schedules(made.id)
    ours = after["pgflow: cron 0 4 * * * (Europe/Berlin)"]
    assert ours.schedule == CronSchedule(cron="0 4 * * *", timezone="Europe/Berlin")
    assert not ours.active
    assert len(after) == 3, "it was renamed, and not made anew"
    assert (after["theirs"], after[None]) == (before["theirs"], before[None])

    await project.deploy(schedule=ScheduleWish(None))
    assert set(await project.find_schedules(made.id)) == {"theirs", None}


async def test_a_schedule_of_an_older_version_is_known_by_its_name(project: Project, client: PrefectClient) -> None:
    made = await project.deploy()
    older = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 3 * * *"), active=True, slug="pgflow")
    await client.create_deployment_schedules(made.id, [older])

    await project.deploy(schedule=cron("0 4 * * *"))

    assert set(await project.find_schedules(made.id)) == {"pgflow: cron 0 4 * * * (UTC)"}


async def test_an_interval_counts_on_from_where_it_began(project: Project) -> None:
    made = await project.deploy()
    hourly = parse_schedule(None, "1h", None, remove=False)
    await project.deploy(schedule=hourly)
    [before] = (await project.find_schedules(made.id)).values()

    await project.deploy(schedule=parse_schedule(None, "60m", None, remove=False))
    assert [*(await project.find_schedules(made.id)).values()] == [before]

    plan = await project.plan(schedule=cron("0 0 * * *"))
    assert [str(each) for each in plan.changes] == ["schedule: every 1:00:00 (UTC) -> cron 0 0 * * * (UTC)"]
    assert isinstance(before.schedule, IntervalSchedule)


async def test_tags_job_variables_and_limits_are_put_beside_what_people_set(
    project: Project, client: PrefectClient, pool: str, block: str
) -> None:
    made = await project.deploy(work_pool=pool)
    theirs = DeploymentUpdate(tags=["theirs"], job_variables={"env": {"A": "1"}, "image": "old", "labels": {"x": "y"}})
    await client.update_deployment(made.id, theirs)

    plan = await project.plan(image="new", block=block, concurrency_limit=3, tags=("mine",))
    assert [str(each) for each in plan.changes] == [
        f"tags: + pgflow, shop, mine, {OWNED}",
        "image: old -> new",
        f"env.PGFLOW_BLOCK: {block}",
        "concurrency limit: none -> 3",
    ]
    await project.deploy(image="new", block=block, concurrency_limit=3, tags=("mine",))

    found = await project.read(made.id)
    assert found.tags == ["theirs", "pgflow", "shop", "mine", OWNED]
    variables = {"env": {"A": "1", "PGFLOW_BLOCK": block}, "image": "new", "labels": {"x": "y"}}
    assert found.job_variables == variables
    await project.deploy()
    assert (await project.read(made.id)).global_concurrency_limit is not None, "what is not named stays"
    await project.deploy(concurrency_limit=NO_LIMIT)
    assert (await project.read(made.id)).global_concurrency_limit is None


async def test_deploy_keeps_the_location_of_the_code_that_a_user_named(project: Project) -> None:
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


async def test_an_unknown_block_of_the_database_is_refused(project: Project, pool: str) -> None:
    with pytest.raises(UsageError, match=r"unknown block pgflow-database/nowhere: .* `pgflow-prefect block nowhere`"):
        await project.plan(block="nowhere", work_pool=pool)


async def test_a_work_pool_is_taken_away_and_everything_else_stays(project: Project, pool: str) -> None:
    made = await project.deploy(work_pool=pool, schedule=cron("0 3 * * *"), image="shop:7")
    plan = await project.plan(work_pool=NO_POOL)
    assert [str(each) for each in plan.changes] == [f"work pool: {pool} -> none"]
    assert (plan.work_pool, plan.schedule) == (None, "cron 0 3 * * * (UTC)")

    again = await project.deploy(work_pool=NO_POOL)

    found = await project.read(made.id)
    assert (again.id, again.work_pool) == (made.id, None)
    assert (found.work_pool_name, found.job_variables) == (None, {"image": "shop:7"})
    assert [each.schedule for each in found.schedules] == [CronSchedule(cron="0 3 * * *", timezone="UTC")]


async def test_a_new_deployment_without_a_work_pool_may_say_so(project: Project) -> None:
    plan = await project.plan(work_pool=NO_POOL, schedule=cron("0 3 * * *"))
    assert (plan.work_pool, plan.schedule) == (None, "cron 0 3 * * * (UTC)")
    assert (await project.read((await project.deploy(work_pool=NO_POOL)).id)).work_pool_name is None


async def test_what_only_a_work_pool_uses_is_refused_without_one(project: Project, block: str) -> None:
    for options, named in (({"image": "shop:7"}, "--image"), ({"image": "a", "block": block}, "--image and --block")):
        with pytest.raises(UsageError, match=f"^{named} would have no effect without a work pool.*{project.slug}"):
            await project.plan(**options)


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
    monkeypatch.setattr("pgflow_prefect.prefect_api.client.PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        unanswered = pytest.raises(PrefectUnavailableError, match=f"{url} can't be used: no answer")
        with temporary_settings({PREFECT_API_URL: url}), anyio.fail_after(180), unanswered:
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


@pytest.fixture
def several(client: PrefectClient, tmp_path: Path) -> list[Project]:
    projects = []
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        projects.append(Project(client, tmp_path / name))
    return projects


async def plan_all(projects: list[Project], **options: Any) -> Plans:
    wanted = [
        describe_wanted(
            each.workflow, each.definition, each.source, Options(here=each.directory, **options), INSTALLATION
        )
        for each in projects
    ]
    return await make_plans(projects[0].client, wanted)


async def test_a_deployment_that_prefect_refuses_does_not_stop_the_others(
    several: list[Project], client: PrefectClient
) -> None:
    made = await several[1].deploy()
    unfit = DeploymentUpdate(enforce_parameter_schema=False, parameters={"payload": {"item": 7}})
    await client.update_deployment(made.id, unfit)

    carried = await (await plan_all(several)).carry_out()

    assert [each.workflow_slug for each in carried.deployed] == [several[0].slug, several[2].slug]
    [failure] = carried.failures
    assert f"Prefect refuses the deployment of workflow {several[1].slug!r}" in str(failure)


async def test_an_unexpected_error_of_one_deployment_does_not_stop_the_others(
    several: list[Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail_once(client: PrefectClient, plan: Plan, flow_ids: Mapping[str, UUID]) -> Deployed:
        if plan.workflow_slug == several[0].slug:
            raise ZeroDivisionError
        return await write(client, plan, flow_ids)

    monkeypatch.setattr("pgflow_prefect.deployment.deployments.apply.write", fail_once)

    carried = await (await plan_all(several)).carry_out()

    assert [each.workflow_slug for each in carried.deployed] == [several[1].slug, several[2].slug]
    assert [str(each) for each in carried.failures] == [
        f"the deployment of workflow {several[0].slug!r} failed: ZeroDivisionError"
    ]


async def test_what_a_user_deletes_in_prefect_meanwhile_is_made_anew_or_named(
    several: list[Project], client: PrefectClient
) -> None:
    made = [await each.deploy(schedule=cron("0 3 * * *")) for each in several]
    change = await plan_all(several[:2], schedule=cron("0 4 * * *"), tags=("x",))
    removal = await plan_all(several[2:], schedule=ScheduleWish(None))
    for each in (several[0], several[2]):
        [schedule] = (await each.find_schedules(made[several.index(each)].id)).values()
        await client.delete_deployment_schedule(made[several.index(each)].id, schedule.id)
    await client.delete_deployment(made[1].id)

    changed, removed = await change.carry_out(), await removal.carry_out()

    assert [each.workflow_slug for each in changed.deployed] == [several[0].slug]
    [scheduled] = (await several[0].find_schedules(made[0].id)).values()
    assert scheduled.schedule == CronSchedule(cron="0 4 * * *", timezone="UTC")
    [failure] = changed.failures
    assert str(failure) == (
        f"the deployment of workflow {several[1].slug!r} was deleted in Prefect just now: deploy it again"
    )
    assert (removed.failures, await several[2].find_schedules(made[2].id)) == ([], {})


async def test_what_a_user_makes_in_prefect_meanwhile_is_updated_and_not_replaced(
    project: Project, client: PrefectClient
) -> None:
    plans = await plan_all([project], tags=("mine",))
    theirs = await project.deploy(schedule=cron("0 3 * * *"))

    carried = await plans.carry_out()

    [done] = carried.deployed
    assert (done.id, done.outcome) == (theirs.id, Outcome.UPDATED)
    assert [str(each) for each in carried.plans[0].changes] == ["tags: + mine"]
    assert set(await project.find_schedules(theirs.id)) == {"pgflow: cron 0 3 * * * (UTC)"}


async def test_a_deployment_whose_workflow_is_back_is_not_pruned(project: Project, client: PrefectClient) -> None:
    installation = uuid4()
    defined: list[str] = []

    async def list_defined() -> list[str]:
        return [*defined]

    options = Options(here=project.directory)
    made = await deploy(
        client, project.workflow, project.definition, project.source, options=options, installation=installation
    )
    async with open_plans([], installation, list_defined) as plans:
        assert [plan.outcome for plan in plans.plans] == [Outcome.DELETED]
        defined.append(project.slug)
        assert (await plans.carry_out()).deployed == []
        assert (await project.read(made.id)).id == made.id
        defined.clear()
        [deleted] = (await plans.carry_out()).deployed
    assert deleted.id == made.id
