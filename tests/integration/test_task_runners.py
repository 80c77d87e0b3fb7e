"""Steps that Prefect's own task runners execute: in threads, and in the processes of a Dask cluster."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from distributed import LocalCluster
from prefect.client.orchestration import PrefectClient
from prefect.task_runners import ThreadPoolTaskRunner
from prefect_dask.task_runners import DaskTaskRunner
from psycopg.conninfo import conninfo_to_dict

from pgflow_prefect import AsyncStepContext, ItemContext, Settings, Skip, SqlFunction, StepContext, Workflow
from pgflow_prefect.errors import RunFailedError
from pgflow_prefect.execution.task_runner import AnyTaskRunner
from tests.conftest import Connection
from tests.engine import value
from tests.integration.conftest import (
    Define,
    await_task_runs,
    make_slug,
    read_edges,
    read_flow_run,
    read_run,
    read_steps,
)
from tests.integration.test_flow_rules import push
from tests.sharing import share

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

FAN_OUT = ("one", "two", "three")
DIAMOND = [*[("start", step) for step in FAN_OUT], *[(step, "end") for step in FAN_OUT]]


@contextmanager
def start_cluster() -> Iterator[str]:
    with LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=2, threads_per_worker=2, dashboard_address=None, silence_logs="ERROR"
    ) as opened:
        yield str(opened.scheduler_address)


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A Dask cluster of two processes, by its address; all processes of this session share it."""
    with share("dask", start_cluster) as address:
        yield address


@pytest.fixture(params=["threads", pytest.param("dask", marks=pytest.mark.processes)])
def task_runner(request: pytest.FixtureRequest) -> Any:
    if request.param == "threads":
        return ThreadPoolTaskRunner(max_workers=4)
    return DaskTaskRunner(address=request.getfixturevalue("cluster"))


