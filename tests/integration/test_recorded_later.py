"""Runs that execute in PostgreSQL only, and that Prefect hears of later, or never."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast
from uuid import UUID

import anyio
import anyio.lowlevel
import httpx
import pytest
from prefect import flow, get_run_logger
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.states import Cancelling
from pydantic import SecretStr

from pgflow_prefect import RecordLater, Skip, Workflow
from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.handler_files import BY_ROWS
from pgflow_prefect.deployment.reconciliation.reconcile import reconcile
from pgflow_prefect.errors import PrefectUnavailableError
from pgflow_prefect.execution.process.host import open_host
from pgflow_prefect.execution.reporting import held_logs
from pgflow_prefect.execution.reporting.held_logs import HeldLogs
from pgflow_prefect.prefect_api.event_sender import EventSender
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from pgflow_prefect.prefect_api.ids import make_placeholder
from pgflow_prefect.prefect_api.internals import APILogHandler
from pgflow_prefect.services import recorder as recorders
from pgflow_prefect.services import recording
from pgflow_prefect.services import worker as workers
from pgflow_prefect.services.recorder import Recorder
from pgflow_prefect.services.recording import Recorded
from pgflow_prefect.services.worker import Worker
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.engine import define, get_run, run_workflow, value
from tests.integration.conftest import await_task_runs, make_slug, read_edges, read_flow_run

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]

CHAIN = {"a": [], "b": ["a"], "c": ["b"]}
NONE_SHOWN = RecordLater(longer_than=3600)

OF_THE_WORKER = ("/flow_runs/filter", "get_scheduled_flow_runs", "/variables/", "/flows/", "/deployments/", "/admin/")
"""What a worker asks for once in a while, however many runs there are."""


@dataclass
class Site:
    """A worker in this process, and what it is watched by."""

    db: Connection
    client: PrefectClient
    dsn: str

    @asynccontextmanager
    async def work(self, workflow: Workflow, **settings: Any) -> AsyncIterator[Worker]:
        """Have a worker execute a workflow's runs, until the block ends."""
        given: dict[str, Any] = {"dsn": SecretStr(self.dsn), "lease": 600, "reconcile_interval": 0.2, **settings}
        async with open_host(Settings(**given), pool_size=6) as host:
            worker = Worker(host, self.client, {workflow.slug: (workflow, BY_ROWS)}, concurrency=5, adopt=True)
            await worker.register()
            async with anyio.create_task_group() as group:
                group.start_soon(worker.run)
                with anyio.fail_after(180):
                    yield worker
                worker.drain()

    async def await_end(self, run_id: UUID) -> str:
        """Return a run's status, once it has ended."""
        while get_run(self.db, run_id).status == "pending":
            await anyio.sleep(0.02)
        return str(get_run(self.db, run_id).status)

    async def await_shown(self, run_id: UUID) -> FlowRun:
        """Return the flow run that shows a run, once there is one."""
        found = "SELECT flow_run_id FROM pgflow_prefect.flow_runs WHERE run_id = %s"
        while (flow_run_id := next(iter(self.db.execute(found, [run_id])), (None,))[0]) is None:
            await anyio.sleep(0.02)
        return await self.client.read_flow_run(UUID(str(flow_run_id)))

    async def await_state(self, run_id: UUID, name: str) -> FlowRun:
        """Return the flow run that shows a run, once it is in this state."""
        while (flow_run := await self.await_shown(run_id)).state_name != name:
            await anyio.sleep(0.05)
        return flow_run

    async def await_settled(self) -> None:
        """Return once each run that began has ended, and none waits to be shown or not."""
        while value(self.db, "SELECT count(*) FROM pgflow_prefect.owners WHERE NOT settled"):
            await anyio.sleep(0.02)

    def count_shown(self) -> int:
        return int(str(value(self.db, "SELECT count(*) FROM pgflow_prefect.flow_runs")))


@pytest.fixture
def site(db: Connection, client: PrefectClient, product_dsn: str) -> Site:
    return Site(db, client, product_dsn)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this process asks of Prefect: paths of requests, and names of events."""
    found: list[str] = []
    request, send = httpx.AsyncClient.send, EventSender.send

    async def note_request(self: httpx.AsyncClient, sent: httpx.Request, *args: Any, **options: Any) -> httpx.Response:
        if not any(each in sent.url.path for each in OF_THE_WORKER) or "create_flow_run" in sent.url.path:
            found.append(f"{sent.method} {sent.url.path}")
        return await request(self, sent, *args, **options)

    def note_event(self: EventSender, *args: Any) -> None:
        found.append("an event")
        send(self, *args)

    monkeypatch.setattr(httpx.AsyncClient, "send", note_request)
    monkeypatch.setattr(EventSender, "send", note_event)
    return found


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that a process left undecided counts as left at once."""
    monkeypatch.setattr(workers, "GRACE", 0.0)


