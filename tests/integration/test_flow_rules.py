"""Steps that branch, skip and follow a failure: written in Python, decided by PostgreSQL, shown by Prefect."""

from collections.abc import Collection
from contextvars import ContextVar
from typing import Any
from uuid import UUID

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowFilter

from pgflow_prefect import AsyncStepContext, Branch, External, FailedStep, Skip, SqlFunction, StepContext, Workflow
from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import ResultInvalidError, RunFailedError
from pgflow_prefect.execution.step_writer import StepWriter
from pgflow_prefect.execution.steps.step_work import StepWork
from pgflow_prefect.models import Claim, ClaimRequest, StepState
from tests.conftest import Connection
from tests.integration.conftest import (
    TENURE,
    await_task_runs,
    make_slug,
    read_flow_run,
    read_run,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]


async def push(dsn: str, workflow: Workflow) -> None:
    """Write the workflow into the database as its file defines it."""
    async with open_pool(dsn, size=1, timeout=10) as pool:
        await Store(pool, TENURE).replace_definition(None, workflow.definition)


def read_ends(db: Connection) -> dict[str, tuple[object, object]]:
    """Return status and skip_reason of each step that has a row."""
    found = db.execute("SELECT step_slug, status, skip_reason FROM pgflow.step_states").fetchall()
    return {str(slug): (status, reason) for slug, status, reason in found}


@pytest.fixture
def workflow(pgflow_dsn: str) -> Workflow:
    return Workflow(make_slug())


async def test_a_branch_skips_the_others_and_the_join_runs_with_defaults(
    db: Connection, pgflow_dsn: str, workflow: Workflow, client: PrefectClient
) -> None:
    @workflow.step
    def look(payload: dict[str, Any]) -> Branch[dict[str, int]]:
        return Branch(payload["take"], result={"rows": 3})

    @workflow.step
    async def full(look: dict[str, int]) -> int:
        return look["rows"]

    @workflow.step
    async def delta(look: dict[str, int]) -> int:
        return -look["rows"]

    @workflow.step(rule="none_failed_min_one_success")
    async def publish(full: int | None = None, delta: int | None = None) -> list[int | None]:
        return [full, delta]

    await push(pgflow_dsn, workflow)
    assert await workflow.flow(payload={"take": "full"}) == {"publish": [3, None]}
    assert read_ends(db)["delta"] == ("completed", "branch_not_taken")
    flow_run = await read_flow_run(client, workflow.slug)
    shown = await await_task_runs(
        client,
        flow_run,
        {"look": "Completed", "full": "Completed", "delta": "Skipped", "publish": "Completed"},
    )
    delta_run = shown["delta"]
    assert delta_run.state is not None
    assert delta_run.state.message == 'branch not taken by "look"'
    assert delta_run.start_time is None  # it was never running


async def test_a_handler_skips_its_step_and_what_is_below_it_in_a_workflow_without_rules(
    db: Connection, pgflow_dsn: str, workflow: Workflow, client: PrefectClient
) -> None:
    @workflow.step
    async def look() -> int:
        raise Skip("nothing new")

    @workflow.step
    async def load(look: int) -> int:
        return look

    @workflow.step
    async def audit() -> str:
        return "done"

    await push(pgflow_dsn, workflow)
    assert await workflow.flow() == {"audit": "done"}
    assert read_ends(db) == {
        "look": ("completed", "requested"),
        "load": ("completed", "dependency_skipped"),
        "audit": ("completed", None),
    }
    flow_run = await read_flow_run(client, workflow.slug)
    assert flow_run.state_name == "Completed"
    shown = await await_task_runs(client, flow_run, {"look": "Skipped", "load": "Skipped", "audit": "Completed"})
    assert shown["look"].state is not None
    assert shown["look"].state.message == "nothing new"


async def test_a_soft_skip_lets_what_is_below_go_on(db: Connection, pgflow_dsn: str, workflow: Workflow) -> None:
    @workflow.step
    def look(context: StepContext) -> int:
        context.connection.execute("CREATE TABLE seen AS SELECT 1 AS n")
        raise Skip(cascade=False)

    @workflow.step
    async def load(look: int = 7) -> int:
        return look

    await push(pgflow_dsn, workflow)
    assert await workflow.flow() == {"load": 7}
    assert read_ends(db)["look"] == ("completed", "requested")
    assert db.execute("SELECT n FROM seen").fetchall() == [(1,)]  # what it wrote stays


