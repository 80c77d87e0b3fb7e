"""A run of a workflow as a run of a Prefect flow: what executes when, and what both sides show of it."""

from threading import Barrier
from typing import Any

import anyio
import pytest
from prefect.client.orchestration import PrefectClient

from pgflow_prefect import StepContext, Workflow
from tests.conftest import Connection
from tests.integration.conftest import (
    Define,
    await_task_runs,
    make_slug,
    read_edges,
    read_flow_run,
    read_run,
    read_steps,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

DIAMOND = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]


async def test_a_diamond_runs_and_prefect_shows_its_edges(
    db: Connection, define: Define, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, "abcd", DIAMOND)

    @workflow.step
    def a(payload: dict[str, int]) -> int:
        return payload["n"]

    @workflow.step
    async def b(a: int) -> int:
        return a + 1

    @workflow.step
    async def c(a: int) -> int:
        return a * 10

    @workflow.step("d")
    def join(b: int, c: int, upstream: dict[str, int], context: StepContext) -> dict[str, Any]:
        return {"sum": b + c, "upstream": upstream, "key": context.idempotency_key}

    result = await workflow.flow(payload={"n": 5})

    run_id = read_run(db)[2]
    assert result == {"d": {"sum": 56, "upstream": {"b": 6, "c": 50}, "key": f"{run_id}/d"}}
    assert read_run(db)[0] == "completed"
    assert {slug: state[:3] for slug, state in read_steps(db).items()} == {
        "a": ("completed", 1, 5),
        "b": ("completed", 1, 6),
        "c": ("completed", 1, 50),
        "d": ("completed", 1, result["d"]),
    }
    flow_run = await read_flow_run(client, workflow.slug)
    assert flow_run.state_name == "Completed"
    task_runs = await await_task_runs(client, flow_run, dict.fromkeys("abcd", "Completed"))
    assert await read_edges(client, flow_run) == set(DIAMOND)
    links = db.execute("SELECT run_id, flow_run_id, epoch FROM pgflow_prefect.flow_runs").fetchall()
    assert links == [(run_id, flow_run.id, 1)]
    noted: Any = db.execute("SELECT step_slug, task_run_id, state_name FROM pgflow_prefect.task_runs").fetchall()
    assert {row[0]: row[1:] for row in noted} == {slug: (run.id, "Completed") for slug, run in task_runs.items()}


async def test_a_step_starts_when_its_own_upstream_is_done_and_not_its_layer(define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["slow", "quick", "after_quick"], [("quick", "after_quick")])
    done = anyio.Event()

    @workflow.step
    async def slow() -> None:
        await done.wait()  # never, if the next layer waited for this one

    @workflow.step
    async def quick() -> None: ...

    @workflow.step
    async def after_quick() -> None:
        done.set()

    with anyio.fail_after(180):
        await workflow.flow()


async def test_an_observer_hears_of_a_steps_end_before_the_next_one_begins(define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, "abc", [("a", "b"), ("b", "c")])
    heard: list[str] = []
    for slug in "abc":

        @workflow.step(slug)
        async def work() -> None: ...

    await workflow.make_flow(observe=lambda slug, state: heard.append(f"{slug} {state}"))()
    assert heard == [f"{slug} {state}" for slug in "abc" for state in ("Running", "Completed")]


async def test_sync_handlers_run_at_the_same_time(define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["left", "right"])
    together = Barrier(2, timeout=60)

    @workflow.step
    def left() -> None:
        together.wait()

    @workflow.step
    def right() -> None:
        together.wait()

    await workflow.flow()