def make_chain(db: Connection, record: RecordLater, act: Callable[[str, Any], Any] | None = None) -> Workflow:
    """Return a workflow a -> b -> c; `act` is called by each step, with its slug and the run's payload."""
    workflow = Workflow(make_slug(), record=record)
    define(db, workflow.slug, CHAIN)

    def do(slug: str, payload: Any) -> Any:
        return act(slug, payload) if act is not None else slug

    @workflow.step
    async def a(payload: Any) -> Any:
        return await _settle(do("a", payload))

    @workflow.step
    async def b(payload: Any, a: Any) -> Any:
        return await _settle(do("b", payload))

    @workflow.step
    async def c(payload: Any, b: Any) -> Any:
        return await _settle(do("c", payload))

    return workflow


async def _settle(result: Any) -> Any:
    return await result if asyncio.iscoroutine(result) else result


def fail_in_b(slug: str, payload: Any) -> str:
    get_run_logger().info("step %s says this", slug)
    if slug == "b" and payload == "bad":
        raise ValueError("the order has no lines")
    return slug


async def read_lines(client: PrefectClient, flow_run: FlowRun, last: str) -> list[str]:
    """Return the messages of a flow run's log, once one of them begins so."""
    lines: list[str] = []
    while not any(each.startswith(last) for each in lines):
        await anyio.sleep(0.05)
        found = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id])))
        lines = [each.message.splitlines()[0] for each in found]
    return lines


async def test_runs_that_complete_are_executed_without_a_request(site: Site, db: Connection, asked: list[str]) -> None:
    workflow = make_chain(db, NONE_SHOWN)
    async with site.work(workflow):
        asked.clear()
        for _ in range(10):
            assert await site.await_end(run_workflow(db, workflow.slug, 1).id) == "completed"
        await site.await_settled()
        # Prefect's log handler may still send lines of the tests before this one.
        assert [each for each in asked if not each.endswith("/api/logs/")] == []
    assert site.count_shown() == 0
    assert value(db, "SELECT count(*) FROM pgflow.step_states WHERE status = 'completed'") == 30


async def test_a_failed_run_is_shown_after_its_end_as_its_rows_have_it(site: Site, db: Connection) -> None:
    workflow = make_chain(db, NONE_SHOWN, fail_in_b)
    async with site.work(workflow):
        good, bad = (run_workflow(db, workflow.slug, each).id for each in ("good", "bad"))
        assert [await site.await_end(each) for each in (good, bad)] == ["completed", "failed"]
        flow_run = await site.await_shown(bad)
        assert flow_run.state is not None
        assert flow_run.state_name == "Failed"
        assert flow_run.state.message == get_run(db, bad).error_message
        assert flow_run.parameters == {"run_id": str(bad)}
        shown = await await_task_runs(site.client, flow_run, {"a": "Completed", "b": "Failed"})
        lines = await read_lines(site.client, flow_run, "Encountered exception")
        assert {"step a says this", "step b says this"} <= {*lines}
        artifacts = await site.client.read_artifacts(flow_run_filter=FlowRunFilter(id={"any_": [flow_run.id]}))
        assert sorted(str(each.type) for each in artifacts) == ["markdown", "table"]
    rows: Any = db.execute(
        "SELECT step_slug, started_at, finished_at, error_message FROM pgflow.step_states WHERE run_id = %s", [bad]
    )
    noted = {slug: (began_at, ended_at, error) for slug, began_at, ended_at, error in rows}
    for slug, each in shown.items():
        assert each.state is not None
        assert (each.start_time, each.end_time, each.state.message) == noted[slug], "its original times"
    assert await read_edges(site.client, flow_run) == {("a", "b")}
    assert site.count_shown() == 1, "the other run is not shown"


