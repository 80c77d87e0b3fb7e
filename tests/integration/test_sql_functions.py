"""Steps that a function in the database does, in one transaction with their completion."""

from threading import Thread
from typing import Any, LiteralString

import anyio
import psycopg
import pytest
from prefect.client.orchestration import PrefectClient

from pgflow_prefect import Workflow
from pgflow_prefect.bindings import SqlFunction
from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.binding_problems import find_all_problems
from tests.conftest import Connect, Connection
from tests.engine import get_run, get_state, value
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_steps
from tests.integration.waiting import await_value, going

pytestmark = [pytest.mark.anyio]

flows = pytest.mark.usefixtures("pgflow_dsn", "prefect_api")

WRITTEN: LiteralString = "SELECT count(*) FROM written"
SLEEPING: LiteralString = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND state = 'active' AND wait_event = 'PgSleep'
"""
LOCKED = SLEEPING.replace("PgSleep", "advisory")


def make_function(db: Connection, body: str) -> None:
    """Create app.f(input jsonb) with this body in plpgsql, and a table to write to."""
    db.execute("CREATE SCHEMA IF NOT EXISTS app")
    db.execute("CREATE TABLE IF NOT EXISTS written (note text)")
    statement = (
        f"CREATE OR REPLACE FUNCTION app.f(input jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN {body} END $$"
    )
    db.execute(statement.encode())


def make_workflow(define: Define, *steps: str, **options: Any) -> Workflow:
    """Return a workflow of parallel steps that app.f does."""
    workflow = Workflow(make_slug())
    define(workflow.slug, steps)
    for step in steps:
        workflow.bind(step, SqlFunction("app.f", **options))
    return workflow


@flows
async def test_it_gets_payload_and_results_by_name_and_returns_the_result(
    define: Define, db: Connection, client: PrefectClient
) -> None:
    make_function(db, "RETURN input;")
    workflow = Workflow(make_slug())
    define(workflow.slug, ["payload", "some-step", "join"], [("payload", "join"), ("some-step", "join")])
    for step in ("payload", "some-step", "join"):
        workflow.bind(step, SqlFunction("app.f"))
    async with going(workflow, db, {"n": [1, "größe", None]}) as run:
        pass
    root = {"payload": {"n": [1, "größe", None]}}
    assert await run.ended.result() == {"join": root | {"payload_": root, "some-step": root}}
    await await_task_runs(
        client,
        await read_flow_run(client, workflow.slug),
        dict.fromkeys(["payload", "some-step", "join"], "Completed"),
    )
    assert value(db, "SELECT array_agg(DISTINCT handler) FROM pgflow_prefect.task_runs") == ["sql app.f"]


@flows
@pytest.mark.parametrize("returned", ["NULL", "'null'::jsonb"])
async def test_null_is_null(define: Define, db: Connection, returned: str) -> None:
    make_function(db, f"RETURN {returned};")
    workflow = make_workflow(define, "only")
    async with going(workflow, db) as run:
        pass
    assert await run.ended.result() == {"only": None}
    assert value(db, "SELECT step_result = 'null' FROM pgflow.step_states") is True


@flows
async def test_a_function_of_any_name_is_called(define: Define, db: Connection) -> None:
    db.execute('CREATE SCHEMA "My App"')
    db.execute('CREATE FUNCTION "My App"."Send ""Mail"""(jsonb, int DEFAULT 2) RETURNS jsonb LANGUAGE sql '
               "AS $$ SELECT to_jsonb($2) $$")  # fmt: skip
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    workflow.bind("only", SqlFunction('"My App"."Send ""Mail"""'))
    async with going(workflow, db) as run:
        pass
    assert await run.ended.result() == {"only": 2}


@flows
async def test_what_it_writes_is_there_exactly_when_the_step_is_completed(define: Define, db: Connection) -> None:
    make_function(db, "INSERT INTO written VALUES ('once'); RETURN '1';")
    async with going(make_workflow(define, "a", "b", "c"), db) as run:
        pass
    assert run.ended.is_completed()
    assert value(db, WRITTEN) == 3