async def test_an_argument_without_default_fails_the_step_that_lacks_it(pgflow_dsn: str, workflow: Workflow) -> None:
    @workflow.step
    async def look() -> int:
        raise Skip(cascade=False)

    @workflow.step
    async def load(look: int) -> int:
        return look

    await push(pgflow_dsn, workflow)
    with pytest.raises(Exception, match="give that argument a default"):
        await workflow.flow()


async def test_a_condition_on_the_input_skips_a_step(db: Connection, pgflow_dsn: str, workflow: Workflow) -> None:
    @workflow.step
    async def look(payload: dict[str, int]) -> dict[str, int]:
        return payload

    @workflow.step(only_if={"look": {"rows": 0}}, when_unmet="skip-cascade")
    async def warn(look: dict[str, int]) -> str:
        return "no rows"

    @workflow.step(unless={"look": {"rows": 0}})
    async def load(look: dict[str, int]) -> int:
        return look["rows"]

    await push(pgflow_dsn, workflow)
    assert await workflow.flow(payload={"rows": 3}) == {"load": 3}
    assert read_ends(db)["warn"] == ("completed", "condition_unmet")


async def test_what_follows_a_failure_runs_and_the_rest_is_not_run(
    db: Connection, pgflow_dsn: str, workflow: Workflow, client: PrefectClient
) -> None:
    told: list[str] = []

    @workflow.step
    async def load() -> int:
        raise ValueError("no file")

    @workflow.step
    async def publish(load: int) -> int:
        return load

    @workflow.step(rule="one_failed", after=["load", "publish"], fails_run=False)
    async def notify(context: AsyncStepContext) -> None:
        [failed] = context.failed_steps
        told.append(f"{failed.slug}: {failed.message}")

    @workflow.step(rule="all_done", after=["publish"], fails_run=False)
    async def clean_up() -> None:
        told.append("cleaned")

    await push(pgflow_dsn, workflow)
    with pytest.raises(Exception, match="no file"):
        await workflow.flow()
    assert sorted(told) == ["cleaned", "load: ValueError: no file"]
    assert read_run(db)[0] == "failed"
    assert read_ends(db)["publish"] == ("failed", "dependency_failed")
    flow_run = await read_flow_run(client, workflow.slug)
    assert flow_run.state_name == "Failed"
    shown = await await_task_runs(
        client,
        flow_run,
        {"load": "Failed", "publish": "NotReady", "notify": "Completed", "clean_up": "Completed"},
    )
    assert shown["publish"].state is not None
    assert shown["publish"].state.message == "a step that it waits for has failed"


async def test_a_step_after_a_failure_reads_the_failed_steps_only(
    db: Connection, pgflow_dsn: str, workflow: Workflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Collection[str]] = []
    told: list[str] = []
    is_for_a_handler: ContextVar[bool] = ContextVar("is_for_a_handler", default=False)
    find_failed, list_step_ends = StepWork.find_failed, Store.list_step_ends

    async def find(step: StepWork) -> tuple[FailedStep, ...]:
        token = is_for_a_handler.set(True)
        try:
            return await find_failed(step)
        finally:
            is_for_a_handler.reset(token)

    async def note(store: Store, run_id: UUID, step_slugs: Collection[str]) -> list[StepState]:
        if is_for_a_handler.get():
            asked.append(step_slugs)
        return await list_step_ends(store, run_id, step_slugs)

    monkeypatch.setattr(StepWork, "find_failed", find)
    monkeypatch.setattr(Store, "list_step_ends", note)

    @workflow.step
    async def first() -> None:
        raise ValueError("no file")

    @workflow.step
    async def second() -> None:
        raise ValueError("no space")

    @workflow.step(rule="all_done", after=["first", "second"], fails_run=False)
    async def clean_up(context: AsyncStepContext) -> None:
        told.extend(sorted(f"{each.slug}: {each.message}" for each in context.failed_steps))

    await push(pgflow_dsn, workflow)
    with pytest.raises(RunFailedError):
        await workflow.flow()
    assert told == ["first: ValueError: no file", "second: ValueError: no space"]
    assert asked == []


