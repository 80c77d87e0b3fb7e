"""Who does a step: rows win over Python, count from the next claim, and are recorded and taken back."""

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, LiteralString

import anyio
import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from pgflow_prefect import StepContext, Workflow
from pgflow_prefect.bindings import External, Kind, SqlFunction
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import PgflowPrefectError
from tests.conftest import Connection
from tests.engine import UNKNOWN, claim, column, complete, define, finish, get_run, refused, run_workflow, value
from tests.integration.conftest import Define, make_slug, read_run, read_steps
from tests.integration.waiting import WAITING, await_value, going

pytestmark = [pytest.mark.anyio]

flows = pytest.mark.usefixtures("pgflow_dsn", "prefect_api")

Bind = Callable[..., object]

CHANGES: LiteralString = "SELECT count(*) FROM pgflow_prefect.binding_changes"
VIOLATION = "23514"


@pytest.fixture
def bind(db: Connection) -> Bind:
    """`bind_step`, on this test's connection."""

    def call(workflow: str, step: str, kind: str | None, target: str | None = None, **options: object) -> object:
        statement: LiteralString = "SELECT pgflow_prefect.bind_step(%s, %s, %s, %s, %s)"
        return value(db, statement, workflow, step, kind, target, Jsonb(options))

    return call


def undo(db: Connection, step: str) -> object:
    return value(db, "SELECT pgflow_prefect.undo_binding('chain', %s)", step)


def read_bindings(db: Connection) -> dict[str, tuple[Any, ...]]:
    rows: Any = db.execute("SELECT step_slug, kind, target, options FROM pgflow_prefect.bindings")
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def chain(db: Connection) -> str:
    define(db, "chain", {"a": [], "b": ["a"]})
    return "chain"


# Rows


def test_the_same_binding_twice_changes_and_records_nothing(chain: str, db: Connection, bind: Bind) -> None:
    assert bind(chain, "a", "sql", "app.f", retries=2) is True
    assert bind(chain, "a", "sql", "app.f", retries=2) is False
    assert bind(chain, "b", None) is False, "there was no row"
    assert read_bindings(db) == {"a": ("sql", "app.f", {"retries": 2})}
    assert value(db, CHANGES) == 1


def test_rows_allow_every_kind_and_no_other(db: Connection) -> None:
    check = str(value(db, "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'bindings_kind'"))

    assert {*re.findall(r"'([\w-]+)'", check)} == {*Kind} - {Kind.CHILD}  # only a definition says that one


def test_every_change_is_recorded_with_time_and_user(chain: str, db: Connection, bind: Bind) -> None:
    before = value(db, "SELECT clock_timestamp()")
    bind(chain, "a", "external")
    bind(chain, "a", "sql", "app.f")
    bind(chain, "a", None)
    changes: Any = db.execute(
        "SELECT before ->> 'kind', after ->> 'kind', after ->> 'target', changed_at, changed_by, undone_at "
        "FROM pgflow_prefect.binding_changes ORDER BY id"
    ).fetchall()
    assert [each[:3] for each in changes] == [
        (None, "external", None),
        ("external", "sql", "app.f"),
        ("sql", None, None),
    ]
    user = value(db, "SELECT session_user")
    for *_, changed_at, changed_by, undone_at in changes:
        assert isinstance(changed_at, datetime)
        assert isinstance(before, datetime)
        assert changed_at >= before
        assert (changed_by, undone_at) == (user, None)
    assert column(db, "SELECT id FROM pgflow_prefect.binding_changes WHERE before = 'null' OR after = 'null'") == []


def test_changes_are_undone_one_after_the_other(chain: str, db: Connection, bind: Bind) -> None:
    bind(chain, "a", "external", timeout_seconds=5)
    bind(chain, "a", "sql", "app.f")
    bind(chain, "b", "external")
    bind(chain, "a", None)
    seen = []
    while undo(db, "a"):
        seen.append(read_bindings(db).get("a"))
    assert seen == [("sql", "app.f", {}), ("external", None, {"timeout_seconds": 5}), None]
    assert read_bindings(db) == {"b": ("external", None, {})}
    assert value(db, CHANGES) == 4, "taking back is no change of its own"
    assert value(db, CHANGES + " WHERE undone_by = session_user AND undone_at IS NOT NULL") == 3
    assert undo(db, "a") is False