@flows
@pytest.mark.parametrize("by", ["cancelled", "taken", "completed by another program"])
async def test_a_function_s_writes_are_rolled_back_if_its_completion_is_refused(
    define: Define, db: Connection, connect: Connect, by: str
) -> None:
    body = "INSERT INTO written VALUES ('never'); PERFORM pg_advisory_xact_lock(1); RETURN '1';"
    make_function(db, body)
    holder = connect()
    holder.execute("SELECT pg_advisory_lock(1)")
    change: LiteralString = {
        "cancelled": "SELECT pgflow.cancel_run(id, 'cancelled') FROM pgflow.runs",
        "taken": "SELECT pgflow.take_run(id) FROM pgflow.runs",
        "completed by another program": "SELECT pgflow.complete_step(id, 'only', '2') FROM pgflow.runs",
    }[by]
    async with going(make_workflow(define, "only"), db) as run:
        await await_value(db, 1, LOCKED)
        db.execute(change)
        holder.execute("SELECT pg_advisory_unlock(1)")
    states = {"cancelled": "Cancelled", "taken": "Superseded", "completed by another program": "Completed"}
    assert run.ended.name == states[by]
    assert value(db, WRITTEN) == 0
    assert get_state(db, run.run_id, "only").step_result == (2 if by.startswith("completed") else None)


@flows
async def test_a_time_out_cancels_the_statement_on_the_server(
    define: Define, db: Connection, client: PrefectClient
) -> None:
    db.execute("CREATE SEQUENCE begun")  # which counts on, whatever is rolled back
    body = "INSERT INTO written VALUES ('never'); PERFORM nextval('begun'), pg_sleep(300); RETURN '1';"
    make_function(db, body)
    workflow = make_workflow(define, "only", timeout_seconds=1)
    async with going(workflow, db) as run:
        pass
    await await_value(db, 0, SLEEPING)
    assert value(db, "SELECT is_called FROM begun"), "it had begun"
    assert run.ended.is_failed()
    assert read_steps(db)["only"][3] == "step 'only' took longer than 1 s"
    assert value(db, WRITTEN) == 0
    await await_task_runs(client, await read_flow_run(client, workflow.slug), {"only": "TimedOut"})


@flows
async def test_what_it_raises_is_the_message_and_nothing_is_written(define: Define, db: Connection) -> None:
    make_function(db, "INSERT INTO written VALUES ('never'); RAISE EXCEPTION 'no such list: %', input ->> 'payload';")
    async with going(make_workflow(define, "only"), db, 7) as run:
        pass
    assert run.ended.is_failed()
    status, attempts, _, message = read_steps(db)["only"]
    assert (status, attempts) == ("failed", 1)
    assert "no such list: 7" in message
    assert value(db, WRITTEN) == 0


@flows
async def test_retries_are_those_of_the_binding(define: Define, db: Connection) -> None:
    db.execute("CREATE SEQUENCE tries")
    make_function(db, "IF nextval('tries') < 3 THEN RAISE EXCEPTION 'not yet'; END IF; RETURN '1';")
    async with going(make_workflow(define, "only", retries=2), db) as run:
        pass
    assert run.ended.is_completed()
    assert read_steps(db)["only"][1] == 3


@flows
async def test_a_serialization_failure_is_no_failure_of_the_step(define: Define, db: Connection) -> None:
    db.execute("CREATE SEQUENCE tries")
    make_function(db, "INSERT INTO written VALUES ('once'); "
                      "IF nextval('tries') < 3 THEN RAISE SQLSTATE '40001'; END IF; RETURN '1';")  # fmt: skip
    async with going(make_workflow(define, "only"), db) as run:
        pass
    assert run.ended.is_completed()
    assert read_steps(db)["only"][:3] == ("completed", 3, 1)
    assert value(db, WRITTEN) == 1