async def test_one_in_so_many_is_shown_the_same_ones_each_time(site: Site, db: Connection) -> None:
    record = RecordLater(one_in=3, longer_than=3600)
    workflow = make_chain(db, record)
    async with site.work(workflow):
        run_ids = [UUID(int=number) for number in range(24)]
        for run_id in run_ids:
            db.execute("SELECT pgflow.run_workflow(%s, '{}', %s)", [workflow.slug, run_id])
        for run_id in run_ids:
            await site.await_end(run_id)
        wanted = {each for each in run_ids if record.wants(each, 0.0)}
        for run_id in wanted:
            assert (await site.await_shown(run_id)).state_name == "Completed"
        undecided = "SELECT count(*) FROM pgflow_prefect.owners WHERE NOT settled AND run_id <> ALL (%s)"
        while value(db, undecided, [*wanted]):
            await anyio.sleep(0.02)
    assert site.count_shown() == len(wanted)
    assert 0 < len(wanted) < len(run_ids)


async def test_a_run_that_takes_long_becomes_live_and_is_cancelled_from_prefect(site: Site, db: Connection) -> None:
    """Prefect's Cancel works from the moment on that the run is shown."""
    began, gate = anyio.Event(), anyio.Event()

    async def wait(slug: str) -> str:
        get_run_logger().info("step %s waits", slug)
        began.set()
        await gate.wait()
        return slug

    workflow = make_chain(db, RecordLater(longer_than=0.01), lambda slug, _: wait(slug) if slug == "b" else slug)
    async with site.work(workflow):
        run_id = run_workflow(db, workflow.slug, {}).id
        await began.wait()
        flow_run = await site.await_state(run_id, "Running")
        shown = await await_task_runs(site.client, flow_run, {"a": "Completed", "b": "Running"})
        # On a busy machine the run is shown while `a` is reported: then its end is told a moment after the row's.
        finished_at = value(
            db, "SELECT finished_at FROM pgflow.step_states WHERE run_id = %s AND step_slug = 'a'", run_id
        )
        assert isinstance(finished_at, datetime)
        assert shown["a"].end_time is not None
        assert shown["a"].end_time >= finished_at
        await read_lines(site.client, flow_run, "step b waits")
        await site.client.set_flow_run_state(flow_run.id, Cancelling())
        await site.await_state(run_id, "Cancelled")
        assert get_run(db, run_id).ended_as == "cancelled"
        await await_task_runs(site.client, flow_run, {"a": "Completed", "b": "Cancelled"})
    assert await read_edges(site.client, flow_run) == {("a", "b")}


async def test_a_run_that_became_live_ends_in_prefect_as_in_postgres(site: Site, db: Connection) -> None:
    gate = anyio.Event()

    async def wait(slug: str) -> str:
        await gate.wait()
        return slug

    workflow = make_chain(db, RecordLater(longer_than=0.01), lambda slug, _: wait(slug) if slug == "a" else slug)
    async with site.work(workflow):
        run_id = run_workflow(db, workflow.slug, {}).id
        flow_run = await site.await_state(run_id, "Running")
        gate.set()
        await site.await_state(run_id, "Completed")
        await await_task_runs(site.client, flow_run, dict.fromkeys("abc", "Completed"))
    assert site.count_shown() == 1


async def test_flows_that_a_handler_calls_are_flow_runs_of_their_own(
    site: Site, db: Connection, client: PrefectClient
) -> None:
    name = make_slug()
    told: list[object] = []

    @flow(name=name)
    async def nested() -> int:
        return 7

    async def call() -> int:
        told.append(FlowRunContext.get())
        return await nested()

    workflow = make_chain(db, NONE_SHOWN, lambda slug, _: call() if slug == "a" else slug)
    async with site.work(workflow):
        assert await site.await_end(run_workflow(db, workflow.slug, {}).id) == "completed"
    assert told == [None], "there is no flow run that it could be in"
    assert (await read_flow_run(client, name)).parent_task_run_id is None


