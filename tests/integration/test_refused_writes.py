"""A user's trigger refuses the claim or the end of a step of one run: that run is set aside, and other runs go on."""

from collections.abc import Awaitable, Callable
from typing import Any, LiteralString
from uuid import UUID

import pytest
from prefect.task_runners import ThreadPoolTaskRunner

from pgflow_prefect import AsyncStepContext, ItemContext, StepContext, Workflow
from pgflow_prefect.database.diagnosis import DiagnosisStatements
from pgflow_prefect.database.store import Store
from tests.conftest import Connection
from tests.engine import get_run, run_workflow, value
from tests.integration.conftest import Define, make_slug

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

GUARD: LiteralString = """
CREATE TABLE public.refused (run_id uuid);
CREATE FUNCTION public.raise_for_refused() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM public.refused r
               WHERE r.run_id::text IN (to_jsonb(NEW) ->> 'id', to_jsonb(NEW) ->> 'run_id')) THEN
        RAISE EXCEPTION 'the books are closed';
    END IF;
    RETURN NEW;
END $$;
CREATE FUNCTION public.skip_refused() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM public.refused r
               WHERE r.run_id::text IN (to_jsonb(NEW) ->> 'id', to_jsonb(NEW) ->> 'run_id')) THEN
        RETURN NULL;
    END IF;
    RETURN NEW;
END $$;
"""

OF_STEPS: LiteralString = "CREATE TRIGGER guard BEFORE UPDATE ON pgflow.step_states FOR EACH ROW "
OF_RUNS: LiteralString = "CREATE TRIGGER guard BEFORE UPDATE ON pgflow.runs FOR EACH ROW "
AT_COMMIT: LiteralString = (
    "CREATE CONSTRAINT TRIGGER guard AFTER UPDATE ON pgflow.runs DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
)
RAISE: LiteralString = "EXECUTE FUNCTION public.raise_for_refused()"
SKIP: LiteralString = "EXECUTE FUNCTION public.skip_refused()"
CLAIMED: LiteralString = "WHEN (new.attempts > old.attempts) "
ENDED: LiteralString = "WHEN (new.status <> old.status) "

TRIGGERS: dict[str, tuple[LiteralString, int]] = {
    "claim of a step, raising": (OF_STEPS + CLAIMED + RAISE, 0),
    "claim of a step, skipping": (OF_STEPS + CLAIMED + SKIP, 0),
    "end of a step, raising": (OF_STEPS + ENDED + RAISE, 1),
    "end of a step, skipping": (OF_STEPS + ENDED + SKIP, 1),
    "end of a run, raising": (OF_RUNS + ENDED + RAISE, 1),
    "end of a run, skipping": (OF_RUNS + ENDED + SKIP, 1),
    "end of a run, at the commit": (AT_COMMIT + ENDED + RAISE, 1),
}
"""What a trigger refuses, and how often the handler is executed before that is known."""

Work = Callable[[UUID], Awaitable[object]]


@pytest.fixture
def executions() -> list[UUID]:
    """The runs whose handler was executed."""
    return []


def make_plain(workflow: Workflow, executions: list[UUID]) -> None:
    @workflow.step(retries=3)
    async def work(context: AsyncStepContext) -> str:
        executions.append(context.run_id)
        return "done"


def make_failing(workflow: Workflow, executions: list[UUID]) -> None:
    @workflow.step
    async def work(context: AsyncStepContext) -> str:
        executions.append(context.run_id)
        raise ValueError("no stock")


def make_connected(workflow: Workflow, executions: list[UUID]) -> None:
    @workflow.step(retries=3)
    async def work(context: AsyncStepContext) -> str:
        executions.append(context.run_id)
        await (await context.connection).execute("SELECT 1")
        return "done"


def make_sync(workflow: Workflow, executions: list[UUID]) -> None:
    @workflow.step(retries=3)
    def work(context: StepContext) -> str:
        executions.append(context.run_id)
        return "done"


def make_map(workflow: Workflow, executions: list[UUID]) -> None:
    @workflow.map(over="payload", retries=3)
    def work(item: int, context: ItemContext) -> int:
        executions.append(context.run_id)
        return item


def add(db: Connection, trigger: LiteralString, run_id: UUID) -> None:
    db.execute(GUARD)
    db.execute("INSERT INTO public.refused VALUES (%s)", [run_id])
    db.execute(trigger)


def let_try(db: Connection) -> None:
    db.execute("UPDATE pgflow_prefect.set_aside_runs SET next_try = clock_timestamp()")


async def take(store: Store, workflow: Workflow) -> list[UUID]:
    return [each.run_id for each in await store.take_runs([workflow.slug], 10)]


async def execute(workflow: Workflow, run_id: UUID) -> Any:
    return await workflow.flow(run_id=run_id, return_state=True)


