"""What a row that binds a step to an SQL function may make a worker do, and who may write such rows."""

from typing import LiteralString

import pytest
from psycopg.conninfo import make_conninfo

from pgflow_prefect import Workflow
from pgflow_prefect.bindings import SqlFunction
from pgflow_prefect.database.diagnosis import open_diagnosis
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.engine import define, get_run, refused, value
from tests.integration.conftest import make_slug
from tests.integration.supabase import DENIED, become_owner, create_role, run_script
from tests.integration.waiting import going
from tests.security.conftest import Party, PartyDsn

BIND: LiteralString = "SELECT pgflow_prefect.bind_step('chain', 'a', 'sql', %s)"
DIRECT_WRITES: dict[str, LiteralString] = {
    "insert a binding": "INSERT INTO pgflow_prefect.bindings (workflow_slug, step_slug, kind) "
    "VALUES ('chain', 'b', 'external')",
    "update a binding": "UPDATE pgflow_prefect.bindings SET target = 'app.forbidden'",
    "delete a binding": "DELETE FROM pgflow_prefect.bindings",
    "insert history": "INSERT INTO pgflow_prefect.binding_changes (workflow_slug, step_slug) VALUES ('chain', 'a')",
    "rewrite history": "UPDATE pgflow_prefect.binding_changes SET changed_by = 'somebody else'",
    "mark as undone": "UPDATE pgflow_prefect.binding_changes SET undone_at = now()",
    "delete history": "DELETE FROM pgflow_prefect.binding_changes",
    "name another requester": "INSERT INTO pgflow_prefect.binding_requests "
    "(workflow_slug, step_slug, action, kind, target, requested_by) "
    "VALUES ('chain', 'a', 'bind', 'sql', 'app.forbidden', 'postgres')",
    "change a binding as the trigger does": "SELECT pgflow_prefect.change_binding('chain', 'a', NULL, 'postgres')",
}


def make_function(db: Connection, name: str, *, public: bool = True) -> None:
    """Create a function of the superuser's that every role, or no other role, may execute."""
    db.execute("CREATE SCHEMA IF NOT EXISTS app; GRANT USAGE ON SCHEMA app TO PUBLIC")
    db.execute(f"CREATE FUNCTION app.{name}(jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT $1'".encode())
    if not public:
        db.execute(f"REVOKE EXECUTE ON FUNCTION app.{name} FROM PUBLIC".encode())


@pytest.mark.parametrize("target", ["app.forbidden", '"app"."forbidden"', "App.Forbidden", " app . forbidden "])
def test_define_can_not_bind_a_function_that_it_may_not_execute(kit: Connection, party: Party, target: str) -> None:
    make_function(kit, "forbidden", public=False)
    with refused(DENIED, "pgflow_define can't bind a step to .*, which it may not execute"):
        party("define").execute(BIND, [target])
    assert value(kit, "SELECT count(*) FROM pgflow_prefect.bindings") == 0


def test_define_can_not_bind_a_function_of_a_schema_that_it_may_not_use(kit: Connection, party: Party) -> None:
    make_function(kit, "f")
    kit.execute("REVOKE USAGE ON SCHEMA app FROM PUBLIC")
    with refused(DENIED, "may not execute"):
        party("define").execute(BIND, ["app.f"])


def test_define_can_not_hide_a_forbidden_overload_behind_one_that_it_may_execute(kit: Connection, party: Party) -> None:
    make_function(kit, "f")
    kit.execute("CREATE FUNCTION app.f(jsonb, int DEFAULT 1) RETURNS jsonb LANGUAGE sql AS 'SELECT $1'")
    kit.execute("REVOKE EXECUTE ON FUNCTION app.f(jsonb, int) FROM PUBLIC")
    with refused(DENIED, "may not execute"):
        party("define").execute(BIND, ["app.f"])


def test_undoing_is_binding_too(kit: Connection, party: Party) -> None:
    make_function(kit, "forbidden", public=False)
    kit.execute(BIND, ["app.forbidden"])
    kit.execute("SELECT pgflow_prefect.bind_step('chain', 'a', 'external')")
    with refused(DENIED, "may not execute"):
        party("define").execute("SELECT pgflow_prefect.undo_binding('chain', 'a')")


def test_define_binds_what_it_may_execute_and_the_row_says_who_did(kit: Connection, party: Party) -> None:
    make_function(kit, "f")
    assert value(party("define"), BIND, "app.f") is True
    assert value(kit, "SELECT bound_by FROM pgflow_prefect.bindings") == "pgflow_define"


@pytest.mark.parametrize("write", DIRECT_WRITES)
def test_define_writes_bindings_and_their_history_by_the_trigger_alone(
    kit: Connection, party: Party, write: str
) -> None:
    make_function(kit, "forbidden", public=False)
    kit.execute("SELECT pgflow_prefect.bind_step('chain', 'a', 'external')")
    with refused(DENIED):
        party("define").execute(DIRECT_WRITES[write])


