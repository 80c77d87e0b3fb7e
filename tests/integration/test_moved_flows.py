"""Flows of the released pgflow that were moved to Prefect: pgflow's retries, conditions, maps and skips in Prefect."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import anyio
import psycopg
import pytest
from prefect.client.orchestration import PrefectClient
from pydantic import JsonValue

from pgflow_prefect import ItemContext, StepContext, Workflow
from pgflow_prefect.database.connection import connect as open_connection
from pgflow_prefect.database.schema import install_schema
from pgflow_prefect.errors import RunFailedError
from tests.databases import Databases
from tests.edge_worker import EdgeTask, EdgeWorker
from tests.engine import value
from tests.integration.conftest import await_task_runs, make_slug, read_flow_run
from tests.released_lab import FAKE, ReleasedFlows, install_released, open_flows

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]

SKIPPED = """required_input_pattern => '{"vip": true}', when_unmet => 'skip'"""
OPTIONAL = "when_exhausted => 'skip'"


@pytest.fixture(scope="module")
def released_template(databases: Databases) -> str:
    """The name of a database of the released pgflow with our schema."""
    made = databases.make(None)
    install_released(made, FAKE)

    async def install() -> None:
        async with await open_connection(made, timeout=30) as connection:
            await install_schema(connection)

    anyio.run(install)
    return str(psycopg.conninfo.conninfo_to_dict(made)["dbname"])


@pytest.fixture
def flows(databases: Databases, released_template: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReleasedFlows]:
    """A database of the released pgflow, which this process is set up for."""
    made = databases.make(released_template)
    monkeypatch.setenv("PGFLOW_DSN", made)
    with open_flows(made) as opened:
        opened.db.execute("SELECT pgflow_prefect.claim_installation()")
        yield opened
    databases.discard(made)


@pytest.fixture
def workflow() -> Workflow:
    return Workflow(make_slug())


def move(flows: ReleasedFlows, slug: str) -> None:
    flows.db.execute("SELECT pgflow_prefect.move_flow(%s)", [slug])


async def test_pgflow_decides_when_a_failed_step_is_tried_again(
    flows: ReleasedFlows, workflow: Workflow, client: PrefectClient
) -> None:
    attempts: list[int] = []

    @workflow.step(retries=9)  # pgflow's option counts
    async def first(payload: dict[str, JsonValue], context: StepContext) -> JsonValue:
        attempts.append(context.attempt)
        if context.attempt < 3:
            raise ValueError("not yet")
        return payload["n"]

    @workflow.step
    def second(first: int, context: StepContext) -> int:
        context.connection.execute("CREATE TABLE public.written (n int)")
        context.connection.execute("INSERT INTO public.written VALUES (%s)", [first])
        return first * 2

    flows.define(workflow.slug, {"first": [], "second": ["first"]}, attempts=3)
    move(flows, workflow.slug)
    assert await workflow.flow(payload={"n": 4}) == {"second": 8}
    assert attempts == [1, 2, 3]
    assert value(flows.db, "SELECT n FROM public.written") == 4
    assert value(flows.db, "SELECT status FROM pgflow.runs") == "completed"
    flow_run = await read_flow_run(client, workflow.slug)
    await await_task_runs(client, flow_run, {"first": "Completed", "second": "Completed"})


@pytest.mark.thorough
async def test_a_step_that_fails_in_its_last_attempt_fails_the_run_and_writes_nothing(
    flows: ReleasedFlows, workflow: Workflow
) -> None:
    @workflow.step
    def first(context: StepContext) -> None:
        context.connection.execute("CREATE TABLE public.never (n int)")
        raise ValueError("the disk is full")

    @workflow.step
    def second(first: None) -> None: ...

    flows.define(workflow.slug, {"first": [], "second": ["first"]}, attempts=2)
    move(flows, workflow.slug)
    with pytest.raises(RunFailedError, match="the disk is full"):
        await workflow.flow(payload={})
    assert value(flows.db, "SELECT to_regclass('public.never')") is None
    assert value(flows.db, "SELECT attempts_count FROM pgflow.step_tasks") == 2
    assert value(flows.db, "SELECT status FROM pgflow.runs") == "failed"


async def test_conditions_and_exhausted_steps_are_skipped_as_pgflow_says(
    flows: ReleasedFlows, workflow: Workflow, client: PrefectClient
) -> None:
    @workflow.step
    async def choose() -> str:
        raise AssertionError("its condition is not met")

    @workflow.step
    async def guess() -> str:
        raise ValueError("no idea")

    @workflow.step
    async def wrap(choose: str | None = None, guess: str | None = None) -> list[JsonValue]:
        return [choose, guess]

    steps = {"choose": [], "guess": [], "wrap": ["choose", "guess"]}
    flows.define(workflow.slug, steps, choose=SKIPPED, guess=OPTIONAL)
    move(flows, workflow.slug)
    assert await workflow.flow(payload={"vip": False}) == {"wrap": [None, None]}
    flow_run = await read_flow_run(client, workflow.slug)
    await await_task_runs(client, flow_run, {"choose": "Skipped", "guess": "Skipped", "wrap": "Completed"})


async def test_each_task_of_a_map_has_the_attempts_of_pgflow(
    flows: ReleasedFlows, workflow: Workflow, client: PrefectClient
) -> None:
    calls: Counter[int] = Counter()

    @workflow.step
    async def photos(payload: dict[str, Any]) -> list[int]:
        return [*range(payload["photos"])]

    @workflow.map(over="photos", at_once=2)
    async def resize(item: int, context: ItemContext) -> int:
        calls[item] += 1
        if item == 1 and context.attempt == 1:
            raise ValueError("not yet")
        return item * 10

    @workflow.step
    async def report(resize: list[int]) -> int:
        return sum(resize)

    steps = {"photos": [], "resize": ["photos"], "report": ["resize"]}
    flows.define(workflow.slug, steps, maps=["resize"], attempts=2)
    move(flows, workflow.slug)
    assert await workflow.flow(payload={"photos": 4}) == {"report": 60}
    assert calls == {0: 1, 1: 2, 2: 1, 3: 1}
    flow_run = await read_flow_run(client, workflow.slug)
    names = ["photos", "resize", "report", *(f"resize[{index}]" for index in range(4))]
    await await_task_runs(client, flow_run, dict.fromkeys(names, "Completed"))


async def test_a_map_of_nothing_is_completed_by_pgflow(flows: ReleasedFlows, workflow: Workflow) -> None:
    @workflow.step
    async def photos() -> list[int]:
        return []

    @workflow.map(over="photos")
    async def resize(item: int) -> int:
        raise AssertionError("there is none")

    @workflow.step
    async def report(resize: list[int]) -> int:
        return len(resize)

    steps = {"photos": [], "resize": ["photos"], "report": ["resize"]}
    flows.define(workflow.slug, steps, maps=["resize"])
    move(flows, workflow.slug)
    assert await workflow.flow(payload={}) == {"report": 0}


async def test_handlers_that_do_not_fit_fail_the_run(flows: ReleasedFlows, workflow: Workflow) -> None:
    @workflow.step
    async def first(unknown: int) -> int:
        return unknown

    flows.define(workflow.slug, {"first": []}, attempts=3)
    move(flows, workflow.slug)
    with pytest.raises(RunFailedError, match="unknown"):
        await workflow.flow(payload={})
    row = flows.db.execute("SELECT run_id, status FROM pgflow.runs").fetchone()
    assert row is not None
    assert (isinstance(row[0], UUID), row[1]) == (True, "failed")


async def test_a_row_binds_a_step_to_an_sql_function(flows: ReleasedFlows, workflow: Workflow) -> None:
    @workflow.step
    async def first(payload: dict[str, Any]) -> Any:
        return payload["n"]

    flows.db.execute(b"""
        CREATE FUNCTION public.double(input jsonb) RETURNS jsonb LANGUAGE sql AS
        $$ SELECT to_jsonb(2 * (input ->> 'first')::int) $$
    """)
    flows.define(workflow.slug, {"first": [], "second": ["first"]})
    bind = "SELECT pgflow_prefect.bind_step(%s, 'second', 'sql', 'public.double')"
    move(flows, workflow.slug)
    assert value(flows.db, bind, workflow.slug)
    assert await workflow.flow(payload={"n": 4}) == {"second": 8}
    assert value(flows.db, "SELECT pgflow_prefect.undo_binding(%s, 'second')", workflow.slug)
    assert value(flows.db, "SELECT count(*) FROM pgflow_prefect.bindings") == 0


async def test_a_moved_step_is_executed_here_and_an_edge_worker_does_the_others(
    flows: ReleasedFlows, workflow: Workflow, client: PrefectClient
) -> None:
    @workflow.map(over="photos")
    async def resize(item: int, context: ItemContext) -> int:
        if item == 1 and context.attempt == 1:
            raise ValueError("not yet")
        return item * 10

    @workflow.step
    def store(resize: list[int], context: StepContext) -> int:
        context.connection.execute("CREATE TABLE public.stored (n int)")
        context.connection.execute("INSERT INTO public.stored VALUES (%s)", [sum(resize)])
        return sum(resize)

    def do(task: EdgeTask) -> object:
        return [*range(4)] if task.step == "photos" else f"{task.step} after {task.given}"

    steps = {"photos": [], "resize": ["photos"], "store": ["resize"], "report": ["store"]}
    flows.define(workflow.slug, steps, maps=["resize"], attempts=2)
    for step in ("resize", "store"):
        flows.db.execute("SELECT pgflow_prefect.bind_step(%s, %s, 'python')", [workflow.slug, step])
    with EdgeWorker(os.environ["PGFLOW_DSN"], workflow.slug, do, poll=1) as edge:
        assert await workflow.flow(payload={}) == {"report": "report after {'store': 60}"}
        assert [task.step for task in edge.executed] == ["photos", "report"]
    assert value(flows.db, "SELECT n FROM public.stored") == 60
    assert value(flows.db, "SELECT count(*) FROM pgflow_prefect.taken_out") == 0
    flow_run = await read_flow_run(client, workflow.slug)
    names = [*steps, *(f"resize[{index}]" for index in range(4))]
    await await_task_runs(client, flow_run, dict.fromkeys(names, "Completed"))
