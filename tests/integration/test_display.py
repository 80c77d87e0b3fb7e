"""What Prefect shows of a run beside its graph: names, artifacts, events."""

import json
import logging
from collections.abc import Callable
from typing import Any
from uuid import UUID

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from pgflow_prefect import Branch, Settings, Workflow
from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import RunFailedError
from pgflow_prefect.execution.reporting import display
from pgflow_prefect.execution.reporting.artifacts import make_key
from pgflow_prefect.prefect_api.event_sender import EventSender, Make, Related
from pgflow_prefect.settings import Artifacts, Events
from tests.conftest import Connection
from tests.integration.conftest import TENURE, Define, await_task_runs, make_slug, read_edges, read_flow_run, read_run

pytestmark = pytest.mark.anyio

DIAMOND = (("left", "top"), ("right", "top"), ("bottom", "left"), ("bottom", "right"))
DEPS = [(upstream, step) for step, upstream in DIAMOND]


@pytest.fixture
def slug(define: Define, pgflow_dsn: str) -> str:
    slug = make_slug()
    define(slug, ["top", "left", "right", "bottom"], DEPS)
    return slug


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """The events of ours that were sent to Prefect's API, in their order."""
    sent: list[Any] = []
    send = EventSender.send

    def note(stream: EventSender, make: Make, related: Related | None = None) -> None:
        sent.append(event := make())
        send(stream, lambda: event, related)

    monkeypatch.setattr(EventSender, "send", note)
    return lambda: [event for event in sent if event.event.startswith("pgflow.")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of a run Prefect's API is asked to show, and is not asked; no run is long, however slow this machine is."""
    monkeypatch.setattr(display, "LONG", 600.0)
    asked: list[str] = []
    monkeypatch.setattr(EventSender, "request", lambda event_sender, act, what: asked.append(what.partition(": ")[2]))
    return asked


def make_workflow(slug: str) -> Workflow:
    workflow = Workflow(slug)

    @workflow.step
    def top(payload: dict[str, Any]) -> int:
        """Begin."""
        return 1

    @workflow.step
    def left(top: int, payload: dict[str, Any]) -> int:
        if payload.get("broken"):
            raise ValueError("no left | [link](x)\nsecond line")
        return top

    @workflow.step
    def right(top: int) -> int:
        return top

    @workflow.step
    def bottom(left: int, right: int) -> int:
        return left + right

    return workflow


async def read_artifacts(client: PrefectClient, flow_run_id: UUID) -> dict[str, Any]:
    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    found = await client.read_artifacts(artifact_filter=chosen)
    return {each.key: each for each in found if each.key}  # Prefect's own, of a state's data, have none


async def await_artifacts(client: PrefectClient, slug: str, count: int = 2) -> dict[str, Any]:
    """Return the artifacts of a workflow's only flow run, once there are so many: the run does not wait for them."""
    flow_run = await read_flow_run(client, slug)
    with anyio.fail_after(180):
        while len(found := await read_artifacts(client, flow_run.id)) < count:
            await anyio.sleep(0.05)
    return found


async def test_a_table_has_the_steps_in_their_order(slug: str, client: PrefectClient, db: Connection) -> None:
    await make_workflow(slug).make_flow(Settings(artifacts=Artifacts.ALL))({})
    artifacts = await await_artifacts(client, slug)
    rows = json.loads(artifacts[f"{make_key(slug)}-steps"].data)
    assert [row["step"] for row in rows] == ["top", "left", "right", "bottom"]
    assert {(row["state"], row["attempts"], row["done by"], row["error"]) for row in rows} == {
        ("Completed", 1, "python", "")
    }
    assert all(row["duration"].endswith(" s") for row in rows)
    run_id = read_run(db)[2]
    assert artifacts[f"{make_key(slug)}-run"].data == f"run `{run_id}`\n\n`pgflow-prefect status {run_id}`"


async def test_a_failed_run_shows_why(slug: str, client: PrefectClient) -> None:
    with pytest.raises(RunFailedError):
        await make_workflow(slug).flow({"broken": True})
    artifacts = await await_artifacts(client, slug)
    rows = {row["step"]: row for row in json.loads(artifacts[f"{make_key(slug)}-steps"].data)}
    assert rows["left"]["state"] == "Failed"
    assert rows["left"]["error"] == "ValueError: no left | [link](x)"
    assert rows["bottom"] == {
        "step": "bottom", "state": "not started", "attempts": 0, "duration": "", "done by": "", "error": ""
    }  # fmt: skip


async def test_steps_that_are_skipped_or_not_run_are_in_the_graph_in_the_table_and_in_the_log(
    pgflow_dsn: str, client: PrefectClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = Workflow(make_slug())

    @workflow.step
    def look() -> Branch[int]:
        return Branch("delta", result=1)

    @workflow.step
    def full(look: int) -> int:
        return look

    @workflow.step
    def delta(look: int) -> int:
        raise ValueError("no delta")

    @workflow.step
    def publish(delta: int) -> int:
        return delta

    @workflow.step(rule="all_done", after=["publish"], fails_run=False)
    def clean_up() -> None: ...

    async with open_pool(pgflow_dsn, size=1, timeout=10) as pool:
        await Store(pool, TENURE).replace_definition(None, workflow.definition)
    monkeypatch.setattr(logging.getLogger("prefect.flow_runs"), "propagate", True)
    with pytest.raises(RunFailedError), caplog.at_level(logging.INFO, "prefect.flow_runs"):
        await workflow.flow()
    flow_run = await read_flow_run(client, workflow.slug)
    states = {"look": "Completed", "full": "Skipped", "delta": "Failed", "publish": "NotReady", "clean_up": "Completed"}
    shown = await await_task_runs(client, flow_run, states)
    for name in ("full", "publish"):
        assert shown[name].start_time is None, "it was never running"
        assert shown[name].expected_start_time == shown[name].end_time, "it has a place, and takes no time"
    edges = {("look", "full"), ("look", "delta"), ("delta", "publish"), ("publish", "clean_up")}
    assert await read_edges(client, flow_run) == edges
    assert "Skipped: full. Not run: publish." in caplog.messages
    artifacts = await await_artifacts(client, workflow.slug)
    rows = json.loads(artifacts[f"{make_key(workflow.slug)}-steps"].data)
    assert {row["step"]: (row["state"], row["error"]) for row in rows} == {
        "look": ("Completed", ""),
        "full": ("Skipped", 'branch not taken by "look"'),
        "delta": ("Failed", "ValueError: no delta"),
        "publish": ("NotReady", "not run: a step that it waits for has failed"),
        "clean_up": ("Completed", ""),
    }


async def test_the_end_of_a_flow_run_comes_before_what_is_shown_of_it(
    slug: str, prefect_api: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EventSender, "give_way", lambda event_sender: asked.append("way is given"))
    await make_workflow(slug).make_flow(Settings(artifacts=Artifacts.ALL))({})
    assert asked == ["its name", "its link", "way is given", "its table"], "and no progress, of a short run"


async def test_a_short_run_that_completes_has_no_artifacts(slug: str, prefect_api: str, asked: list[str]) -> None:
    await make_workflow(slug).flow({})
    assert asked == ["its name"]


async def test_a_run_that_failed_has_artifacts(slug: str, prefect_api: str, asked: list[str]) -> None:
    with pytest.raises(RunFailedError):
        await make_workflow(slug).flow({"broken": True})
    assert asked == ["its name", "its link", "its table"]


async def test_a_run_that_took_long_has_artifacts_though_its_handler_kept_the_event_loop(
    slug: str, prefect_api: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_long(step_slug: str, state_name: str) -> None:
        monkeypatch.setattr(display, "LONG", 0.0)  # the timer of the progress has been set before

    await make_workflow(slug).make_flow(observe=take_long)({})
    assert asked == ["its name", "its link", "its table"]


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("true", Artifacts.ALL),
        ("1", Artifacts.ALL),
        ("false", Artifacts.NONE),
        ("0", Artifacts.NONE),
        ("all", Artifacts.ALL),
        ("notable", Artifacts.NOTABLE),
        ("none", Artifacts.NONE),
    ],
)
def test_the_former_words_for_artifacts_are_understood(
    given: str, means: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_ARTIFACTS", given)
    assert Settings().artifacts is means


def test_an_unknown_word_for_artifacts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGFLOW_ARTIFACTS", "some")
    with pytest.raises(ValueError, match="notable"):
        Settings()


async def test_the_end_of_a_run_that_did_not_complete_is_preceded_by_all_that_led_to_it(
    slug: str, prefect_api: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EventSender, "give_way", lambda event_sender: asked.append("way is given"))
    with pytest.raises(RunFailedError):
        await make_workflow(slug).flow({"broken": True})
    assert "way is given" not in asked


async def test_the_link_leads_to_where_the_settings_say(slug: str, client: PrefectClient, db: Connection) -> None:
    url = "https://app.example.org/{workflow}/{run_id}?tab=steps"
    settings = Settings(run_url=url, artifacts=Artifacts.ALL)
    await make_workflow(slug).make_flow(settings)({})
    artifacts = await await_artifacts(client, slug)
    run_id = read_run(db)[2]
    assert f"(https://app.example.org/{slug}/{run_id}?tab=steps)" in artifacts[f"{make_key(slug)}-run"].data


async def test_a_long_run_shows_its_progress(slug: str, client: PrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "LONG", 0.0)
    workflow = make_workflow(slug)
    seen: list[float] = []
    key = f"{make_key(slug)}-progress"
    waiting = Workflow(slug)
    for handler in workflow.handlers.values():
        if handler.step_slug != "bottom":
            waiting.step(handler.step_slug)(handler.function)

    @waiting.step
    async def bottom() -> None:
        flow_run = await read_flow_run(client, slug)
        with anyio.fail_after(180):
            while key not in (found := await read_artifacts(client, flow_run.id)):
                await anyio.sleep(0.05)
        seen.append(float(found[key].data))

    await waiting.flow({})
    [before] = seen
    assert 0 <= before <= 75
    with anyio.fail_after(180):
        while float((await await_artifacts(client, slug, 3))[key].data) != 100:
            await anyio.sleep(0.05)


async def test_without_artifacts_and_events_nothing_is_sent(
    slug: str, prefect_api: str, told: Callable[[], list[Any]], asked: list[str]
) -> None:
    await make_workflow(slug).make_flow(Settings(artifacts=Artifacts.NONE, events=Events.NONE))({})
    assert asked == ["its name"]
    assert not told()


async def test_a_flow_run_that_prefect_named_is_named_for_its_run(
    slug: str, client: PrefectClient, db: Connection
) -> None:
    workflow = make_workflow(slug)
    await workflow.flow({})
    run_id = str(read_run(db)[2])
    with anyio.fail_after(180):
        while (await read_flow_run(client, slug)).name != f"{slug}-{run_id[:8]}":
            await anyio.sleep(0.05)


async def test_a_name_that_a_person_gave_stays(slug: str, client: PrefectClient, asked: list[str]) -> None:
    flow = make_workflow(slug).flow.with_options(flow_run_name="The one of Monday")
    await flow({})
    assert (await read_flow_run(client, slug)).name == "The one of Monday"
    assert asked == ["its tag"], "the tag of the installation is added, and nothing renamed"


async def test_automations_hear_of_runs_and_steps(
    slug: str, client: PrefectClient, db: Connection, told: Callable[[], list[Any]]
) -> None:
    await make_workflow(slug).make_flow(Settings(events=Events.ALL))({})
    run_id, flow_run = read_run(db)[2], await read_flow_run(client, slug)
    events = told()
    assert [event.event for event in events if event.resource.id == f"pgflow.run.{run_id}"] == [
        "pgflow.run.running",
        "pgflow.run.completed",
    ]
    of_step = [event for event in events if event.resource.id == f"pgflow.step.{run_id}.left"]
    assert [event.event for event in of_step] == ["pgflow.step.running", "pgflow.step.completed"]
    assert of_step[0].resource["pgflow.workflow"] == slug
    related = {each.role: each.id for each in of_step[0].related}
    assert related["flow-run"] == f"prefect.flow-run.{flow_run.id}"
    assert len(events) == 2 + 2 * 4
    assert related["task-run"].startswith("prefect.task-run.")


async def test_automations_get_the_ends_of_steps_by_default(slug: str, told: Callable[[], list[Any]]) -> None:
    with pytest.raises(RunFailedError):
        await make_workflow(slug).flow({"broken": True})
    names = [event.event for event in told()]
    assert names[0] == "pgflow.run.running"
    assert names[-1] == "pgflow.run.failed"
    assert {"pgflow.step.completed", "pgflow.step.failed"} <= set(names[1:-1])
    assert "pgflow.step.running" not in names


async def test_automations_hear_of_a_failure(slug: str, told: Callable[[], list[Any]]) -> None:
    settings = Settings(events=Events.RUNS)
    with pytest.raises(RunFailedError):
        await make_workflow(slug).make_flow(settings)({"broken": True})
    assert [event.event for event in told()] == ["pgflow.run.running", "pgflow.run.failed"]


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "a handler that does not fit": ({}, "step 'top'"),
    "a time-out": ({"timeout_seconds": 0.5}, "the flow took longer than 0.5 s"),
    "every attempt of the flow run": ({"retries": 1}, "ValueError: no left"),
}


@pytest.mark.parametrize("kind", FAILURES)
async def test_automations_hear_once_of_a_failure_of_each_kind(
    slug: str, kind: str, told: Callable[[], list[Any]]
) -> None:
    options, message = FAILURES[kind]
    workflow = make_workflow(slug)
    if kind != "every attempt of the flow run":
        workflow = Workflow(slug)
    if kind == "a handler that does not fit":

        @workflow.step
        def top(of_no_step: int) -> int:
            return of_no_step

    if kind == "a time-out":

        @workflow.step("top")
        async def wait() -> None:
            await anyio.sleep_forever()

    state: Any = await workflow.flow.with_options(**options)({"broken": True}, return_state=True)
    assert state.is_failed()
    [failed] = [event for event in told() if event.event == "pgflow.run.failed"]
    assert message in failed.payload["message"]


@pytest.mark.parametrize(
    ("slug", "key"),
    [
        ("email_campaign", "pgflow-email-campaign"),
        ("Email campaign", "pgflow-email-campaign-"),
        ("日本", "pgflow-"),
        ("a--b", "pgflow-a-b-"),
    ],
)
def test_keys_tell_workflows_apart(slug: str, key: str) -> None:
    found = make_key(slug)
    assert found.startswith(key)
    assert (found == key) == (not key.endswith("-"))
    assert set(found) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize("url", ["https://x/{run}", "https://x/{", "https://x/{0}"])
def test_a_link_that_could_not_be_filled_in_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="run_url"):
        Settings(run_url=url)
