"""Caching between runs: a step takes over the result that an earlier run has for the same key."""

from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.context import TaskRunContext
from prefect.tasks import task_input_hash

from pgflow_prefect import Branch, StepContext, Workflow
from pgflow_prefect.database.store import Store
from pgflow_prefect.handlers.references import MARK
from tests.conftest import Connection
from tests.engine import run_workflow, value
from tests.integration.conftest import Define, await_task_runs, make_slug
from tests.statement_counter import StatementCounter

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]


def by_day(context: TaskRunContext, arguments: dict[str, Any]) -> str | None:
    day = arguments["payload"].get("day")
    return None if day is None else f"{context.task.name} {day}"


def make_workflow(define: Define, slug: str | None = None, **options: Any) -> tuple[Workflow, list[str]]:
    """Return a workflow whose step `load` is cached by the day, and the days for which it was executed."""
    executed: list[str] = []
    workflow = Workflow(slug or make_slug())
    if slug is None:
        define(workflow.slug, ["load", "count"], [("load", "count")])

    @workflow.step(**{"cache_key_fn": by_day, **options})
    def load(payload: dict[str, str], context: StepContext) -> list[str]:
        executed.append(payload.get("day", ""))
        return [payload.get("day", ""), str(context.run_id)]

    @workflow.step
    def count(load: list[str]) -> list[str]:
        return load

    return workflow, executed


async def execute(db: Connection, workflow: Workflow, payload: object) -> tuple[UUID, Any]:
    """Execute a run, and return its id and the result of its last step."""
    run_id = run_workflow(db, workflow.slug, payload).id
    return run_id, (await workflow.flow(run_id=run_id))["count"]


async def test_a_step_takes_over_the_result_of_an_earlier_run_with_the_same_key(
    db: Connection, define: Define, client: PrefectClient
) -> None:
    workflow, executed = make_workflow(define)
    first, result = await execute(db, workflow, {"day": "monday"})
    second, again = await execute(db, workflow, {"day": "monday", "more": "of no interest"})
    assert again == result == ["monday", str(first)]
    _, other = await execute(db, workflow, {"day": "tuesday"})
    assert other[0] == "tuesday"
    assert executed == ["monday", "tuesday"]
    state = db.execute(
        "SELECT status, attempts, step_result->>1 FROM pgflow.step_states WHERE run_id = %s AND step_slug = 'load'",
        (second,),
    ).fetchone()
    assert state == ("completed", 1, str(first)), "a step like any other: its row has the result"
    noted = "SELECT state_name FROM pgflow_prefect.task_runs WHERE run_id = %s AND step_slug = 'load'"
    assert value(db, noted, second) == "Cached"
    flow_run: FlowRun = await client.read_flow_run(await find_flow_run(db, second))
    shown = await await_task_runs(client, flow_run, {"load": "Cached", "count": "Completed"})
    state_shown = shown["load"].state
    assert state_shown is not None
    assert state_shown.message == f"the result of run {first}, by cache_key_fn"


async def find_flow_run(db: Connection, run_id: UUID) -> UUID:
    found = value(db, "SELECT flow_run_id FROM pgflow_prefect.flow_runs WHERE run_id = %s", run_id)
    assert isinstance(found, UUID)
    return found


async def test_without_a_key_the_step_is_executed_and_not_cached(db: Connection, define: Define) -> None:
    workflow, executed = make_workflow(define)
    for _ in range(2):
        await execute(db, workflow, {})
    assert executed == ["", ""]
    assert value(db, "SELECT count(*) FROM pgflow_prefect.cached_results") == 0


async def test_a_result_expires_by_the_clock_of_the_database(db: Connection, define: Define) -> None:
    workflow, executed = make_workflow(define, cache_expiration=timedelta(hours=1))
    first, _ = await execute(db, workflow, {"day": "monday"})
    await execute(db, workflow, {"day": "monday"})
    assert executed == ["monday"]
    left = value(db, "SELECT expires_at - finished_at FROM pgflow_prefect.cached_results WHERE run_id = %s", first)
    assert left == timedelta(hours=1)
    db.execute("UPDATE pgflow_prefect.cached_results SET expires_at = clock_timestamp()")
    await execute(db, workflow, {"day": "monday"})
    assert executed == ["monday"] * 2


async def test_a_pruned_run_is_no_source(db: Connection, store: Store, define: Define) -> None:
    workflow, executed = make_workflow(define)
    first, _ = await execute(db, workflow, {"day": "monday"})
    await store.prune_run(first)
    await execute(db, workflow, {"day": "monday"})
    assert executed == ["monday"] * 2
    assert value(db, "SELECT count(*) FROM pgflow_prefect.cached_results") == 1


async def test_a_changed_definition_takes_over_nothing(db: Connection, define: Define) -> None:
    workflow, executed = make_workflow(define)
    await execute(db, workflow, {"day": "monday"})
    db.execute("INSERT INTO pgflow.steps VALUES (%s, 'more')", (workflow.slug,))
    workflow.step("more")(lambda: None)
    await execute(db, workflow, {"day": "monday"})
    assert executed == ["monday"] * 2