class Frame:
    """Stands for a class that pydantic does not know, such as a DataFrame."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows


def make_diamond(define: Define, task_runner: AnyTaskRunner) -> Workflow:
    workflow = Workflow(make_slug(), task_runner=task_runner)
    define(workflow.slug, ["start", *FAN_OUT, "end"], DIAMOND)

    @workflow.step
    def start(payload: dict[str, int]) -> int:
        return payload["start"]

    def add(start: int, context: StepContext) -> dict[str, Any]:
        context.logger.info("adding in %s", os.getpid())
        return {"sum": start + 1, "process": os.getpid(), "workflow": workflow.slug}

    for step in FAN_OUT:
        workflow.step(step)(add)

    @workflow.step
    async def end(upstream: dict[str, dict[str, Any]], context: AsyncStepContext) -> dict[str, Any]:
        return {"sum": sum(each["sum"] for each in upstream.values()), "thread": threading.current_thread().name}

    return workflow


async def test_a_run_ends_as_it_does_without(
    define: Define, db: Connection, client: PrefectClient, task_runner: AnyTaskRunner
) -> None:
    workflow = make_diamond(define, task_runner)
    assert (await workflow.flow({"start": 41}))["end"]["sum"] == 3 * 42
    states = read_steps(db)
    assert {slug: state[:2] for slug, state in states.items()} == dict.fromkeys(states, ("completed", 1))
    flow_run = await read_flow_run(client, workflow.slug)
    shown = await await_task_runs(client, flow_run, dict.fromkeys(["start", *FAN_OUT, "end"], "Completed"))
    assert await read_edges(client, flow_run) == set(DIAMOND)
    known = db.execute("SELECT step_slug, task_run_id FROM pgflow_prefect.task_runs").fetchall()
    assert {(name, task_run.id) for name, task_run in shown.items()} == {*known}


async def test_dask_executes_handlers_in_its_own_processes(define: Define, db: Connection, cluster: str) -> None:
    workflow = make_diamond(define, DaskTaskRunner(address=cluster))
    await workflow.flow({"start": 1})
    processes = {read_steps(db)[step][2]["process"] for step in FAN_OUT}
    assert os.getpid() not in processes


async def test_a_flow_may_be_given_another_task_runner(define: Define, db: Connection) -> None:
    workflow = make_diamond(define, ThreadPoolTaskRunner())
    workflow = Workflow(workflow.slug)
    names: list[str] = []

    @workflow.step
    async def start() -> None:
        names.append(threading.current_thread().name)

    for step in (*FAN_OUT, "end"):

        @workflow.step(step)
        async def follow() -> None:
            names.append(threading.current_thread().name)

    threads: AnyTaskRunner = ThreadPoolTaskRunner()
    await workflow.flow.with_options(task_runner=threads)({})
    assert len(names) == 5
    assert not {threading.current_thread().name}.intersection(names)


async def test_a_map_is_executed_where_the_task_runner_executes_steps(
    db: Connection, pgflow_dsn: str, client: PrefectClient, task_runner: AnyTaskRunner
) -> None:
    workflow = Workflow(make_slug(), task_runner=task_runner)

    @workflow.step
    def numbers(payload: int) -> list[int]:
        return [*range(payload)]

    @workflow.map(over="numbers", retries=1, at_once=2)
    def double(item: int, context: ItemContext) -> dict[str, int]:
        if item == 1 and context.attempt == 1:
            raise ValueError("not yet")
        if item == 2:
            raise Skip("none of these")
        return {"double": 2 * item, "process": os.getpid()}

    @workflow.step
    async def total(double: list[dict[str, int]]) -> list[int]:
        return [each["double"] for each in double]

    await push(pgflow_dsn, workflow)
    assert await workflow.flow(4) == {"total": [0, 2, 6]}
    attempts = "SELECT item_index, attempts FROM pgflow.step_items ORDER BY item_index"
    assert db.execute(attempts).fetchall() == [(0, 1), (1, 2), (2, 1), (3, 1)]
    is_here = isinstance(task_runner, ThreadPoolTaskRunner)
    assert {each["process"] == os.getpid() for each in read_steps(db)["double"][2]} == {is_here}
    flow_run = await read_flow_run(client, workflow.slug)
    await await_task_runs(client, flow_run, dict.fromkeys(["numbers", "double", "total"], "Completed"))


async def test_retries_count_in_postgresql(
    define: Define, db: Connection, client: PrefectClient, task_runner: AnyTaskRunner
) -> None:
    workflow = Workflow(make_slug(), task_runner=task_runner)
    define(workflow.slug, ["flaky"])

    @workflow.step(retries=2, retry_delay_seconds=0.01)
    def flaky(context: StepContext) -> int:
        if context.attempt < 3:
            raise RuntimeError(f"attempt {context.attempt}")
        return context.attempt

    assert await workflow.flow({}) == {"flaky": 3}
    assert read_steps(db)["flaky"][:3] == ("completed", 3, 3)
    await await_task_runs(client, await read_flow_run(client, workflow.slug), {"flaky": "Completed"})


async def test_a_failure_says_why(define: Define, db: Connection, task_runner: AnyTaskRunner) -> None:
    workflow = Workflow(make_slug(), task_runner=task_runner)
    define(workflow.slug, ["break", "never"], [("break", "never")])

    @workflow.step("break")
    def fail() -> None:
        raise ValueError("the disk is full")

    @workflow.step
    def never() -> None:
        raise AssertionError("nothing follows a step that failed")

    with pytest.raises(RunFailedError, match="ValueError: the disk is full"):
        await workflow.flow({})
    assert read_steps(db)["break"][0] == "failed"
    assert read_run(db)[0] == "failed"


async def test_a_handler_that_exits_ends_its_attempt_and_no_process(
    define: Define, db: Connection, task_runner: AnyTaskRunner
) -> None:
    workflow = Workflow(make_slug(), task_runner=task_runner)
    define(workflow.slug, ["exits"])

    @workflow.step(retries=1)
    def exits() -> None:
        raise SystemExit(0)

    with anyio.fail_after(180), pytest.raises(RunFailedError, match="SystemExit: 0"):
        await workflow.flow({})
    assert read_steps(db)["exits"][:2] == ("failed", 2)


async def test_a_time_out_holds(define: Define, task_runner: AnyTaskRunner) -> None:
    workflow = Workflow(make_slug(), task_runner=task_runner)
    define(workflow.slug, ["slow"])

    @workflow.step(timeout_seconds=0.2)
    async def slow() -> None:
        import anyio  # noqa: PLC0415  of the process that executes it

        await anyio.sleep(60)

    with pytest.raises(RunFailedError, match=r"took longer than 0\.2 s"):
        await workflow.flow({})


async def test_writes_through_the_connection_come_with_the_completion(
    define: Define, db: Connection, task_runner: AnyTaskRunner
) -> None:
    db.execute("CREATE TABLE written (by_step text)")
    workflow = Workflow(make_slug(), task_runner=task_runner)
    define(workflow.slug, ["sync_one", "async_one", "broken"], [("sync_one", "broken"), ("async_one", "broken")])

    @workflow.step
    def sync_one(context: StepContext) -> None:
        context.connection.execute("INSERT INTO written VALUES ('sync')")

    @workflow.step
    async def async_one(context: AsyncStepContext) -> None:
        await context.connection.execute("INSERT INTO written VALUES ('async')")

    @workflow.step
    def broken(context: StepContext) -> None:
        context.connection.execute("INSERT INTO written VALUES ('broken')")
        raise RuntimeError("after the insert")

    with pytest.raises(RunFailedError):
        await workflow.flow({})
    assert db.execute("SELECT by_step FROM written ORDER BY 1").fetchall() == [("async",), ("sync",)]


async def test_what_sql_does_is_not_sent_anywhere(define: Define, db: Connection, task_runner: AnyTaskRunner) -> None:
    db.execute("CREATE FUNCTION public.double(input jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT input -> 'n' $$")
    workflow = Workflow(make_slug(), task_runner=task_runner)
    define(workflow.slug, ["n", "sql", "last"], [("n", "sql"), ("sql", "last")])

    @workflow.step
    def n() -> int:
        return 3

    workflow.bind("sql", SqlFunction("public.double"))

    @workflow.step
    def last(sql: int) -> int:
        return sql + 1

    assert await workflow.flow({}) == {"last": 4}


async def test_completed_steps_are_not_executed_again(
    define: Define, db: Connection, client: PrefectClient, task_runner: AnyTaskRunner
) -> None:
    db.execute("CREATE TABLE gate (open bool)")
    workflow = Workflow(make_slug(), task_runner=task_runner)
    define(workflow.slug, ["first", "second"], [("first", "second")])

    @workflow.step
    def first(context: StepContext) -> int:
        return context.attempt

    @workflow.step
    def second(first: int, context: StepContext) -> int:
        if context.connection.execute("SELECT FROM gate").fetchone() is None:
            raise RuntimeError("closed")
        return first

    with pytest.raises(RunFailedError):
        await workflow.flow({})
    run_id = read_run(db)[2]
    db.execute("INSERT INTO gate VALUES (true)")
    value(db, "SELECT pgflow.reopen_run(%s)", run_id)
    assert await workflow.flow(run_id=run_id) == {"second": 1}
    assert read_steps(db)["first"][:3] == ("completed", 1, 1)


async def test_a_handler_that_cannot_travel_fails_its_step_and_says_so(
    define: Define, db: Connection, cluster: str
) -> None:
    workflow = Workflow(make_slug(), task_runner=DaskTaskRunner(address=cluster))
    define(workflow.slug, ["locked"])
    lock = threading.Lock()

    @workflow.step
    def locked() -> bool:
        return lock.locked()

    with pytest.raises(RunFailedError, match=r"step 'locked' can't be given to DaskTaskRunner: .*has to be picklable"):
        await workflow.flow({})
    assert read_steps(db)["locked"][0] == "failed"


@pytest.mark.parametrize("how", ["cancelled", "completed by another program", "taken over"])
async def test_a_run_that_ends_while_a_thread_works_holds_up_no_other(define: Define, db: Connection, how: str) -> None:
    threads: AnyTaskRunner = ThreadPoolTaskRunner()
    workflow = Workflow(make_slug(), task_runner=threads)
    define(workflow.slug, ["slow"])
    begun, released = threading.Event(), threading.Event()

    @workflow.step
    def slow() -> int:
        begun.set()
        assert released.wait(60)
        return 1

    flow = workflow.make_flow(Settings(lease=1))
    ends: list[Any] = []

    async def execute() -> None:
        ends.append(await flow({}, return_state=True))

    with anyio.fail_after(180):
        async with anyio.create_task_group() as group:
            group.start_soon(execute)
            await anyio.to_thread.run_sync(begun.wait)
            run_id = read_run(db)[2]
            if how == "cancelled":
                value(db, "SELECT pgflow.cancel_run(%s, 'cancelled: enough')", run_id)
            elif how == "taken over":
                value(db, "SELECT pgflow.take_run(%s)", run_id)
            else:
                value(db, "SELECT pgflow.complete_step(%s, 'slow', '2')", run_id)
            # The event loop goes on meanwhile, and the thread's report finds it doing so.
            threading.Timer(2, released.set).start()
    shown = {"cancelled": "Cancelled", "completed by another program": "Completed", "taken over": "Superseded"}
    assert ends[0].name == shown[how]
    assert read_steps(db)["slow"][2] == {"cancelled": None, "completed by another program": 2, "taken over": None}[how]


async def test_what_libpq_is_told_here_holds_elsewhere(
    define: Define, db: Connection, dsn: str, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = make_diamond(define, DaskTaskRunner(address=cluster))
    monkeypatch.delenv("PGFLOW_DSN")
    for name, text in conninfo_to_dict(dsn).items():
        monkeypatch.setenv({"dbname": "PGDATABASE"}.get(name, f"PG{name.upper()}"), str(text))
    assert (await workflow.flow({"start": 1}))["end"]["sum"] == 6


async def test_steps_pass_values_that_are_no_json_through_a_storage(
    db: Connection, define: Define, task_runner: Any, tmp_path: Path
) -> None:
    workflow = Workflow(make_slug(), task_runner=task_runner, result_storage=tmp_path, result_serializer="pickle")
    define(workflow.slug, ["make", "take"], [("make", "take")])

    @workflow.step
    def make() -> Frame:
        return Frame([1, 2])

    @workflow.step(result_serializer="json")
    def take(make: Frame) -> list[int]:
        return make.rows

    await workflow.flow()
    reference = read_steps(db)["take"][2]["$pgflow_result"]
    assert json.loads((tmp_path / reference["key"]).read_text()) == [1, 2]
