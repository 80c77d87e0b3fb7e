"""Steps that a work pool of Prefect does: each attempt is a flow run of its own, and PostgreSQL gets the report."""

import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID, uuid4

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter, WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed
from prefect.task_runners import ThreadPoolTaskRunner

from pgflow_prefect import Workflow
from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment import pool_step
from pgflow_prefect.deployment.handler_files import load_workflow
from pgflow_prefect.execution.task_runner import AnyTaskRunner
from pgflow_prefect.models import PoolAttempt, TaskKey
from tests.conftest import Connection
from tests.engine import run_workflow, value
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_run, read_steps
from tests.integration.waiting import TIMEOUT, await_value, going, going_on, note_active_runs

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

BEGUN: LiteralString = "SELECT count(*) FROM pgflow_prefect.external_claims WHERE holder IS NOT NULL"
DEFERRED: LiteralString = "SELECT count(*) FROM pgflow_prefect.task_runs WHERE state_name = 'Deferred'"

HANDLERS = """
from pgflow_prefect import StepContext, WorkPool, Workflow

workflow = Workflow({slug!r})


@workflow.step
def first(payload: dict, context: StepContext) -> int:
    if "sql" in payload:
        context.connection.execute(payload["sql"])
    return payload["n"]


@workflow.step{options}
def heavy(first: int, payload: dict, context: StepContext) -> dict:
    print("lifting")
    if context.attempt <= payload.get("fails", 0):
        raise ValueError("too heavy")
    context.connection.execute("INSERT INTO lifted VALUES (%s)", [context.attempt])
    return {{"lifted": first + 1, "attempt": context.attempt}}


workflow.bind("heavy", WorkPool({pool!r}, retries={retries}, timeout_seconds={timeout}))
"""

BLOCKING = """
import asyncio
import os

import psycopg
from pgflow_prefect import Workflow

workflow = Workflow({slug!r})


def block() -> None:
    # Without it, the lease is extended no more: this lets no event loop go on.
    with psycopg.connect(os.environ["PGFLOW_DSN"], autocommit=True) as connection:
        for _ in range(3):
            before = read(connection)
            for _ in range({patience}):
                if read(connection) != before:
                    break
                connection.execute("SELECT pg_sleep(0.02)")
            else:
                raise TimeoutError("the lease was not extended")


def read(connection: psycopg.Connection) -> object:
    return connection.execute("SELECT claimed_until FROM pgflow_prefect.external_claims").fetchall()


{at_import}


@workflow.step
async def heavy() -> None:
    {at_work}
"""

Write = Callable[..., Workflow]


@pytest.fixture
async def pool(client: PrefectClient) -> AsyncIterator[str]:
    """A work pool without a worker: the test starts its flow runs."""
    name = f"pool-{uuid4().hex[:8]}"
    await client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    yield name
    await client.delete_work_pool(name)


@pytest.fixture
def write(
    define: Define, db: Connection, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Workflow]:
    """A function that writes the file of handlers, and loads it: here, and where the pool's processes work."""
    monkeypatch.chdir(tmp_path)
    db.execute("CREATE TABLE lifted (attempt int)")

    def call(retries: int = 0, timeout: float | None = None, options: str = "") -> Workflow:
        slug = make_slug().replace("-", "_")
        define(slug, ["first", "heavy"], [("first", "heavy")])
        Path("flows").mkdir()
        Path(f"flows/{slug}.py").write_text(
            HANDLERS.format(slug=slug, pool=pool, retries=retries, timeout=timeout, options=options), encoding="utf-8"
        )
        return load_workflow(slug)[0]

    return call


async def list_flow_runs(client: PrefectClient, pool: str) -> list[FlowRun]:
    found = await client.read_flow_runs(work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])))
    return sorted(found, key=lambda each: int(each.parameters["attempt"]))


async def await_flow_run(client: PrefectClient, pool: str, count: int = 1) -> FlowRun:
    """Return the latest flow run of a pool as soon as there are so many."""
    found: list[FlowRun] = []
    with anyio.fail_after(TIMEOUT):
        while len(found) < count:
            await anyio.sleep(0.05)
            found = await list_flow_runs(client, pool)
    assert len(found) == count
    return found[-1]


async def await_type(client: PrefectClient, flow_run: FlowRun, *types: StateType) -> None:
    with anyio.fail_after(TIMEOUT):
        while (await client.read_flow_run(flow_run.id)).state_type not in types:
            await anyio.sleep(0.05)


async def start(flow_run: FlowRun) -> Any:
    """Do what a pool's process does with a flow run."""
    return await pool_step.flow(**flow_run.parameters, return_state=True)