def test_after_taking_back_the_next_change_counts_from_there(chain: str, db: Connection, bind: Bind) -> None:
    bind(chain, "a", "external")
    bind(chain, "a", "python")
    undo(db, "a")
    assert bind(chain, "a", "sql", "app.f") is True
    assert undo(db, "a") is True
    assert read_bindings(db) == {"a": ("external", None, {})}


def test_null_takes_the_row_away(chain: str, db: Connection, bind: Bind) -> None:
    bind(chain, "a", "external")
    assert bind(chain, "a", None) is True
    assert read_bindings(db) == {}


@pytest.mark.parametrize("kind", ["http", "queue"])
@pytest.mark.parametrize(
    "target",
    [
        "https://user:hunter2@example.org/f",
        "https://hunter2@example.org",
        "amqp://u:hunter2@localhost/?queue=q",
        "https://example.org/f?api_key=hunter2",
        "https://example.org/f?a=1&X-Amz-Signature=hunter2",
        "https://example.org/f?TOKEN=hunter2",
    ],
)
def test_a_secret_in_a_url_is_refused_by_sql_itself(chain: str, db: Connection, kind: str, target: str) -> None:
    with refused(VIOLATION):
        db.execute("SELECT pgflow_prefect.bind_step('chain', 'a', %s, %s)", [kind, target])
    assert (read_bindings(db), value(db, CHANGES)) == ({}, 0)


@pytest.mark.parametrize("name", ["token", "password", "secret", "login", "key"])
def test_a_secret_among_the_options_is_refused_by_sql_itself(chain: str, bind: Bind, name: str) -> None:
    with refused(VIOLATION):
        bind(chain, "a", "http", "https://example.org", **{name: "hunter2"})


def test_an_at_sign_or_the_name_of_a_variable_is_no_secret(chain: str, bind: Bind) -> None:
    assert bind(chain, "a", "http", "https://example.org/@me?monkey_business=1", token_env="TOKEN") is True  # noqa: S106


async def test_a_refused_secret_is_not_in_the_message(chain: str, store: Store) -> None:
    with pytest.raises(PgflowPrefectError) as caught:
        await store.bind_step(chain, "a", "http", "https://user:hunter2@example.org")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "target"), [("fax", None), ("external", "app.f"), ("python", "app.f"), ("sql", None), ("http", None)]
)
def test_a_row_that_makes_no_sense_is_refused(chain: str, bind: Bind, kind: str, target: str | None) -> None:
    with refused(VIOLATION):
        bind(chain, "a", kind, target)


def test_unknown_steps_and_workflows_are_refused(chain: str, db: Connection, bind: Bind) -> None:
    with refused(UNKNOWN, 'workflow "chain" has no step "z"'):
        bind(chain, "z", "external")
    with refused(UNKNOWN):
        bind("nowhere", "a", "external")
    with refused(UNKNOWN, 'unknown workflow "nowhere"'):
        db.execute("SELECT pgflow_prefect.observe_workflow('nowhere')")
    assert undo(db, "z") is False


def test_observing_makes_every_step_external_and_is_taken_back_step_by_step(
    chain: str, db: Connection, bind: Bind
) -> None:
    bind(chain, "a", "sql", "app.f")
    assert value(db, "SELECT pgflow_prefect.observe_workflow('chain')") == 2
    assert value(db, "SELECT pgflow_prefect.observe_workflow('chain')") == 0
    assert read_bindings(db) == dict.fromkeys("ab", ("external", None, {}))
    assert (undo(db, "a"), undo(db, "b")) == (True, True)
    assert read_bindings(db) == {"a": ("sql", "app.f", {})}


def test_a_cleanup_script_need_not_know_of_bindings(chain: str, db: Connection, bind: Bind) -> None:
    bind(chain, "a", "external")
    bind(chain, "b", "external")
    run_id = run_workflow(db, chain).id
    db.execute("SELECT * FROM pgflow_prefect.claim_external_step(%s, 'a')", [run_id])
    db.execute("SELECT pgflow_prefect.report_shadow(%s, 'a', 'same', '{}', 1)", [run_id])
    finish(db, run_id)
    for table in ("step_states", "runs", "deps", "steps", "workflows"):
        db.execute(sql.SQL("DELETE FROM pgflow.{}").format(sql.Identifier(table)))
    for table in ("bindings", "binding_changes", "external_claims", "shadow_reports", "task_runs"):
        count = sql.SQL("SELECT count(*) FROM pgflow_prefect.{}").format(sql.Identifier(table))
        assert db.execute(count).fetchone() == (0,), table