async def test_a_step_that_has_failed_for_good_is_skipped_where_it_may_be(
    db: Connection, pgflow_dsn: str, workflow: Workflow, client: PrefectClient
) -> None:
    tries: list[int] = []

    @workflow.step(retries=1, when_exhausted="skip")
    async def enrich() -> int:
        tries.append(1)
        raise ValueError("the service is down")

    @workflow.step
    async def store(enrich: int | None = None) -> int | None:
        return enrich

    await push(pgflow_dsn, workflow)
    assert await workflow.flow() == {"store": None}
    assert len(tries) == 2
    assert read_ends(db)["enrich"] == ("completed", "handler_failed")
    flow_run = await read_flow_run(client, workflow.slug)
    shown = await await_task_runs(client, flow_run, {"enrich": "Skipped", "store": "Completed"})
    assert shown["enrich"].state is not None
    assert "the service is down" in str(shown["enrich"].state.message)


async def test_a_step_that_another_program_fails_before_its_claim_does_not_stop_a_run_that_goes_on(
    db: Connection, pgflow_dsn: str, workflow: Workflow, client: PrefectClient
) -> None:
    async def fail_from_outside(*_: object) -> bool:
        db.execute("SELECT pgflow.fail_step(run_id, 'load', 'given up') FROM pgflow.step_states")
        return True

    @workflow.step(retries=1, retry_condition_fn=fail_from_outside)
    async def load() -> int:
        raise ValueError("no file")

    @workflow.step(rule="all_done", after=["load"], fails_run=False)
    async def clean_up() -> None:
        pass

    await push(pgflow_dsn, workflow)
    with pytest.raises(Exception, match="given up"):
        await workflow.flow()
    assert read_run(db)[0] == "failed"
    assert read_ends(db) == {"load": ("failed", None), "clean_up": ("completed", None)}
    flow_run = await read_flow_run(client, workflow.slug)
    await await_task_runs(client, flow_run, {"load": "Failed", "clean_up": "Completed"})


