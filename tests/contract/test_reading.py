"""What `list`, `graph`, `runs` and `status` read, on every implementation of the contract."""

from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from pgflow_prefect.database.run_names import parse_run_name
from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.model import Dep
from pgflow_prefect.errors import UnknownRunError, UnknownWorkflowError
from pgflow_prefect.models import Status
from tests.contract.worlds import BrokenError, World
from tests.engine import DIAMOND
from tests.json_values import decode

pytestmark = pytest.mark.anyio

DIAMOND_DEPS = {("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")}


async def read_statuses(store: Store, run_id: UUID) -> dict[str, str]:
    return {state.step_slug: str(state.status) for state in await store.list_step_states(run_id)}


def break_b(step: str) -> object:
    if step == "b":
        raise BrokenError("no paper")
    return step


async def test_the_database_has_the_implementation_that_was_installed(store: Store, world: World) -> None:
    assert store.implementation == world.implementation


async def test_a_definition_is_read_as_it_was_written(store: Store, world: World) -> None:
    world.define("diamond", DIAMOND)
    world.define("another", {"only": []})
    definition = await store.load_definition("diamond")
    assert sorted(definition.steps) == sorted(DIAMOND)
    assert set(definition.deps) == DIAMOND_DEPS
    assert definition.deps[0] == Dep("a", "b")
    assert await store.list_slugs() == ["another", "diamond"]
    with pytest.raises(UnknownWorkflowError, match="did you mean 'diamond'"):
        await store.load_definition("diamonds")


async def test_workflows_are_listed_with_their_sizes_and_their_runs_by_status(store: Store, world: World) -> None:
    world.define("diamond", DIAMOND)
    world.start("diamond", {})
    world.work("diamond", break_b)
    world.work("diamond", break_b)  # its step b fails
    world.start("diamond", {})
    [found] = await store.list_workflows()
    assert (found.slug, found.steps, found.deps) == ("diamond", 4, 4)
    assert (found.pending, found.completed, found.failed) == (1, 0, 1)


async def test_a_run_begins_pending_with_its_root_steps(store: Store, world: World) -> None:
    world.define("diamond", DIAMOND)
    run_id = world.start("diamond", {"n": 1})
    run = await store.read_run(run_id, with_payload=True)
    assert (run.id, run.workflow_slug, run.status) == (run_id, "diamond", Status.PENDING)
    assert (decode(run.payload), run.remaining, run.steps, run.finished_at) == ({"n": 1}, 4, 4, None)
    [state] = await store.list_step_states(run_id)
    assert (state.step_slug, state.status, state.attempts) == ("a", Status.PENDING, 0)
    assert (state.started_at, state.finished_at, state.tasks) == (None, None, None)
    assert (await store.read_run(run_id)).payload is None, "the caller did not ask for it"


async def test_a_run_is_completed_after_its_last_step(store: Store, world: World) -> None:
    world.define("diamond", DIAMOND)
    run_id = world.start("diamond", {})
    world.work("diamond", lambda step: {"of": step})
    assert await read_statuses(store, run_id) == {"a": "completed", "b": "pending", "c": "pending"}
    assert (await store.read_run(run_id)).remaining == 3
    world.work("diamond", lambda step: None)
    world.work("diamond", lambda step: "done")
    run = await store.read_run(run_id)
    assert (run.status, run.remaining, run.error_message) == (Status.COMPLETED, 0, None)
    assert run.finished_at is not None
    assert run.created_at is not None
    assert run.created_at <= run.finished_at
    states = {state.step_slug: state for state in await store.list_step_states(run_id)}
    assert [*states][:1] + [*states][-1:] == ["a", "d"]
    results = {step: decode(state.step_result) for step, state in states.items()}
    assert results == {"a": {"of": "a"}, "b": None, "c": None, "d": "done"}
    assert {state.attempts for state in states.values()} == {1}
    for state in states.values():
        assert state.created_at is not None
        assert state.started_at is not None
        assert state.finished_at is not None
        assert state.created_at <= state.started_at <= state.finished_at


async def test_a_failed_step_fails_its_run_with_the_reason(store: Store, world: World) -> None:
    world.define("diamond", DIAMOND)
    run_id = world.start("diamond", {})
    world.work("diamond", break_b)
    world.work("diamond", break_b)
    run = await store.read_run(run_id)
    assert (run.status, run.error_message) == (Status.FAILED, 'step "b" failed: no paper')
    assert run.finished_at is not None
    states = {state.step_slug: state for state in await store.list_step_states(run_id)}
    assert (states["b"].status, states["b"].error_message) == (Status.FAILED, "no paper")
    assert states["b"].step_result is None
    assert states["b"].finished_at is not None
    assert "d" not in states