def test_a_step_that_is_deleted_takes_its_row_along(chain: str, db: Connection, bind: Bind) -> None:
    bind(chain, "b", "external")
    db.execute("DELETE FROM pgflow.deps")
    db.execute("DELETE FROM pgflow.steps WHERE slug = 'b'")
    assert read_bindings(db) == {}
    with refused(UNKNOWN):
        undo(db, "b")
    db.execute("UPDATE pgflow.steps SET slug = 'a2' WHERE slug = 'a'")
    assert bind(chain, "a2", "external") is True


def test_two_changes_of_a_binding_at_once_are_both_recorded(chain: str, db: Connection, dsn: str) -> None:
    call: LiteralString = "SELECT pgflow_prefect.bind_step('chain', 'a', %s)"
    with psycopg.connect(dsn) as one, psycopg.connect(dsn, autocommit=True) as other:
        one.execute(call, ["external"])
        other.execute("SET lock_timeout = '50ms'")
        with refused("55P03"):
            other.execute(call, ["python"])
        one.commit()
        other.execute(call, ["python"])
    changes = db.execute("SELECT before ->> 'kind', after ->> 'kind' FROM pgflow_prefect.binding_changes ORDER BY id")
    assert changes.fetchall() == [(None, "external"), ("external", "python")]


async def test_the_store_lists_bindings_and_changes_the_latest_first(chain: str, store: Store) -> None:
    assert await store.bind_step(chain, "a", "sql", "app.f", {"retries": 1}) is True
    assert await store.bind_step(chain, "b", "external") is True
    assert await store.undo_binding(chain, "b") is True
    bindings = await store.list_bindings(chain)
    assert {slug: (row.kind, row.target, row.options) for slug, row in bindings.items()} == {
        "a": ("sql", "app.f", {"retries": 1})
    }
    latest, first = await store.list_binding_changes(chain)
    assert (latest.step_slug, latest.before, latest.undone_by) == ("b", None, latest.changed_by)
    assert first.after == {"kind": "sql", "target": "app.f", "options": {"retries": 1}}
    assert [each.step_slug for each in await store.list_binding_changes(chain, "a")] == ["a"]


async def test_bound_workflows_are_those_that_need_no_python(chain: str, store: Store, db: Connection) -> None:
    define(db, "unbound", {"a": []})
    await store.bind_step(chain, "a", "external")
    assert await store.list_bound_workflows() == []
    await store.bind_step(chain, "b", "python")
    assert await store.list_bound_workflows() == []
    await store.bind_step(chain, "b", "sql", "app.f")
    assert await store.list_bound_workflows() == [chain]


# In force from the next claim


@flows
async def test_a_row_wins_over_python(define: Define, db: Connection, bind: Bind) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["handled", "bound"])
    workflow.bind("bound", SqlFunction("app.missing"))

    @workflow.step
    def handled() -> None:
        raise AssertionError("a row says that an external worker does it")

    for step in ("handled", "bound"):
        bind(workflow.slug, step, "external")
    async with going(workflow, db) as run:
        await await_value(db, 2, WAITING)
        finish(db, run.run_id)
    assert run.ended.is_completed()
    assert {state[1] for state in read_steps(db).values()} == {0}


@flows
async def test_a_row_that_says_python_wins_over_bind(define: Define, db: Connection, bind: Bind) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    workflow.bind("only", External())

    @workflow.step
    def only(payload: int) -> int:
        return payload + 1

    bind(workflow.slug, "only", "python")
    async with going(workflow, db, 41) as run:
        pass
    assert await run.ended.result() == {"only": 42}