async def test_a_step_whose_input_can_not_be_read_is_skipped_where_it_may_be(
    db: Connection, pgflow_dsn: str, workflow: Workflow, client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = StepWriter.claim

    async def claim_unless_planted(self: StepWriter, request: ClaimRequest) -> Claim:
        if request.task.step_slug == "enrich":
            raise ResultInvalidError("planted")
        return await claim(self, request)

    monkeypatch.setattr(StepWriter, "claim", claim_unless_planted)

    @workflow.step(when_exhausted="skip")
    async def enrich() -> int:
        return 1

    @workflow.step
    async def store(enrich: int | None = None) -> int | None:
        return enrich

    await push(pgflow_dsn, workflow)
    assert await workflow.flow() == {"store": None}
    assert read_ends(db)["enrich"] == ("completed", "handler_failed")
    flow_run = await read_flow_run(client, workflow.slug)
    await await_task_runs(client, flow_run, {"enrich": "Skipped", "store": "Completed"})


async def test_sql_functions_skip_and_branch_and_what_they_wrote_stays(
    db: Connection, pgflow_dsn: str, workflow: Workflow
) -> None:
    db.execute("""
        CREATE SCHEMA shop;
        CREATE TABLE shop.seen (step text);
        CREATE FUNCTION shop.look(input jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pgflow_prefect.branch(ARRAY['full']);
            RETURN '7';
        END $$;
        CREATE FUNCTION shop.full(input jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO shop.seen VALUES ('full');
            PERFORM pgflow_prefect.skip('closed', false);
            RETURN NULL;
        END $$;
        CREATE FUNCTION shop.count(input jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT input $$;
    """)
    workflow.bind("look", SqlFunction("shop.look"))
    workflow.bind("full", SqlFunction("shop.full"), after=["look"])
    workflow.bind("delta", SqlFunction("shop.full"), after=["look"])
    workflow.bind("total", SqlFunction("shop.count"), after=["full", "delta"], rule="none_failed")
    await push(pgflow_dsn, workflow)
    assert await workflow.flow(payload=1) == {"total": {"payload": 1}}
    assert db.execute("SELECT step FROM shop.seen").fetchall() == [("full",)]
    assert read_ends(db) == {
        "look": ("completed", None),
        "full": ("completed", "requested"),
        "delta": ("completed", "branch_not_taken"),
        "total": ("completed", None),
    }


async def test_a_branch_that_waits_for_no_such_step_fails_the_step_with_its_name(
    pgflow_dsn: str, workflow: Workflow
) -> None:
    @workflow.step
    async def look() -> Branch[int]:
        return Branch("fulll", result=1)

    @workflow.step
    async def full(look: int) -> int:
        return look

    await push(pgflow_dsn, workflow)
    with pytest.raises(Exception, match='take the branch "fulll"'):
        await workflow.flow()


async def test_a_step_that_a_person_skips_while_it_works_is_shown_as_skipped(
    db: Connection, pgflow_dsn: str, workflow: Workflow, client: PrefectClient
) -> None:
    @workflow.step
    async def look() -> int:
        db.execute("SELECT pgflow.skip_step(run_id, 'look', 'by hand') FROM pgflow.step_states")
        return 1

    @workflow.step
    async def load(look: int) -> int:
        return look

    await push(pgflow_dsn, workflow)
    assert await workflow.flow() == {}
    flow_run = await read_flow_run(client, workflow.slug)
    await await_task_runs(client, flow_run, {"look": "Skipped", "load": "Skipped"})


@pytest.mark.thorough
async def test_a_run_that_is_taken_again_shows_what_was_decided_before(
    db: Connection, pgflow_dsn: str, workflow: Workflow, client: PrefectClient
) -> None:
    @workflow.step
    async def look() -> Branch[int]:
        return Branch("full", result=1)

    @workflow.step
    async def full(look: int) -> int:
        if not broken:
            return 1
        broken.clear()
        raise ValueError("once")

    @workflow.step
    async def delta(look: int) -> int:
        return 2

    @workflow.step(rule="all_done", after=["full"])
    async def clean_up() -> str:
        return "clean"

    broken = [True]
    await push(pgflow_dsn, workflow)
    with pytest.raises(Exception, match="once"):
        await workflow.flow()
    run_id = read_run(db)[2]
    db.execute("SELECT pgflow.reopen_run(%s)", [run_id])
    assert await workflow.flow(run_id=run_id) == {"clean_up": "clean"}
    flow_runs = await client.read_flow_runs(flow_filter=FlowFilter(name={"any_": [workflow.slug]}))
    [latest] = [each for each in flow_runs if each.state_name == "Completed"]
    states = {"look": "Cached", "full": "Completed", "delta": "Skipped", "clean_up": "Completed"}
    await await_task_runs(client, latest, states)


async def test_an_external_step_that_is_skipped_ends_the_wait_for_it(
    db: Connection, pgflow_dsn: str, workflow: Workflow, client: PrefectClient
) -> None:
    workflow.bind("look", External())

    @workflow.step
    async def load(look: int = 5) -> int:
        return look

    async def skip_when_it_waits() -> None:
        waits = "SELECT count(*) FROM pgflow_prefect.task_runs WHERE state_name = 'Waiting'"
        while db.execute(waits).fetchone() != (1,):
            await anyio.sleep(0.02)
        db.execute("SELECT pgflow.skip_step(run_id, 'look', 'not today', false) FROM pgflow.step_states")

    await push(pgflow_dsn, workflow)
    with anyio.fail_after(180):
        async with anyio.create_task_group() as group:
            group.start_soon(skip_when_it_waits)
            assert await workflow.flow() == {"load": 5}
    flow_run = await read_flow_run(client, workflow.slug)
    shown = await await_task_runs(client, flow_run, {"look": "Skipped", "load": "Completed"})
    assert shown["look"].state is not None
    assert shown["look"].state.message == "not today"