async def test_the_ends_of_steps_are_their_states_without_results(store: Store, world: World) -> None:
    world.define("diamond", DIAMOND)
    run_id = world.start("diamond", {})
    world.work("diamond", break_b)
    world.work("diamond", break_b)
    ends = {state.step_slug: state for state in await store.list_step_ends(run_id, ["a", "b", "d"])}
    states = {state.step_slug: state for state in await store.list_step_states(run_id)}
    assert sorted(ends) == ["a", "b"]
    for step, end in ends.items():
        assert end == states[step].model_copy(update={"step_result": None, "first_claimed_at": end.first_claimed_at}), (
            step
        )


async def test_runs_are_listed_by_workflow_status_and_age(store: Store, world: World) -> None:
    for slug in ("first", "second"):
        world.define(slug, {"a": []})
    old, new, other = world.start("first", 1), world.start("first", 2), world.start("second", 3)
    world.work("second", lambda step: None)

    async def list_ids(**only: object) -> list[UUID]:
        return [run.id for run in await store.list_runs(**only)]  # type: ignore[arg-type]

    assert await list_ids() == [other, new, old], "the newest first"
    assert await list_ids(limit=2) == [other, new]
    assert await list_ids(workflow_slug="first") == [new, old]
    assert await list_ids(status=Status.COMPLETED) == [other]
    assert await list_ids(status=Status.PENDING, workflow_slug="first", limit=1) == [new]
    assert await list_ids(status=Status.FAILED) == []
    now = await store.read_clock()
    assert await list_ids(since=now + timedelta(hours=1)) == []
    assert len(await list_ids(since=now - timedelta(hours=1))) == 3
    [listed] = await store.list_runs(status=Status.COMPLETED, with_payload=True)
    read = await store.read_run(other, with_payload=True)
    assert listed == read.model_copy(update={"is_older": False}), "a list does not say why a run waits"
    assert decode(listed.payload) == 3


async def test_a_run_is_found_by_its_id_the_beginning_of_it_or_as_the_latest(store: Store, world: World) -> None:
    with pytest.raises(UnknownRunError, match="there is no run yet"):
        await store.find_run_id(parse_run_name("latest"))
    world.define("one", {"a": []})
    world.start("one", {})
    run_id = world.start("one", {})
    for name in ("latest", str(run_id), str(run_id)[:13]):
        assert await store.find_run_id(parse_run_name(name)) == run_id
    unknown = uuid4()
    with pytest.raises(UnknownRunError, match=str(unknown)):
        await store.read_run(unknown)
    with pytest.raises(UnknownRunError, match=str(unknown)):
        await store.load_run_definition(unknown)


async def test_a_run_has_the_definition_that_it_began_with(store: Store, world: World) -> None:
    world.define("diamond", DIAMOND)
    run_id = world.start("diamond", {})
    world.work("diamond", lambda step: None)
    assert await store.load_run_definition(run_id) == await store.load_definition("diamond")
    if world.implementation.definition_is_editable:
        world.db.execute("DELETE FROM pgflow.deps WHERE to_step_slug = 'd'")
        assert set((await store.load_run_definition(run_id)).deps) == DIAMOND_DEPS


async def test_a_read_of_a_run_costs_its_own_size(store: Store, world: World) -> None:
    world.define("diamond", DIAMOND)
    for _ in range(60):
        run_id = world.start("diamond", {})
    world.work("diamond", lambda step: None)
    calls = {
        "read_run": ("SELECT * FROM pgflow_prefect.read_run(%s, 60, true)", 20),
        "list_step_states": ("SELECT * FROM pgflow_prefect.list_step_states(%s)", 40),
        "list_step_ends": ("SELECT * FROM pgflow_prefect.list_step_ends(%s, ARRAY['a', 'b'])", 40),
        "load_run_definition": ("SELECT * FROM pgflow_prefect.load_run_definition(%s)", 40),
    }
    for name, (statement, most) in calls.items():
        assert count_rows_read(world, statement, run_id) < most, name


def count_rows_read(world: World, statement: str, *parameters: object) -> int:
    read = """
        SELECT coalesce(sum(seq_tup_read + coalesce(idx_tup_fetch, 0)), 0)::bigint FROM pg_stat_xact_user_tables
        WHERE schemaname IN ('pgflow', 'pgflow_prefect')
    """
    with world.db.transaction():  # within one, the statistics are not handed on
        # Once autovacuum has analyzed so small a table, the planner reads all of it, whichever index there is.
        world.db.execute("SET LOCAL enable_seqscan = off")
        [[before]] = world.db.execute(read).fetchall()
        world.db.execute(statement.encode(), parameters)
        [[after]] = world.db.execute(read).fetchall()
    return int(str(after)) - int(str(before))