@flows
async def test_a_step_bound_to_python_waits_for_a_process_that_has_its_function(
    define: Define, db: Connection, bind: Bind
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    bind(workflow.slug, "only", "python")
    async with going(workflow, db) as run:
        await await_value(db, 1, WAITING)
        assert column(db, "SELECT attempt FROM pgflow_prefect.claim_external_step(%s, 'only')", run.run_id) == []
        complete(db, run.run_id, "only", 1)
    assert run.ended.is_completed()


@flows
@pytest.mark.parametrize("how", ["row says python", "row is gone", "taken back"])
async def test_a_step_that_waits_is_claimed_here_once_it_is_pythons(
    define: Define, db: Connection, bind: Bind, how: str
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["first", "only"], [("first", "only")])
    workflow.bind("first", External())

    @workflow.step
    def only(first: int, payload: int) -> int:
        return first + payload

    bind(workflow.slug, "only", "external")
    async with going(workflow, db, 2) as run:
        await await_value(db, 1, WAITING)
        complete(db, run.run_id, "first", 40)
        await await_value(
            db, "Waiting", "SELECT max(state_name) FROM pgflow_prefect.task_runs WHERE step_slug = 'only'"
        )
        if how == "taken back":
            value(db, "SELECT pgflow_prefect.undo_binding(%s, 'only')", workflow.slug)
        else:
            bind(workflow.slug, "only", "python" if how == "row says python" else None)
    assert await run.ended.result() == {"only": 42}
    assert read_steps(db)["only"][1] == 1
    assert db.execute(
        "SELECT state_name, handler FROM pgflow_prefect.task_runs WHERE step_slug = 'only'"
    ).fetchone() == (
        "Completed",
        "python",
    )


@flows
async def test_a_step_that_waits_is_done_by_a_function_once_it_is_bound_to_it(
    define: Define, db: Connection, bind: Bind
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    db.execute("CREATE FUNCTION public.double(input jsonb) RETURNS jsonb LANGUAGE sql "
               "AS $$ SELECT to_jsonb((input ->> 'payload')::int * 2) $$")  # fmt: skip
    async with going(workflow, db, 21) as run:
        await await_value(db, 1, WAITING)
        bind(workflow.slug, "only", "sql", "public.double")
    assert await run.ended.result() == {"only": 42}


@flows
async def test_between_two_attempts_a_step_goes_to_an_external_worker_and_back(
    define: Define, db: Connection, bind: Bind
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    attempts: list[int] = []

    @workflow.step(retries=2, retry_delay_seconds=0.2)
    def only(context: StepContext) -> str:
        attempts.append(context.attempt)
        if len(attempts) == 1:
            bind(workflow.slug, "only", "external")
            raise ValueError("not here")
        return "here after all"

    async with going(workflow, db) as run:
        await await_value(db, 1, WAITING)
        assert read_steps(db)["only"][:2] == ("pending", 1), "no attempt was counted for waiting"
        bind(workflow.slug, "only", "python")
    assert await run.ended.result() == {"only": "here after all"}
    assert attempts == [1, 2]


@flows
async def test_an_attempt_that_is_under_way_is_left_alone(define: Define, db: Connection, bind: Bind) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    began, goes_on = anyio.Event(), anyio.Event()

    @workflow.step
    async def only() -> str:
        began.set()
        await goes_on.wait()
        return "here"

    async with going(workflow, db) as run:
        await began.wait()
        bind(workflow.slug, "only", "external")
        assert column(db, "SELECT attempt FROM pgflow_prefect.claim_external_step(%s, 'only')", run.run_id) == []
        goes_on.set()
    assert await run.ended.result() == {"only": "here"}


@flows
async def test_retries_and_time_are_those_of_its_handler(define: Define, db: Connection, bind: Bind) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])

    @workflow.step(retries=5)
    def only() -> None:
        raise AssertionError("a row says that a function does it")

    db.execute("CREATE FUNCTION public.fails(jsonb) RETURNS jsonb LANGUAGE plpgsql "
               "AS $$ BEGIN RAISE EXCEPTION 'no such list'; END $$")  # fmt: skip
    bind(workflow.slug, "only", "sql", "public.fails", retries=1)
    async with going(workflow, db) as run:
        pass
    assert run.ended.is_failed()
    assert read_steps(db)["only"][1] == 2
    assert "no such list" in read_run(db)[1]


@flows
async def test_a_row_that_cant_be_read_fails_the_step_and_says_why(define: Define, db: Connection, bind: Bind) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    bind(workflow.slug, "only", "sql", "public.f", retreis=1)
    async with going(workflow, db) as run:
        pass
    assert run.ended.is_failed()
    assert "retreis: Unexpected keyword argument" in json.dumps(read_steps(db)["only"][3])


@flows
async def test_bindings_do_not_reach_a_run_of_another_workflow(define: Define, db: Connection, bind: Bind) -> None:
    workflow, other = Workflow(make_slug()), make_slug()
    define(workflow.slug, ["only"])
    define(other, ["only"])
    bind(other, "only", "external")

    @workflow.step
    def only() -> int:
        return 1

    async with going(workflow, db) as run:
        pass
    assert run.ended.is_completed()
    assert get_run(db, run.run_id).status == "completed"
    assert claim(db, run_workflow(db, other).id, "only").attempt == 1
