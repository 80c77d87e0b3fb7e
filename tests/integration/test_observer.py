"""What pgflow's own workers execute, shown in Prefect from its start."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.states import Cancelling
from pydantic import SecretStr

from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.errors import PgflowPrefectError, PrefectRefusedError, PrefectUnavailableError
from pgflow_prefect.models import TakenRun
from pgflow_prefect.services import flow_recorder, observer
from pgflow_prefect.services.observer import Observer
from pgflow_prefect.services.recording import send_events
from pgflow_prefect.services.submission import create_observed
from pgflow_prefect.settings import Settings
from tests.contract.conftest import open_released
from tests.contract.worlds import BrokenError, ReleasedWorld
from tests.databases import Databases
from tests.edge_worker import EdgeTask, EdgeWorker
from tests.integration.conftest import await_task_runs, read_edges
from tests.released_lab import FAKE, PACKAGE, ReleasedFlows, list_sources

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]

MAPPED = {"list": [], "resize": ["list"], "report": ["resize"]}


@pytest.fixture(scope="module")
def templates() -> dict[str, Any]:
    return {}


WITH_SKIPS = [each for each in list_sources() if each != PACKAGE]
"""Versions that skip steps: our stand-in, and those that were named."""


@pytest.fixture(params=[FAKE])
def released(
    request: pytest.FixtureRequest, databases: Databases, templates: dict[str, Any]
) -> Iterator[ReleasedWorld]:
    with open_released(str(request.param), databases, templates) as world:
        yield world


@dataclass
class Site:
    """A database of the released pgflow, and the flow that is observed there."""

    world: ReleasedWorld
    client: PrefectClient
    slug: str
    store: Store

    @property
    def flows(self) -> ReleasedFlows:
        return self.world.flows

    @property
    def settings(self) -> Settings:
        return Settings(dsn=SecretStr(self.world.dsn), sweep_interval=0.5)

    @asynccontextmanager
    async def observe(self, *, adopt: bool = False) -> AsyncIterator[Observer]:
        """Observe the flow until the block ends."""
        service = Observer(self.store, self.client, self.settings, (self.slug,), adopt)
        await service.register()
        async with anyio.create_task_group() as group:
            group.start_soon(service.run)
            with anyio.fail_after(180):
                yield service
            service.stop()

    async def list_flow_runs(self) -> list[FlowRun]:
        return await self.client.read_flow_runs(flow_filter=FlowFilter(name={"any_": [self.slug]}))

    async def await_flow_run(self, run_id: UUID, state: str) -> FlowRun:
        """Return the flow run that shows a run, once it is in this state."""
        with anyio.fail_after(120):
            while True:
                for each in await self.list_flow_runs():
                    if each.parameters["run_id"] == str(run_id) and each.state_name == state:
                        return each
                await anyio.sleep(0.1)

    async def await_task(self, flow_run: FlowRun, name: str, is_so: Callable[[TaskRun], bool]) -> TaskRun:
        """Return a task run, once Prefect shows it so."""
        with anyio.fail_after(120):
            while True:
                for each in await self.client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [flow_run.id]})):
                    if each.name == name and is_so(each):
                        return each
                await anyio.sleep(0.1)

    async def await_settled(self) -> None:
        """Return once each run that is shown has ended, and its end is shown."""
        unsettled = "SELECT count(*) FROM pgflow_prefect.flow_runs WHERE NOT settled"
        with anyio.fail_after(120):
            while self.world.db.execute(unsettled).fetchone() != (0,):
                await anyio.sleep(0.05)


@pytest.fixture
async def site(released: ReleasedWorld, client: PrefectClient) -> AsyncIterator[Site]:
    settings = Settings(dsn=SecretStr(released.dsn))
    async with open_store(settings, size=4, only_reads=True) as store:
        yield Site(released, client, f"flow_{uuid4().hex[:8]}", store)


def fail(step: str, index: int) -> object:
    raise BrokenError("no paper")


def is_in(state: str, message: str | None = None) -> Callable[[TaskRun], bool]:
    def compare(task_run: TaskRun) -> bool:
        found = task_run.state
        return found is not None and found.name == state and (message is None or message in (found.message or ""))

    return compare


@pytest.mark.parametrize("released", list_sources(), indirect=True)
async def test_a_run_is_shown_from_its_start_with_pgflows_times_attempts_and_errors(site: Site) -> None:
    site.flows.define(site.slug, MAPPED, maps=["resize"], attempts=2)
    async with site.observe():
        run_id = site.flows.start(site.slug, {})
        flow_run = await site.await_flow_run(run_id, "Running")
        assert flow_run.deployment_id is None, "Prefect can't start such a run"
        site.flows.work(site.slug, fail)
        waiting = await site.await_task(flow_run, "list", is_in("AwaitingRetry", "no paper"))
        assert waiting.run_count == 1
        [task] = site.flows.claim(site.slug)
        running = await site.await_task(flow_run, "list", is_in("Running"))
        assert running.run_count == 2
        site.flows.complete(task, [1, 2, 3])
        site.flows.work(site.slug, lambda step, index: index, at_most=2)
        await site.await_task(flow_run, "resize", is_in("Running", "2 of 3 tasks completed"))
        site.flows.work(site.slug, lambda step, index: index)
        site.flows.work(site.slug, lambda step, index: "sent")
        ended = await site.await_flow_run(run_id, "Completed")
        assert ended.id == flow_run.id
        await site.await_settled()
    items = [f"resize[{index}]" for index in range(3)]
    shown = await await_task_runs(site.client, flow_run, dict.fromkeys([*MAPPED, *items], "Completed"))
    edges = await read_edges(site.client, flow_run)
    assert edges == {("list", "resize"), ("resize", "report"), *(("list", item) for item in items)}
    ends = {each.step_slug: each.finished_at for each in await site.store.list_step_states(run_id)}
    assert {name: each.end_time for name, each in shown.items() if name in ends} == ends
    tasks = dict(await site.store.list_map_tasks(run_id, at_most=100))
    assert {shown[f"resize[{task.index}]"].start_time for task in tasks} == {each.started_at for each in tasks.values()}
    assert await site.store.list_map_tasks(run_id, at_most=2) == [], "a larger map is one task run"
    assert shown["resize"].state is not None
    assert shown["resize"].state.message == "3 tasks"
    assert (await site.store.read_run(run_id)).flow_run_id == flow_run.id


@pytest.mark.parametrize("released", WITH_SKIPS, indirect=True)
async def test_what_has_ended_before_a_look_is_shown_with_its_skips_and_its_errors(site: Site) -> None:
    condition = """required_input_pattern => '{"vip": true}', when_unmet => 'skip-cascade'"""
    steps = {"choose": [], "wrap": ["choose"], "pack": [], "send": ["pack"]}
    site.flows.define(site.slug, steps, choose=condition, pack="when_exhausted => 'skip'")
    await site.store.enable_workflow(site.slug)
    good, bad = site.flows.start(site.slug, {"vip": False}), site.flows.start(site.slug, {"vip": True})
    site.flows.work(site.slug, fail)
    site.flows.work(site.slug, lambda step, index: None)
    async with site.observe():
        first, second = await site.await_flow_run(good, "Completed"), await site.await_flow_run(bad, "Failed")
        await site.await_settled()
    shown = await await_task_runs(
        site.client, first, {"choose": "Skipped", "wrap": "Skipped", "pack": "Skipped", "send": "Completed"}
    )
    messages = {name: each.state.message for name, each in shown.items() if each.state is not None}
    assert messages == {
        "choose": "its condition is not met",
        "wrap": "a step that it waits for was skipped",
        "pack": "its handler failed: no paper",
        "send": None,
    }
    assert second.state is not None
    assert second.state.message == 'step "choose" failed: no paper'
    assert len(await site.list_flow_runs()) == 2


@pytest.mark.parametrize("released", list_sources(), indirect=True)
async def test_runs_that_an_unmodified_edge_worker_executes_are_shown_and_left_alone(site: Site) -> None:
    site.flows.define(site.slug, MAPPED, maps=["resize"], attempts=2)
    failed: list[UUID] = []

    def do(task: EdgeTask) -> object:
        if task.step == "report" and task.run_id not in failed:
            failed.append(task.run_id)
            raise BrokenError("no paper")
        return [1, 2, 3]

    worker = EdgeWorker(site.world.dsn, site.slug, do, poll=1)
    async with site.observe():
        runs = [site.flows.start(site.slug, {}) for _ in range(5)]
        with worker:
            flow_runs = [await site.await_flow_run(run_id, "Completed") for run_id in runs]
            await site.await_settled()
    assert (len(worker.executed), worker.errors) == (5 * 6, []), "each task once, and the last one twice"
    attempts = "SELECT max(attempts_count), min(attempts_count) FROM pgflow.step_tasks WHERE step_slug = %s"
    assert site.world.db.execute(attempts, ["report"]).fetchone() == (2, 2)
    items = [f"resize[{index}]" for index in range(3)]
    for flow_run in flow_runs:
        shown = await await_task_runs(site.client, flow_run, dict.fromkeys([*MAPPED, *items], "Completed"))
        assert shown["report"].run_count == 2
    assert len(await site.list_flow_runs()) == 5


async def test_two_observers_and_one_that_comes_later_show_a_run_once(site: Site) -> None:
    site.flows.define(site.slug, {"a": [], "b": ["a"]})
    async with site.observe(), site.observe():
        run_id = site.flows.start(site.slug, {})
        flow_run = await site.await_flow_run(run_id, "Running")
        site.flows.work(site.slug, lambda step, index: None)
        await site.await_task(flow_run, "a", is_in("Completed"))
    # A user's wish to cancel reaches no worker of pgflow's.
    await site.client.set_flow_run_state(flow_run.id, Cancelling(), force=True)
    site.flows.work(site.slug, lambda step, index: None)
    async with site.observe():
        await site.await_flow_run(run_id, "Completed")
        await await_task_runs(site.client, flow_run, dict.fromkeys("ab", "Completed"))
        await site.await_settled()
    assert len(await site.list_flow_runs()) == 1


async def test_a_run_from_before_the_flow_was_observed_is_shown_where_that_is_wanted(site: Site) -> None:
    site.flows.define(site.slug, {"a": []})
    old = site.flows.start(site.slug, {})
    async with site.observe():
        new = site.flows.start(site.slug, {})
        await site.await_flow_run(new, "Running")
    assert [each.parameters["run_id"] for each in await site.list_flow_runs()] == [str(new)]
    async with site.observe(adopt=True):
        await site.await_flow_run(old, "Running")
    await site.store.enable_workflow(site.slug, enabled=False)
    site.flows.start(site.slug, {})
    unshown = await site.store.list_unshown([site.slug], adopt=True, with_ended=True, since=None, besides=[], limit=10)
    assert unshown == [], "a flow that was disabled is not shown"


async def test_what_prefect_does_not_take_is_shown_once_it_answers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.flows.define(site.slug, {"a": []})
    away = {"create": 2, "send": 1}

    def be_away(what: str) -> None:
        if away[what]:
            away[what] -= 1
            raise PrefectUnavailableError("Prefect is away")

    async def create_later(*given: Any, **options: Any) -> FlowRun:
        be_away("create")
        return await create_observed(*given, **options)

    async def send_later(events: Any) -> None:
        taken = [*events]
        if taken:
            be_away("send")
        await send_events(taken)

    monkeypatch.setattr(flow_recorder, "create_observed", create_later)
    monkeypatch.setattr(observer, "send_events", send_later)
    async with site.observe():
        run_id = site.flows.start(site.slug, {})
        flow_run = await site.await_flow_run(run_id, "Running")
        site.flows.work(site.slug, lambda step, index: None)
        await site.await_flow_run(run_id, "Completed")
        await await_task_runs(site.client, flow_run, {"a": "Completed"})
    assert away == {"create": 0, "send": 0}


# Not beside other tests: Prefect's server gives up all task runs that it was to write together with those of the flow
# run that is gone.
@pytest.mark.processes
async def test_a_flow_and_a_flow_run_that_a_user_deletes_in_prefect_keep_no_run_from_being_shown(site: Site) -> None:
    site.flows.define(site.slug, {"a": []})
    async with site.observe():
        first = await site.await_flow_run(site.flows.start(site.slug, {}), "Running")
        await site.client.delete_flow(first.flow_id)  # with its flow runs
        second = await site.await_flow_run(site.flows.start(site.slug, {}), "Running")
        assert second.flow_id != first.flow_id
        site.flows.work(site.slug, lambda step, index: None)
        await site.await_settled()
        await site.await_flow_run(UUID(second.parameters["run_id"]), "Completed")


async def test_rows_of_runs_that_pgflow_has_deleted_are_forgotten(site: Site) -> None:
    site.flows.define(site.slug, {"a": []})
    kept = site.flows.start(site.slug, {})
    links = [(kept, uuid4()), *((uuid4(), uuid4()) for _ in range(5))]
    insert = "INSERT INTO pgflow_prefect.flow_runs (run_id, flow_run_id, settled) VALUES (%s, %s, true)"
    for link in links:
        site.world.db.execute(insert, link)
    after: UUID | None = None
    while (after := await site.store.forget_deleted_runs(after=after, limit=2)) is not None:
        pass
    assert site.world.db.execute("SELECT run_id FROM pgflow_prefect.flow_runs").fetchall() == [(kept,)]


async def test_a_refused_run_is_forgotten_once_no_look_would_find_it_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer, "_OVERLAP", timedelta(0))
    site.flows.define(site.slug, {"a": []})
    service = Observer(site.store, site.client, site.settings, (site.slug,), adopt=False)
    await service.register()
    asked: list[UUID] = []

    async def refuse(run: TakenRun) -> FlowRun:
        asked.append(run.run_id)
        raise PrefectRefusedError("no such tag")

    monkeypatch.setattr(service.recorder, "show_begun", refuse)
    run_id = site.flows.start(site.slug, {})
    await service._show_new()
    assert [*service._refused] == [run_id]
    site.flows.work(site.slug, lambda step, index: None)
    for _ in range(2):
        service._ended_due_at = 0.0  # so that it looks for ended runs, too
        await service._show_new()
    assert service._refused == {}
    assert asked == [run_id]
    assert await site.list_flow_runs() == []


async def test_a_flow_that_there_is_not_is_refused(site: Site) -> None:
    with pytest.raises(PgflowPrefectError, match="unknown workflow"):
        await Observer(site.store, site.client, site.settings, ("photos",), adopt=False).register()