async def test_what_a_worker_left_undecided_is_found_by_its_rows(
    site: Site, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker dies between the end of its runs and what it would have told Prefect."""
    workflow = make_chain(db, NONE_SHOWN, fail_in_b)
    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "note_end", lambda *_, **__: None)
        patched.setattr(Recorder, "_look", lambda _: anyio.lowlevel.checkpoint())
        async with site.work(workflow):
            good, bad = (run_workflow(db, workflow.slug, each).id for each in ("good", "bad"))
            assert [await site.await_end(each) for each in (good, bad)] == ["completed", "failed"]
    assert site.count_shown() == 0
    async with site.work(workflow):
        flow_run = await site.await_state(bad, "Failed")
        await await_task_runs(site.client, flow_run, {"a": "Completed", "b": "Failed"})
        while not value(db, "SELECT settled FROM pgflow_prefect.owners WHERE run_id = %s", good):
            await anyio.sleep(0.02)
    assert site.count_shown() == 1


async def test_failed_runs_wait_for_prefect_and_more_than_there_is_room_for_are_shown(
    site: Site, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "MOST_WAITING", 3)
    workflow = make_chain(db, RecordLater(one_in=1, longer_than=3600), fail_in_b)
    is_away = True
    create = FlowRunWriter.create

    async def fail_or_create(self: FlowRunWriter, *args: Any) -> FlowRun:
        if is_away:
            raise PrefectUnavailableError("it is away")
        return await create(self, *args)

    monkeypatch.setattr(FlowRunWriter, "create", fail_or_create)
    async with site.work(workflow) as worker:
        bad = [run_workflow(db, workflow.slug, "bad").id for _ in range(8)]
        for run_id in bad:
            assert await site.await_end(run_id) == "failed", "no run waits for Prefect"
            assert worker._unshown_runs.recorder.waiting <= 3
        good = run_workflow(db, workflow.slug, "good").id
        assert await site.await_end(good) == "completed"
        while not value(db, "SELECT settled FROM pgflow_prefect.owners WHERE run_id = %s", good):
            await anyio.sleep(0.02)
        is_away = False
        for run_id in bad:
            await site.await_state(run_id, "Failed")
    assert site.count_shown() == len(bad), "there was no room for the one that completed"


@pytest.mark.thorough
async def test_a_run_that_prefect_can_not_show_holds_up_no_others(
    site: Site, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "MOST_RUNS", 1)
    workflow = make_chain(db, RecordLater(one_in=1, longer_than=3600), fail_in_b)
    create = FlowRunWriter.create
    forbidden: list[UUID] = []

    async def refuse_or_create(self: FlowRunWriter, deployment_id: UUID, body: Any) -> FlowRun:
        run_id = UUID(str(body["parameters"]["run_id"]))
        forbidden.extend([run_id] if not forbidden else [])
        if run_id in forbidden:
            raise PrefectUnavailableError("it answers 403")
        return await create(self, deployment_id, body)

    monkeypatch.setattr(FlowRunWriter, "create", refuse_or_create)
    async with site.work(workflow):
        bad = [run_workflow(db, workflow.slug, "bad").id for _ in range(4)]
        for run_id in bad:
            assert await site.await_end(run_id) == "failed"
        while site.count_shown() < 3:
            await anyio.sleep(0.02)
        forbidden.clear()
        forbidden.append(UUID(int=0))
        for run_id in bad:
            await site.await_state(run_id, "Failed")


async def test_two_processes_that_show_a_run_at_once_show_it_once(
    site: Site, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = make_chain(db, NONE_SHOWN)
    async with site.work(workflow) as worker:
        run_ids = [run_workflow(db, workflow.slug, {}).id for _ in range(4)]
        for run_id in run_ids:
            await site.await_end(run_id)
        await site.await_settled()
        runs = worker._unshown_runs.recorder.runs
        async with anyio.create_task_group() as group:
            found: list[Recorded] = []

            async def record() -> None:
                found.append(await runs.record(run_ids))

            for _ in range(2):
                group.start_soon(record)
        assert found[0].shown | found[1].shown == {*run_ids}
        assert not found[0].shown & found[1].shown
        assert (await runs.record(run_ids)).shown == frozenset()
        for run_id in run_ids:
            flow_run = await site.await_state(run_id, "Completed")
            await await_task_runs(site.client, flow_run, dict.fromkeys("abc", "Completed"))
    assert site.count_shown() == len(run_ids)


async def test_a_run_that_was_shown_goes_on_being_shown(site: Site, db: Connection) -> None:
    workflow = make_chain(db, NONE_SHOWN, lambda slug, _: 1 // fails if slug == "b" else slug)
    fails = 0
    async with site.work(workflow):
        run_id = run_workflow(db, workflow.slug, {}).id
        first = await site.await_state(run_id, "Failed")
        fails = 1
        db.execute("SELECT pgflow.reopen_run(%s)", [run_id])
        assert await site.await_end(run_id) == "completed"
        latest = "SELECT flow_run_id FROM pgflow_prefect.flow_runs WHERE run_id = %s ORDER BY epoch DESC LIMIT 1"
        while (second := UUID(str(value(db, latest, run_id)))) == first.id:
            await anyio.sleep(0.02)
        while (await site.client.read_flow_run(second)).state_name != "Completed":
            await anyio.sleep(0.05)


async def test_an_unshown_run_is_no_disagreement(site: Site, db: Connection, store: Store) -> None:
    workflow = make_chain(db, NONE_SHOWN)
    async with site.work(workflow):
        await site.await_end(run_workflow(db, workflow.slug, {}).id)
        await site.await_settled()
        assert await reconcile(store, site.client, apply=False, everything=True, grace=0, lag=0) == []


async def test_a_failed_run_is_shown_though_its_deployment_was_deleted(site: Site, db: Connection) -> None:
    workflow = make_chain(db, NONE_SHOWN, fail_in_b)
    async with site.work(workflow) as worker:
        await site.client.delete_deployment(worker.deployments[workflow.slug].id)
        run_id = run_workflow(db, workflow.slug, "bad").id
        await site.await_state(run_id, "Failed")


async def test_a_task_run_that_got_lost_is_repaired(
    site: Site, db: Connection, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect's server drops events that its queue has no room for."""
    workflow = make_chain(db, NONE_SHOWN, fail_in_b)
    with monkeypatch.context() as patched:
        patched.setattr(recording, "send_events", leave)
        patched.setattr(workers, "keep_reconciled", leave)
        async with site.work(workflow):
            run_id = run_workflow(db, workflow.slug, "bad").id
            flow_run = await site.await_state(run_id, "Failed")
    db.execute("UPDATE pgflow_prefect.owners SET lease_until = 'epoch'")  # as once its time is over
    found = await reconcile(store, site.client, apply=True, grace=0, lag=0)
    assert [each.kind for each in found] == ["lagging"]
    await await_task_runs(site.client, flow_run, {"a": "Completed", "b": "Failed"})
    assert await read_edges(site.client, flow_run) == {("a", "b")}
    assert await reconcile(store, site.client, apply=False, grace=0, lag=0) == []


async def leave(*_: object, **__: object) -> None:
    """Do nothing."""


async def test_memory_is_bounded_while_two_thousand_runs_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run waits for Prefect, and none of those that there is no room for is held."""
    recorder = Recorder(cast("Any", None), {"orders": RecordLater(one_in=1)}, tuple, tuple, leave, interval=60, grace=0)
    logs = HeldLogs()
    monkeypatch.setattr(held_logs, "HELD", logs)
    monkeypatch.setattr(recorders, "HELD", logs)
    line = logging.makeLogRecord({"name": "orders", "levelno": logging.INFO, "msg": "x" * 100_000})
    handler = APILogHandler()
    for number in range(2_000):
        run_id = UUID(int=number)
        placeholder = make_placeholder(run_id, 1)
        line.flow_run_id = str(placeholder)
        lines = logs.begin(placeholder)
        assert not logs.take(placeholder, handler, line), "nothing is sent"
        logs.end(placeholder)
        recorder.note_end("orders", run_id, 1, completed=number % 2 == 0, seconds=0.1, lines=lines)
    assert recorder.waiting == recorders.MOST_WAITING
    assert len(recorder._unwanted) <= 2_000
    held = logs._size
    again = next(iter(recorder._waiting))
    lines = logs.begin(make_placeholder(again, 2))
    recorder.note_end("orders", again, 2, completed=False, seconds=0.1, lines=lines)
    assert logs._size <= held, "what was held of a run that waits already is let go"
    kept = [each for each in recorder._waiting.values() if each is not None]
    assert sum(each.size for each in kept) <= held_logs.MOST_BYTES


@pytest.mark.thorough
async def test_a_recorded_run_shows_what_was_skipped_and_what_was_not_run(site: Site) -> None:
    workflow = Workflow(make_slug(), record=NONE_SHOWN)
    define(
        site.db, workflow.slug, {"load": [], "publish": ["load"], "look": [], "warn": ["look"], "clean": ["publish"]}
    )
    site.db.execute("UPDATE pgflow.steps SET rule = 'all_done' WHERE slug = 'clean'")

    @workflow.step
    async def load() -> int:
        raise ValueError("no file")

    @workflow.step
    async def look() -> int:
        raise Skip("nothing new")

    for slug in ("publish", "warn", "clean"):

        @workflow.step(slug)
        async def work() -> int:
            return 1

    run_id = run_workflow(site.db, workflow.slug, {}).id
    async with site.work(workflow):
        assert await site.await_end(run_id) == "failed"
        flow_run = await site.await_state(run_id, "Failed")
        states = {"load": "Failed", "publish": "NotReady", "look": "Skipped", "warn": "Skipped", "clean": "Completed"}
        await await_task_runs(site.client, flow_run, states)