async def check_that_it_is_set_aside(store: Store, db: Connection, workflow: Workflow, bad: UUID, reason: str) -> None:
    """Check that services leave the run alone, know why, and take others."""
    run = await store.read_run(bad)
    assert run.status == "pending"
    assert reason in str(run.set_aside)
    assert run.next_try is not None
    assert run.recoveries == 0, "no owner has vanished"
    [found] = await DiagnosisStatements(store._pool, store.lease_terms).list_set_aside(10)
    assert found.run_id == bad
    epoch = get_run(db, bad).epoch
    payload = value(db, "SELECT payload FROM pgflow.runs WHERE id = %s", bad)
    for tries in (2, 3):
        let_try(db)
        good = run_workflow(db, workflow.slug, payload).id
        assert await take(store, workflow) == [good]
        assert value(db, "SELECT tries FROM pgflow_prefect.set_aside_runs") == tries
        assert "the books are closed" in str((await store.read_run(bad)).set_aside) or "skipped" in reason
    assert get_run(db, bad).epoch == epoch, "it was not taken"


@pytest.mark.parametrize("trigger", TRIGGERS)
async def test_a_run_whose_step_can_not_be_noted_is_set_aside_until_that_is_mended(
    trigger: str, store: Store, db: Connection, define: Define, executions: list[UUID]
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["work"])
    make_plain(workflow, executions)
    await store.enable_workflow(workflow.slug)
    bad = run_workflow(db, workflow.slug).id
    statement, executed = TRIGGERS[trigger]
    add(db, statement, bad)

    ended = await execute(workflow, bad)
    assert ended.name == "Crashed"
    assert f"run {bad} is set aside: PostgreSQL refuses to note step 'work'" in str(ended.message)
    assert executions == [bad] * executed
    reason = "skipped" if trigger.endswith("skipping") else "the books are closed"
    await check_that_it_is_set_aside(store, db, workflow, bad, reason)

    db.execute("DELETE FROM public.refused")
    let_try(db)
    assert await take(store, workflow) == [bad]
    assert (await execute(workflow, bad)).name == "Completed"
    assert executions == [bad] * (executed + 1)


async def test_a_trigger_that_refuses_only_the_result_of_the_rehearsal_keeps_no_run_aside_for_ever(
    store: Store, db: Connection, define: Define, executions: list[UUID]
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["work"])
    make_plain(workflow, executions)
    await store.enable_workflow(workflow.slug)
    run_id = run_workflow(db, workflow.slug).id
    add(db, OF_RUNS + ENDED + RAISE, run_id)
    assert (await execute(workflow, run_id)).name == "Crashed"
    db.execute("DELETE FROM public.refused")
    db.execute("""
        CREATE FUNCTION public.refuse_null() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN IF NEW.step_result = 'null' THEN RAISE 'it has no result'; END IF; RETURN NEW; END $$;
        CREATE TRIGGER refuse_null BEFORE UPDATE ON pgflow.step_states
        FOR EACH ROW EXECUTE FUNCTION public.refuse_null()
    """)
    taken = []
    for _ in range(4):
        let_try(db)
        taken += await take(store, workflow)
    assert taken == [run_id]
    assert (await execute(workflow, run_id)).name == "Completed"


@pytest.mark.parametrize(
    ("make", "trigger"),
    [
        (make_map, "end of a run, raising"),
        (make_map, "claim of a step, raising"),
        (make_connected, "end of a run, raising"),
        (make_failing, "end of a step, raising"),
    ],
)
async def test_every_kind_of_step_sets_its_run_aside(
    make: Callable[[Workflow, list[UUID]], None],
    trigger: str,
    store: Store,
    db: Connection,
    define: Define,
    executions: list[UUID],
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["work"])
    if make is make_map:
        db.execute("UPDATE pgflow.steps SET step_type = 'map'")
    make(workflow, executions)
    await store.enable_workflow(workflow.slug)
    bad = run_workflow(db, workflow.slug, [1, 2, 3] if make is make_map else {}).id
    statement, executed = TRIGGERS[trigger]
    add(db, statement, bad)
    assert (await execute(workflow, bad)).name == "Crashed"
    assert len(executions) == executed * (3 if make is make_map else 1)
    await check_that_it_is_set_aside(store, db, workflow, bad, "the books are closed")


async def test_a_step_on_a_task_runner_sets_its_run_aside(
    store: Store, db: Connection, define: Define, executions: list[UUID]
) -> None:
    workflow = Workflow(make_slug(), task_runner=ThreadPoolTaskRunner(max_workers=2))
    define(workflow.slug, ["work"])
    make_sync(workflow, executions)
    await store.enable_workflow(workflow.slug)
    bad = run_workflow(db, workflow.slug).id
    add(db, OF_RUNS + ENDED + RAISE, bad)
    assert (await execute(workflow, bad)).name == "Crashed"
    assert executions == [bad]
    await check_that_it_is_set_aside(store, db, workflow, bad, "the books are closed")
