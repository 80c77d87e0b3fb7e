"""`deploy --on-failure`: Prefect's server itself tells of a failed run, by a notification block, once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.client.orchestration import PrefectClient
from prefect.events import Automation
from pydantic import SecretStr

from pgflow_prefect.cli.candidates import Candidate
from pgflow_prefect.cli.deploy import check_events, deploy_all, preview_all
from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.deployment.deployments import Options, Outcome
from pgflow_prefect.deployment.deployments.automations import AutomationPlan, check_block_reference, plan_automations
from pgflow_prefect.deployment.deployments.wanted import NO_BLOCK, describe_wanted
from pgflow_prefect.deployment.drift import compare_automation
from pgflow_prefect.deployment.handler_files import load_workflow
from pgflow_prefect.errors import UsageError
from pgflow_prefect.settings import Events, Settings
from tests.conftest import Connection
from tests.http_server import HttpServer
from tests.integration.conftest import Define, make_slug
from tests.integration.waiting import TIMEOUT

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

HANDLERS = """
from pgflow_prefect import Workflow

workflow = Workflow("{slug}")

@workflow.step
async def first(payload: dict[str, str]) -> None:
    if payload["end"] == "fail":
        raise ValueError("no such customer")
    if payload["end"] == "cancel":
        raise AssertionError("it was cancelled before")