async def test_a_changed_handler_takes_over_nothing(db: Connection, define: Define) -> None:
    workflow, executed = make_workflow(define)
    await execute(db, workflow, {"day": "monday"})
    changed = Workflow(workflow.slug)

    @changed.step(cache_key_fn=by_day)
    def load(payload: dict[str, str]) -> list[str]:
        return ["changed"]

    @changed.step
    def count(load: list[str]) -> list[str]:
        return load

    assert (await execute(db, changed, {"day": "monday"}))[1] == ["changed"]
    unchanged, executed_again = make_workflow(define, workflow.slug)
    await execute(db, unchanged, {"day": "monday"})
    assert (executed, executed_again) == (["monday"], []), "the same source in another process"


async def test_another_workflow_or_step_takes_over_nothing(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["one", "two", "count"])
    executed: list[str] = []

    def load(context: StepContext) -> str:
        executed.append(context.step_slug)
        return context.step_slug

    for slug in ("one", "two"):
        workflow.step(slug, cache_key_fn=lambda context, arguments: "the same")(load)
    workflow.step("count")(lambda: None)
    await execute(db, workflow, {})
    await execute(db, workflow, {})
    assert sorted(executed) == ["one", "two"]


async def test_the_key_functions_of_prefect_work(db: Connection, define: Define) -> None:
    policy: Any = CacheKeyFnPolicy(cache_key_fn=task_input_hash).cache_key_fn
    workflow, executed = make_workflow(define, cache_key_fn=policy)
    await execute(db, workflow, {"day": "monday"})
    await execute(db, workflow, {"day": "monday"})
    await execute(db, workflow, {"day": "tuesday"})
    assert executed == ["monday", "tuesday"]


@pytest.mark.parametrize("wrong", [ValueError("no key"), 7], ids=["raises", "no text"])
async def test_a_key_function_that_fails_means_no_cache(db: Connection, define: Define, wrong: object) -> None:
    def fail(context: TaskRunContext, arguments: dict[str, Any]) -> Any:
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    workflow, executed = make_workflow(define, cache_key_fn=fail)
    for _ in range(2):
        await execute(db, workflow, {"day": "monday"})
    assert executed == ["monday"] * 2


async def test_an_async_key_function_is_awaited(db: Connection, define: Define) -> None:
    async def find(context: TaskRunContext, arguments: dict[str, Any]) -> str:
        assert arguments == {"payload": {"day": "monday"}}
        return "key"

    workflow, executed = make_workflow(define, cache_key_fn=find)
    for _ in range(2):
        await execute(db, workflow, {"day": "monday"})
    assert executed == ["monday"]


async def test_a_failed_or_skipped_step_is_no_source(db: Connection, define: Define) -> None:
    workflow, executed = make_workflow(define)
    first, _ = await execute(db, workflow, {"day": "monday"})
    db.execute(
        "UPDATE pgflow.step_states SET skip_reason = 'requested' WHERE run_id = %s AND step_slug = 'load'", (first,)
    )
    await execute(db, workflow, {"day": "monday"})
    assert executed == ["monday"] * 2


async def test_a_result_with_branches_is_not_cached(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["choose", "count"], [("choose", "count")])

    @workflow.step(cache_key_fn=lambda context, arguments: "key")
    def choose() -> Branch[int]:
        return Branch("count", result=1)

    @workflow.step
    def count(choose: int) -> int:
        return choose

    for _ in range(2):
        assert (await execute(db, workflow, {}))[1] == 1
    assert value(db, "SELECT count(*) FROM pgflow_prefect.cached_results") == 0


async def test_a_handler_that_writes_through_its_connection_is_cached_with_its_writes(
    db: Connection, define: Define
) -> None:
    db.execute("CREATE TABLE public.written (run_id uuid)")
    workflow = Workflow(make_slug())
    define(workflow.slug, ["load", "count"], [("load", "count")])

    @workflow.step(cache_key_fn=lambda context, arguments: "key")
    def load(context: StepContext) -> int:
        context.connection.execute("INSERT INTO public.written VALUES (%s)", (context.run_id,))
        return 1

    @workflow.step
    def count(load: int) -> int:
        return load

    first, _ = await execute(db, workflow, {})
    await execute(db, workflow, {})
    assert db.execute("SELECT run_id FROM public.written").fetchall() == [(first,)]


async def test_a_stored_result_is_copied_so_that_each_run_has_an_object_of_its_own(
    db: Connection, store: Store, define: Define, tmp_path: Path
) -> None:
    options: Any = {"result_storage": tmp_path, "result_serializer": "pickle"}
    workflow, executed = make_workflow(define, **options)
    first, result = await execute(db, workflow, {"day": "monday"})
    second, again = await execute(db, workflow, {"day": "monday"})
    assert (again, executed) == (result, ["monday"])
    found = "SELECT step_result->%s->>'key' FROM pgflow.step_states WHERE run_id = %s AND step_slug = 'load'"
    keys = [str(value(db, found, MARK, run_id)) for run_id in (first, second)]
    assert [str(run_id) in key for run_id, key in zip((first, second), keys, strict=True)] == [True, True]
    for key in keys:
        (tmp_path / key).unlink()
    await execute(db, workflow, {"day": "monday"})
    assert executed == ["monday"] * 2, "a missing object is no result"


async def test_a_step_without_caching_costs_no_statement(
    counter: StatementCounter, db: Connection, define: Define
) -> None:
    workflow, _ = make_workflow(define)
    await execute(db, workflow, {"day": "monday"})
    assert counter.count_calls("find_cached") == 1, "for `load`, and none for `count`"