def find_attempt(flow_run: FlowRun) -> PoolAttempt:
    given = flow_run.parameters
    return PoolAttempt(UUID(given["run"]), TaskKey(given["step"], given["index"]), given["attempt"])


async def test_a_pools_process_does_the_step_and_prefect_shows_it_beneath_the_step(
    write: Write, db: Connection, client: PrefectClient, pool: str, tmp_path: Path
) -> None:
    workflow = write()
    async with going(workflow, db, {"n": 41, "secret": "hunter2"}) as run:
        flow_run = await await_flow_run(client, pool)
        assert flow_run.parameters == {
            "run": str(run.run_id),
            "step": "heavy",
            "index": 0,
            "attempt": 1,
            "directory": str(tmp_path),
            "handlers": f"flows/{workflow.slug}.py",
        }
        assert (
            value(db, "SELECT handler FROM pgflow_prefect.task_runs WHERE step_slug = 'heavy'") == f"work-pool {pool}"
        )
        assert (await start(flow_run)).is_completed()
    assert await run.ended.result() == {"heavy": {"lifted": 42, "attempt": 1}}
    assert value(db, "SELECT count(*) FROM lifted") == 1
    shown = await read_flow_run(client, workflow.slug)
    tasks = await await_task_runs(client, shown, {"first": "Completed", "heavy": "Completed"})
    assert flow_run.parent_task_run_id == tasks["heavy"].id