flow = workflow.flow.with_options(retries=1)
"""


class Project:
    """A workflow, its deployment, and its automation."""

    def __init__(self, store: Store, client: PrefectClient, directory: Path, slug: str) -> None:
        self.store, self.client, self.directory, self.slug = store, client, directory, slug
        source = str(directory / "handlers.py")
        Path(source).write_text(HANDLERS.format(slug=slug), encoding="utf-8")
        self.workflow = load_workflow(slug, source)[0]
        definition = WorkflowDefinition(slug=slug, steps=("first",), deps=())
        self.candidates = [Candidate(self.workflow, source, definition)]

    async def deploy(self, on_failure: str | None = None, *, prune: bool = False) -> list[AutomationPlan]:
        """Deploy, check that a second time changes no automation, and return the changes."""
        options = Options(here=self.directory, on_failure=on_failure)
        done = await deploy_all(self.store, self.candidates, options, prune=prune, quiet=True)
        assert not done.failures
        again = await preview_all(self.store, self.candidates, options, prune=prune)
        assert again.automations == [], "asked for twice, nothing changes"
        return [each.plan for each in done.automations]

    async def find_automations(self) -> list[Automation]:
        answer = await self.client.request("POST", "/automations/filter", json={"limit": 200})
        found = Automation.model_validate_list(answer.json())
        return [each for each in found if self.slug in each.name]

    async def diff(self, *defined: str) -> list[str]:
        candidate = self.candidates[0]
        installation = await self.store.read_installation()
        options = Options(here=self.directory)
        wanted = describe_wanted(self.workflow, candidate.definition, candidate.source, options, installation)
        if self.slug in defined:
            plans = await plan_automations(self.client, [wanted], installation)
        else:
            plans = await plan_automations(self.client, [], installation, defined)
        return [each.message for plan in plans for each in compare_automation(plan, defined)]


@pytest.fixture
def project(store: Store, client: PrefectClient, tmp_path: Path, define: Define) -> Project:
    slug = make_slug()
    define(slug, ["first"])
    return Project(store, client, tmp_path, slug)


@asynccontextmanager
async def listening() -> AsyncIterator[HttpServer]:
    """An HTTP server on loopback that takes notifications."""
    server = HttpServer()
    server.respond(200)
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as opened:
        server.url = f"http://127.0.0.1:{opened.sockets[0].getsockname()[1]}"
        yield server


async def make_block(url: str) -> str:
    """Make a notification block, and return its type and name."""
    name = f"alerts-{uuid4().hex[:8]}"
    told = {"subject": "{{subject}}", "body": "{{body}}"}
    await CustomWebhookNotificationBlock(name=name, url=url, json_data=told).asave(name)
    return f"custom-webhook/{name}"


@pytest.mark.thorough
async def test_prefect_tells_of_a_failed_run_once_and_not_of_a_cancelled_one(
    project: Project, client: PrefectClient, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening() as server:
        [made] = await project.deploy(await make_block(server.url))
        assert made.outcome is Outcome.CREATED
        run_ids = []
        for events, end in (("ends", "cancel"), ("runs", "fail"), ("ends", "well"), ("all", "fail")):
            monkeypatch.setenv("PGFLOW_EVENTS", events)
            run_id: Any = db.execute(
                "SELECT (pgflow.run_workflow(%s, jsonb_build_object('end', %s::text))).id", (project.slug, end)
            ).fetchone()
            if end == "cancel":
                db.execute("SELECT pgflow.cancel_run(%s, 'cancelled: enough')", run_id)
            flow = project.workflow.make_flow()
            state: Any = await flow(run_id=run_id[0], return_state=True)
            assert state.is_failed() is (end == "fail"), state
            run_ids += [str(run_id[0])] if end == "fail" else []
        with anyio.fail_after(TIMEOUT):
            while len(server.requests) < len(run_ids):
                await anyio.sleep(0.05)
        told = [each.json for each in server.requests]
    assert [run_id for run_id in run_ids for each in told if run_id in each["body"]] == run_ids, told
    assert {each["subject"] for each in told} == {f"Workflow {project.slug} has failed"}
    assert all("ValueError: no such customer" in each["body"] for each in told)
    assert all("/runs/flow-run/" in each["body"] for each in told), told


@pytest.mark.thorough
async def test_an_automation_is_made_changed_and_removed_and_what_people_set_stays(
    project: Project, client: PrefectClient
) -> None:
    first, second = await make_block("http://127.0.0.1:9/"), await make_block("http://127.0.0.1:9/")
    foreseen = await preview_all(project.store, project.candidates, Options(here=project.directory, on_failure=first))
    assert [(each.plan.outcome, *map(str, each.plan.changes)) for each in foreseen.automations] == [
        (Outcome.CREATED, f"on failure: {first}")
    ]
    assert await project.find_automations() == []

    await project.deploy(first)
    [made] = await project.find_automations()
    installation = await project.store.read_installation()
    assert made.tags == ["pgflow", f"pgflow-db-{installation.hex[:8]}"]
    await client.pause_automation(made.id)

    [changed] = await project.deploy(second)
    assert [*map(str, changed.changes)] == [f"on failure: {first} -> {second}"]
    [after] = await project.find_automations()
    assert (after.id, after.enabled) == (made.id, False), "a user has disabled it"
    assert await project.deploy() == [], "without the option, it stays"
    assert await project.diff(project.slug) == []

    [removed] = await project.deploy(NO_BLOCK)
    assert (removed.outcome, await project.find_automations()) == (Outcome.DELETED, [])


@pytest.mark.thorough
async def test_diff_names_an_automation_that_tells_no_more_and_prune_removes_one_of_no_workflow(
    project: Project, client: PrefectClient, db: Connection
) -> None:
    block = await make_block("http://127.0.0.1:9/")
    await project.deploy(block)
    kind, _, name = block.partition("/")
    document = await client.read_block_document_by_name(name, kind)
    await client.delete_block_document(document.id)
    [gone] = await project.diff(project.slug)
    assert "tells of no failure, its block is gone: `pgflow-prefect deploy" in gone

    db.execute("DELETE FROM pgflow.steps")
    db.execute("DELETE FROM pgflow.workflows")
    [left] = await project.diff()
    assert "tells of its failures, and it is gone from the database" in left
    project.candidates = []
    [deleted] = await project.deploy(prune=True)
    assert (deleted.outcome, deleted.is_of_none) == (Outcome.DELETED, True)
    assert await project.find_automations() == []


@pytest.mark.thorough
async def test_an_automation_of_another_installation_is_left_alone(project: Project, client: PrefectClient) -> None:
    block = await make_block("http://127.0.0.1:9/")
    await project.deploy(block)
    other = uuid4()
    candidate = project.candidates[0]

    async def plan(**options: Any) -> list[AutomationPlan]:
        chosen = Options(here=project.directory, on_failure=block, **options)
        wanted = describe_wanted(project.workflow, candidate.definition, candidate.source, chosen, other)
        return await plan_automations(client, [wanted], other, [])

    [made] = await plan()
    assert made.outcome is Outcome.CREATED
    [taken] = await plan(take_over=True)
    assert taken.outcome is Outcome.UPDATED
    assert taken.content is not None
    assert taken.content.tags == ["pgflow", f"pgflow-db-{other.hex[:8]}"]


async def test_a_block_that_can_not_tell_is_refused_before_anything_is_written(project: Project) -> None:
    secret = f"secret-{uuid4().hex[:8]}"
    await Secret(value=SecretStr("x")).asave(secret)
    with pytest.raises(UsageError, match=f"the block secret/{secret} can't send notifications"):
        await project.deploy(f"secret/{secret}")
    with pytest.raises(UsageError, match="unknown block slack-webhook/nowhere"):
        await project.deploy("slack-webhook/nowhere")
    assert await project.find_automations() == []
    for text in ("alerts", "/alerts", "slack-webhook/", "a/b/c"):
        with pytest.raises(UsageError, match="names no block: write TYPE/NAME"):
            check_block_reference(text)


@pytest.mark.parametrize("pattern", ["!{}", "{}*"])
async def test_a_slug_that_prefect_would_read_as_a_pattern_is_refused(
    pattern: str, store: Store, client: PrefectClient, tmp_path: Path, define: Define
) -> None:
    slug = pattern.format(make_slug())
    define(slug, ["first"])
    project = Project(store, client, tmp_path, slug)
    with pytest.raises(UsageError, match=r"can't tell of workflow .* as a pattern"):
        await project.deploy("slack-webhook/alerts")
    assert await project.find_automations() == []


def test_no_automation_is_made_that_no_event_would_start() -> None:
    options = Options(on_failure="slack-webhook/alerts")
    with pytest.raises(UsageError, match="PGFLOW_EVENTS=none sends no events: set PGFLOW_EVENTS=runs"):
        check_events(Settings(events=Events.NONE), options)
    for events in {*Events} - {Events.NONE}:
        check_events(Settings(events=events), options)
    check_events(Settings(events=Events.NONE), Options())