def test_the_history_names_the_login_that_bound(kit: Connection, party: Party) -> None:
    definer = party("define")
    definer.execute("SELECT pgflow_prefect.bind_step('chain', 'a', 'external')")
    login = value(definer, "SELECT session_user::text")
    assert value(kit, "SELECT changed_by FROM pgflow_prefect.binding_changes") == login
    assert value(definer, "SELECT pgflow_prefect.undo_binding('chain', 'a')") is True


def test_a_kit_of_an_earlier_version_loses_the_direct_writes(kit: Connection, party: Party) -> None:
    kit.execute(
        "GRANT INSERT, UPDATE, DELETE ON pgflow_prefect.bindings, pgflow_prefect.binding_changes TO pgflow_define"
    )
    run_script(kit, "roles")
    with refused(DENIED):
        party("define").execute("DELETE FROM pgflow_prefect.binding_changes")


flows = pytest.mark.usefixtures("pgflow_dsn", "prefect_api")


@pytest.fixture
def stranger(kit: Connection) -> str:
    """A role that owns functions in the schema app, and is neither trusted nor a superuser."""
    name = create_role(kit)
    kit.execute(f"CREATE SCHEMA IF NOT EXISTS app AUTHORIZATION {name}; GRANT USAGE ON SCHEMA app TO PUBLIC".encode())
    return name


def make_strangers_function(db: Connection, owner: str, volatility: str = "VOLATILE") -> None:
    """Create app.f, a function of this owner's that leaves a note of each call."""
    db.execute("CREATE TABLE called (by text); GRANT ALL ON called TO PUBLIC")
    db.execute(
        "CREATE FUNCTION app.note() RETURNS void LANGUAGE sql AS 'INSERT INTO public.called VALUES (current_user)'"
    )
    db.execute(
        f"CREATE FUNCTION app.f(jsonb) RETURNS jsonb LANGUAGE plpgsql {volatility} AS "
        "$$ BEGIN PERFORM app.note(); RETURN $1; END $$".encode()
    )
    db.execute(f"ALTER FUNCTION app.f OWNER TO {owner}".encode())


def make_bound(db: Connection, *, by_row: bool) -> Workflow:
    workflow = Workflow(make_slug())
    define(db, workflow.slug, {"only": []})
    if by_row:
        db.execute("SELECT pgflow_prefect.bind_step(%s, 'only', 'sql', 'app.f')", [workflow.slug])
    else:
        workflow.bind("only", SqlFunction("app.f"))
    return workflow


@pytest.mark.anyio
@flows
@pytest.mark.parametrize("volatility", ["VOLATILE", "STABLE", "IMMUTABLE"])
async def test_a_row_can_not_have_a_worker_run_a_strangers_function(
    kit: Connection, stranger: str, volatility: str
) -> None:
    make_strangers_function(kit, stranger, volatility)
    async with going(make_bound(kit, by_row=True), kit) as run:
        pass
    assert f"whose owner {stranger} is not trusted here" in str(get_run(kit, run.run_id).error_message)
    assert value(kit, "SELECT count(*) FROM called") == 0


@pytest.mark.anyio
@flows
@pytest.mark.parametrize("by_row", [True, False])
async def test_a_function_whose_owner_the_worker_lists_is_called_and_so_is_one_that_code_names(
    kit: Connection, stranger: str, monkeypatch: pytest.MonkeyPatch, *, by_row: bool
) -> None:
    if by_row:
        monkeypatch.setenv("PGFLOW_FUNCTION_OWNERS", f"nobody, {stranger}")
    make_strangers_function(kit, stranger)
    async with going(make_bound(kit, by_row=by_row), kit) as run:
        pass
    assert get_run(kit, run.run_id).status == "completed", get_run(kit, run.run_id)
    assert value(kit, "SELECT count(*) FROM called") == 1


@pytest.mark.anyio
@flows
async def test_a_row_stops_working_when_its_binder_loses_the_right_to_execute(kit: Connection, party: Party) -> None:
    make_function(kit, "f")
    workflow = make_slug()
    define(kit, workflow, {"only": []})
    party("define").execute("SELECT pgflow_prefect.bind_step(%s, 'only', 'sql', 'app.f')", [workflow])
    kit.execute("REVOKE EXECUTE ON FUNCTION app.f FROM PUBLIC")
    async with going(Workflow(workflow), kit) as run:
        pass
    assert "which pgflow_define may not execute, who bound it" in str(get_run(kit, run.run_id).error_message)


@pytest.mark.anyio
async def test_doctor_knows_a_worker_that_is_more_than_it_need_be(
    kit: Connection, party_dsn: PartyDsn, dsn: str
) -> None:
    async def find_power(who: str) -> str | None:
        async with open_diagnosis(who, Settings()) as database:
            return await database.find_power()

    assert await find_power(dsn) == "a superuser"
    assert await find_power(party_dsn("work")) is None
    owner = become_owner(kit, "")
    assert await find_power(make_conninfo(dsn, options=f"-c role={owner}")) == "the owner of the tables"
