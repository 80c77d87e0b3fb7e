"""What default privileges of the owner give away, and what a trigger function does on another role's table."""

from collections.abc import Iterator
from typing import LiteralString

import psycopg
import pytest

from pgflow_prefect.database.schema import ENGINE_VERSION, SCRIPTS
from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connect, Connection
from tests.engine import CHAIN, column, define, get_run, refused, run_workflow, value
from tests.integration.supabase import DENIED, RUN, SUBJECTS, become, create_role, run_script

OURS = ("pgflow", "pgflow_prefect", "pgflow_api")
OPEN_FUNCTIONS = """
    SELECT oid::regprocedure::text FROM pg_proc
    WHERE pronamespace::regnamespace::text = ANY (%s) AND has_function_privilege(%s, oid, 'EXECUTE') ORDER BY 1
"""
OPEN_TABLES = """
    SELECT oid::regclass::text FROM pg_class
    WHERE relnamespace::regnamespace::text = ANY (%s) AND relkind IN ('r', 'v')
          AND has_any_column_privilege(%s, oid, %s)
"""
GENEROUS: dict[str, LiteralString] = {
    "functions": "ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO authenticated",
    "functions to all": "ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO PUBLIC, authenticated",
    "tables": "ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC, authenticated",
    "sequences": "ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO PUBLIC, authenticated",
    "schemas": "ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO PUBLIC, authenticated",
}

# Each function that has the owner's rights, with a table of a stranger's that would feed it a row, and that row.
TRIGGER_FUNCTIONS: dict[str, tuple[LiteralString, LiteralString]] = {
    "pgflow_api.do_request": ("run_id uuid, action text, reason text", "%(run)s, 'cancel', 'mine now'"),
    "pgflow_api.begin_run": ("workflow_slug text, id uuid, payload jsonb", "'chain', %(run)s, '{}'"),
    "pgflow.check_written": ("workflow_slug text, payload jsonb, step_result jsonb", "'chain', '[]', '[]'"),
    "pgflow.steps_edited": ("workflow_slug text, slug text", "'chain', 'd'"),
    "pgflow_prefect.do_binding_request": (
        "workflow_slug text, step_slug text, action text, kind text, target text, options jsonb, requested_by text, "
        "changed boolean",
        "'chain', 'a', 'bind', 'external', NULL, '{}', 'postgres', false",
    ),
    "pgflow.deps_edited": ("workflow_slug text, from_step_slug text, to_step_slug text", "'chain', 'a', 'c'"),
}


def install(db: Connection) -> None:
    """Install everything anew, as an owner does whose default privileges have been set meanwhile."""
    db.execute("DROP SCHEMA IF EXISTS pgflow CASCADE; DROP SCHEMA IF EXISTS pgflow_prefect CASCADE")
    db.execute("DROP SCHEMA IF EXISTS pgflow_api CASCADE")
    for script in SCRIPTS:
        db.execute(shipped_path("sql", script).read_bytes())
    run_script(db, "api")


@pytest.fixture(params=GENEROUS)
def generous(request: pytest.FixtureRequest, roles: None, db: Connection) -> Connection:
    """A database whose owner had generous default privileges when everything was installed."""
    db.execute(GENEROUS[request.param])
    install(db)
    return db


@pytest.fixture
def attacker(roles: None, db: Connection, connect: Connect) -> Iterator[Connection]:
    """A login without any right of ours, which may create tables of its own."""
    run_script(db, "api")
    define(db, "chain", CHAIN)
    db.execute("SELECT pgflow.run_workflow('chain', '{}', %s)", [RUN])
    name = create_role(db)
    db.execute(f"CREATE SCHEMA lair AUTHORIZATION {name}".encode())
    yield become(connect(), name)
    db.execute("DROP SCHEMA lair CASCADE")


@pytest.mark.parametrize("grantee", ["public", "authenticated"])
def test_default_privileges_give_no_role_a_right_on_what_the_scripts_create(generous: Connection, grantee: str) -> None:
    assert column(generous, OPEN_FUNCTIONS, [*OURS], grantee) == []
    for privilege in ("SELECT", "INSERT", "UPDATE"):
        assert column(generous, OPEN_TABLES, [*OURS], grantee, privilege) == []
    for schema in OURS:
        assert value(generous, "SELECT has_schema_privilege(%s, %s, 'CREATE')", grantee, schema) is False