async def test_a_result_in_a_storage_has_a_key_of_the_process_that_has_written_it(
    write: Write, db: Connection, client: PrefectClient, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_RESULT_STORAGE", (tmp_path / "results").as_uri())
    monkeypatch.setenv("PGFLOW_RESULT_LIMIT", "600")
    workflow, big = write(), 10**700
    async with going(workflow, db, {"n": big}) as run:
        assert (await start(await await_flow_run(client, pool))).is_completed()
    first, heavy = (read_steps(db)[step][2]["$pgflow_result"] for step in ("first", "heavy"))
    assert first["key"].endswith("-0-1"), "the owner of the run has written it"
    assert heavy["key"].endswith(f"-0-1-{heavy['holder']}")
    assert await workflow.load_result(run.run_id, "heavy") == {"lifted": big + 1, "attempt": 1}


async def test_a_failure_is_tried_again_by_another_flow_run(
    write: Write, db: Connection, client: PrefectClient, pool: str
) -> None:
    async with going(write(retries=1), db, {"n": 1, "fails": 1}) as run:
        failed = await start(await await_flow_run(client, pool))
        assert failed.is_failed()
        second = await await_flow_run(client, pool, 2)
        assert second.parameters["attempt"] == 2
        assert (await start(second)).is_completed()
    assert await run.ended.result() == {"heavy": {"lifted": 2, "attempt": 2}}


async def test_a_row_binds_a_step_to_a_pool_while_a_task_runner_has_the_run(
    write: Write, db: Connection, client: PrefectClient, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_WORK_POOLS", json.dumps({"gpu": pool}))
    workflow = write()
    bind = f"SELECT pgflow_prefect.bind_step('{workflow.slug}', 'heavy', "
    db.execute(f"{bind} 'python')")
    # It commits with the completion of the step before. So the task runner gets the step as one in Python.
    payload = {"n": 41, "sql": f"{bind} 'work-pool', 'gpu')"}
    threads: AnyTaskRunner = ThreadPoolTaskRunner()
    run_id = run_workflow(db, workflow.slug, payload).id
    async with going_on(workflow, run_id, workflow.flow.with_options(task_runner=threads)) as run:
        flow_run = await await_flow_run(client, pool)
        assert (await start(flow_run)).is_completed()
    assert await run.ended.result() == {"heavy": {"lifted": 42, "attempt": 1}}
    assert flow_run.parent_task_run_id is not None


async def test_the_last_failure_fails_the_step_with_its_message(
    write: Write, db: Connection, client: PrefectClient, pool: str
) -> None:
    async with going(write(), db, {"n": 1, "fails": 1}) as run:
        await start(await await_flow_run(client, pool))
    assert run.ended.is_failed()
    assert "ValueError: too heavy" in read_run(db)[1]
    assert value(db, "SELECT count(*) FROM lifted") == 0


async def test_an_attempt_is_done_once(
    write: Write, db: Connection, client: PrefectClient, pool: str, store: Store
) -> None:
    async with going(write(), db, {"n": 1}):
        flow_run = await await_flow_run(client, pool)
        attempt, holder = find_attempt(flow_run), uuid4()
        given = await store.begin_pool_step(attempt, holder, 600)
        assert given is not None
        assert json.loads(given.upstream_results.text) == {"first": 1}
        assert await store.begin_pool_step(attempt, holder, 600) is not None, "the answer was lost"
        assert await store.begin_pool_step(attempt, uuid4(), 600) is None
        assert await store.begin_pool_step(attempt._replace(attempt=2), uuid4(), 600) is None
        assert await store.begin_pool_step(attempt._replace(task=TaskKey("first")), uuid4(), 600) is None
        assert (await start(flow_run)).name == "Superseded"
        assert await store.extend_pool_step(attempt, holder, 600) is True
        assert await store.extend_pool_step(attempt, uuid4(), 600) is False
        assert await store.end_pool_step(attempt, uuid4(), "not mine") is False
        db.execute("SELECT pgflow.complete_step(%s, 'heavy', '7')", [attempt.run_id])
        assert await store.extend_pool_step(attempt, holder, 600) is False
    assert value(db, "SELECT count(*) FROM lifted") == 0


@pytest.fixture
def hand_over(
    define: Define, db: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], UUID]:
    """A function that hands a step to a pool, and returns its run. What its file does there is given.

    No process has the run. None could find that a lease of a second has ended on a slow machine.
    """
    monkeypatch.setenv("PGFLOW_LEASE", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)

    def call(at_import: str, at_work: str) -> UUID:
        slug = make_slug().replace("-", "_")
        define(slug, ["heavy"], [])
        text = BLOCKING.format(slug=slug, at_import=at_import, at_work=at_work, patience=50 * TIMEOUT)
        (tmp_path / "heavy.py").write_text(text, encoding="utf-8")
        run_id = run_workflow(db, slug).id
        db.execute(
            "SELECT pgflow_prefect.claim_step(%s, 'heavy', 0, 0, %s, NULL, true, 'work-pool', true, 'work-pool gpu')",
            [run_id, uuid4()],
        )
        db.execute("UPDATE pgflow_prefect.task_runs SET state_name = 'Deferred'")
        return run_id

    return call


@pytest.mark.parametrize(("at_import", "at_work"), [("block()", "pass"), ("", "block()")])
async def test_the_lease_is_extended_while_the_event_loop_is_blocked(
    hand_over: Callable[[str, str], UUID], db: Connection, at_import: str, at_work: str
) -> None:
    run_id = hand_over(at_import, at_work)
    state = await pool_step.flow(run=run_id, step="heavy", attempt=1, handlers="heavy.py", return_state=True)
    assert state.is_completed(), state.message
    assert value(db, "SELECT status FROM pgflow.runs") == "completed"


async def test_the_work_stops_once_no_run_waits_for_it(hand_over: Callable[[str, str], UUID], db: Connection) -> None:
    run_id = hand_over("", "await asyncio.sleep(1e6)")
    states: list[Any] = []

    async def work() -> None:
        found = await pool_step.flow(run=run_id, step="heavy", attempt=1, handlers="heavy.py", return_state=True)
        states.append(found)

    with anyio.fail_after(TIMEOUT):
        async with anyio.create_task_group() as group:
            group.start_soon(work)
            await await_value(db, 1, BEGUN)
            db.execute("SELECT pgflow.complete_step(%s, 'heavy', '7')", [run_id])
    assert [each.name for each in states] == ["Superseded"]


@pytest.mark.parametrize("how", ["crashed before it began", "vanished", "deleted"])
async def test_an_attempt_whose_process_is_lost_is_made_once_more(
    write: Write, db: Connection, client: PrefectClient, pool: str, store: Store, how: str
) -> None:
    async with going(write(retries=1), db, {"n": 1}) as run:
        flow_run = await await_flow_run(client, pool)
        if how == "vanished":
            assert await store.begin_pool_step(find_attempt(flow_run), uuid4(), 0.001) is not None
        elif how == "deleted":
            await client.delete_flow_run(flow_run.id)
        else:
            await client.set_flow_run_state(flow_run.id, Crashed(message="no such image"), force=True)
        count = 1 if how == "deleted" else 2
        with anyio.fail_after(TIMEOUT):
            while (second := await await_flow_run(client, pool, count)).parameters["attempt"] != 2:
                await anyio.sleep(0.05)
        assert (await start(second)).is_completed()
        assert (await start(flow_run)).name == "Superseded", "the first one comes too late"
    assert await run.ended.result() == {"heavy": {"lifted": 2, "attempt": 2}}
    assert value(db, "SELECT count(*) FROM lifted") == 1


async def test_a_deployment_that_a_user_deletes_is_made_anew(
    write: Write, db: Connection, client: PrefectClient, pool: str
) -> None:
    async with going(write(retries=1), db, {"n": 1}) as run:
        flow_run = await await_flow_run(client, pool)
        assert flow_run.deployment_id is not None
        await client.delete_deployment(flow_run.deployment_id)
        with suppress(ObjectNotFound):  # it may have gone with its deployment
            await client.delete_flow_run(flow_run.id)
        with anyio.fail_after(TIMEOUT):
            while (second := await await_flow_run(client, pool)).parameters["attempt"] != 2:
                await anyio.sleep(0.05)
        assert second.deployment_id != flow_run.deployment_id
        assert (await start(second)).is_completed()
    assert await run.ended.result() == {"heavy": {"lifted": 2, "attempt": 2}}


async def test_a_flow_run_that_a_user_cancels_fails_the_step_for_good(
    write: Write, db: Connection, client: PrefectClient, pool: str
) -> None:
    async with going(write(retries=3), db, {"n": 1}) as run:
        flow_run = await await_flow_run(client, pool)
        await client.set_flow_run_state(flow_run.id, Cancelled(message="not today"), force=True)
    assert run.ended.is_failed()
    assert "has ended as Cancelled before the step began: not today" in read_run(db)[1]
    assert read_steps(db)["heavy"][1] == 1


async def test_the_next_owner_waits_for_the_same_attempt(
    write: Write, db: Connection, client: PrefectClient, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow, begun = write(retries=1), note_active_runs(monkeypatch)
    async with going(workflow, db, {"n": 1}) as first:
        flow_run = await await_flow_run(client, pool)
        begun[0].drain()
    assert first.state is None or not first.ended.is_completed()
    async with going_on(workflow, first.run_id) as second:
        await await_value(db, 1, DEFERRED)
        assert (await start(flow_run)).is_completed()
    assert await second.ended.result() == {"heavy": {"lifted": 2, "attempt": 1}}
    assert len(await list_flow_runs(client, pool)) == 1
    assert value(db, "SELECT count(*) FROM lifted") == 1
    owners = await client.read_flow_runs(flow_filter=FlowFilter(name={"any_": [workflow.slug]}))
    latest = max(owners, key=lambda each: str(each.expected_start_time))
    await await_task_runs(client, latest, {"first": "Cached", "heavy": "Completed"})


async def test_a_cancelled_run_cancels_the_flow_run(
    write: Write, db: Connection, client: PrefectClient, pool: str
) -> None:
    async with going(write(), db, {"n": 1}) as run:
        flow_run = await await_flow_run(client, pool)
        db.execute("SELECT pgflow.cancel_run(%s, 'enough')", [run.run_id])
    assert run.ended.is_cancelled()
    await await_type(client, flow_run, StateType.CANCELLED, StateType.CANCELLING)
    assert (await start(flow_run)).name == "Superseded"


async def test_a_time_out_includes_the_wait_for_a_worker(
    write: Write, db: Connection, client: PrefectClient, pool: str
) -> None:
    async with going(write(timeout=1), db, {"n": 1}) as run:
        pass
    assert run.ended.is_failed()
    assert "no program has reported it within 1 s" in read_run(db)[1]
    for flow_run in await list_flow_runs(client, pool):  # a slow machine may not have created it
        await await_type(client, flow_run, StateType.CANCELLED, StateType.CANCELLING)


async def test_the_time_out_and_the_retries_of_the_function_do_not_count(
    write: Write, db: Connection, client: PrefectClient, pool: str
) -> None:
    too_short = "(timeout_seconds=1e-9, retries=3)"
    async with going(write(retries=1, options=too_short), db, {"n": 1, "fails": 1}) as run:
        failed = await start(await await_flow_run(client, pool))
        assert "ValueError: too heavy" in str(failed.message)
        assert (await start(await await_flow_run(client, pool, 2))).is_completed()
    assert await run.ended.result() == {"heavy": {"lifted": 2, "attempt": 2}}


@pytest.mark.parametrize("target", ["gpu", "unknown", "missing"])
async def test_a_row_holds_a_name_of_the_workers_settings(
    write: Write, db: Connection, client: PrefectClient, pool: str, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    workflow = write()
    pools = {"gpu": {"pool": pool, "job_variables": {"env": {"SIZE": "big"}}}, "missing": "no-such-pool"}
    monkeypatch.setenv("PGFLOW_WORK_POOLS", json.dumps(pools))
    db.execute("SELECT pgflow_prefect.bind_step(%s, 'heavy', 'work-pool', %s)", [workflow.slug, target])
    async with going(workflow, db, {"n": 1}) as run:
        if target == "gpu":
            flow_run = await await_flow_run(client, pool)
            assert flow_run.job_variables == {"env": {"SIZE": "big"}}
            assert (await start(flow_run)).is_completed()
    expected = {
        "gpu": "",
        "unknown": "name no work pool 'unknown': they name gpu, missing",
        "missing": "Prefect refuses a flow run on work pool 'no-such-pool'",
    }
    assert run.ended.is_completed() is (target == "gpu")
    assert expected[target] in str(read_run(db)[1])