@flows
async def test_a_result_beyond_the_limit_fails_the_step_and_writes_nothing(
    define: Define, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_RESULT_LIMIT", "100")
    make_function(db, "INSERT INTO written VALUES ('never'); RETURN to_jsonb(repeat('x', 101));")
    async with going(make_workflow(define, "only"), db) as run:
        pass
    assert run.ended.is_failed()
    assert "more than the limit of 100" in read_steps(db)["only"][3]
    assert value(db, WRITTEN) == 0


@flows
async def test_a_function_that_is_gone_fails_the_step_and_names_it(define: Define, db: Connection) -> None:
    workflow = make_workflow(define, "only")
    async with going(workflow, db) as run:
        pass
    assert run.ended.is_failed()
    assert "app" in str(get_run(db, run.run_id).error_message)


@flows
async def test_a_lock_that_it_waits_for_holds_up_nothing_else(define: Define, db: Connection, dsn: str) -> None:
    """Not even the other steps of its run: it has a connection of its own."""
    make_function(db, "IF input ->> 'payload' = 'waits' THEN LOCK TABLE written; END IF; RETURN '1';")
    workflow = Workflow(make_slug())
    define(workflow.slug, ["waits", "quick", "quicker"], [("quick", "quicker")])
    workflow.bind("waits", SqlFunction("app.f"))

    @workflow.step
    def quick() -> None: ...

    @workflow.step
    def quicker() -> None: ...

    with psycopg.connect(dsn) as holder:
        holder.execute("LOCK TABLE written")
        async with going(workflow, db, "waits") as run:
            await await_value(db, "completed", "SELECT max(status) FROM pgflow.step_states WHERE step_slug = 'quicker'")
            assert get_state(db, run.run_id, "waits").status == "pending"
            release = Thread(target=holder.rollback)
            release.start()
            await anyio.to_thread.run_sync(release.join)
    assert run.ended.is_completed()


@pytest.mark.parametrize(
    ("definition", "problem"),
    [
        ("", "is bound to app.f(jsonb), which the database does not have"),
        ("CREATE FUNCTION app.f() RETURNS jsonb", "which the database does not have"),
        ("CREATE FUNCTION app.f(text) RETURNS jsonb", "which the database does not have"),
        ("CREATE FUNCTION app.f(jsonb, int) RETURNS jsonb", "which the database does not have"),
        ("CREATE FUNCTION app.f(jsonb) RETURNS text", "which returns text and not jsonb"),
        ("CREATE FUNCTION app.f(jsonb) RETURNS json", "which returns json and not jsonb"),
        ("CREATE FUNCTION app.f(jsonb) RETURNS SETOF jsonb", "which returns jsonb rows and not jsonb"),
        ("CREATE FUNCTION app.f(jsonb) RETURNS void", "which returns void and not jsonb"),
        ("CREATE FUNCTION app.f(jsonb) RETURNS jsonb", None),
        ("CREATE FUNCTION app.f(jsonb, int DEFAULT 1) RETURNS jsonb", None),
    ],
)
async def test_a_function_that_does_not_fit_is_found_before_a_run(
    define: Define, db: Connection, store: Store, definition: str, problem: str | None
) -> None:
    db.execute("CREATE SCHEMA app")
    db.execute("SET check_function_bodies = off")
    if definition:
        db.execute(f"{definition} LANGUAGE plpgsql AS $$ BEGIN RETURN; END $$".encode())
    bound_here = make_workflow(define, "only")
    by_row = Workflow(make_slug())
    define(by_row.slug, ["only"])
    await store.bind_step(by_row.slug, "only", "sql", "app.f")
    for workflow in (bound_here, by_row):
        problems = await find_all_problems(
            store, workflow, await store.load_definition(workflow.slug), await store.list_bindings(workflow.slug)
        )
        if problem is None:
            assert problems == []
        else:
            [found] = problems
            assert found.startswith("step 'only' is bound to app.f(jsonb), ")
            assert problem in found