def test_default_privileges_of_the_schema_itself_stay(roles: None, db: Connection) -> None:
    db.execute("DROP FUNCTION pgflow.repair_run(uuid)")  # as before an upgrade that brings it
    db.execute("ALTER DEFAULT PRIVILEGES IN SCHEMA pgflow GRANT EXECUTE ON FUNCTIONS TO authenticated")
    db.execute(shipped_path("sql", "pgflow.sql").read_bytes())
    assert column(db, OPEN_FUNCTIONS, [*OURS], "authenticated") == ["pgflow.repair_run(uuid)"]
    assert column(db, OPEN_FUNCTIONS, [*OURS], "public") == []


def test_an_upgrade_closes_what_version_1_left_open(roles: None, db: Connection) -> None:
    db.execute("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pgflow, pgflow_prefect TO PUBLIC")
    db.execute("CREATE OR REPLACE FUNCTION pgflow.engine_version() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    db.execute("CREATE OR REPLACE FUNCTION pgflow_prefect.adapter_version() RETURNS int LANGUAGE sql AS 'SELECT 5'")
    for script in SCRIPTS:
        db.execute(shipped_path("sql", script).read_bytes())
    assert column(db, OPEN_FUNCTIONS, ["pgflow", "pgflow_prefect"], "public") == []


@pytest.mark.parametrize("function", TRIGGER_FUNCTIONS)
def test_a_stranger_can_not_attach_a_trigger_function(attacker: Connection, function: str) -> None:
    attacker.execute("CREATE TABLE lair.bait (id int)")
    attach = f"CREATE TRIGGER bite AFTER INSERT ON lair.bait FOR EACH ROW EXECUTE FUNCTION {function}()"
    with refused(DENIED):
        attacker.execute(attach.encode())


@pytest.mark.parametrize("function", TRIGGER_FUNCTIONS)
def test_a_trigger_function_does_nothing_on_another_table(db: Connection, attacker: Connection, function: str) -> None:
    db.execute("GRANT USAGE ON SCHEMA pgflow, pgflow_prefect, pgflow_api TO PUBLIC")
    db.execute(
        "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pgflow, pgflow_prefect, pgflow_api TO PUBLIC"
    )  # by an administrator's mistake
    columns, row = TRIGGER_FUNCTIONS[function]
    attacker.execute(f"CREATE TABLE lair.bait ({columns})".encode())
    attacker.execute(
        f"CREATE TRIGGER bite AFTER INSERT ON lair.bait REFERENCING NEW TABLE AS new_rows "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {function}()".encode()
    )
    attacker.execute(
        f"CREATE TRIGGER bite_row AFTER INSERT ON lair.bait FOR EACH ROW EXECUTE FUNCTION {function}()".encode()
    )
    before = get_run(db, RUN), value(db, "SELECT version FROM pgflow.workflows")
    with refused(DENIED, f"trigger function {function} is for .*, not for lair.bait"):
        attacker.execute(f"INSERT INTO lair.bait VALUES ({row})".encode(), SUBJECTS)  # noqa: S608  ours, above
    assert (get_run(db, RUN), value(db, "SELECT version FROM pgflow.workflows")) == before


def test_the_triggers_still_do_their_own_work(roles: None, db: Connection) -> None:
    install(db)
    define(db, "chain", CHAIN)
    run_id = run_workflow(db, "chain").id
    db.execute("SELECT pgflow_api.cancel_run(%s)", [run_id])
    assert get_run(db, run_id).status == "failed"


@pytest.mark.parametrize("script", ["api", "roles", "row_level_security"])
def test_a_script_of_the_kit_is_refused_if_it_is_older(script: str, kit: Connection) -> None:
    text = shipped_path("sql", f"supabase/{script}.sql").read_text(encoding="utf-8")
    older = text.replace(f"SET LOCAL pgflow.script_version = {ENGINE_VERSION};", "")
    assert older != text, "the script says its version"
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="this script is of an older version"):
        kit.execute(older.encode())
