"""A trigger of a user on runs or step states runs as in a plain statement of the session, whichever function writes."""

import pytest

from tests.conftest import Connect, Connection
from tests.engine import column, define, finish, run_workflow, value
from tests.integration.transitions import ROLLED_BACK, TRANSITIONS, WITH_OWNERS_RIGHTS, find_writers, make, prepare

# Settings of a session that differ from all defaults, and that a trigger may depend on.
SESSION = """
    SET search_path = app, public; SET plan_cache_mode = force_custom_plan; SET client_min_messages = error;
    SET work_mem = '5MB'; SET lock_timeout = '77s'; SET enable_nestloop = off; SET default_statistics_target = 77;
    SET TimeZone = 'Asia/Kolkata'; SET check_function_bodies = off;
"""
# Unqualified names, as a user writes them: they are found in the search_path of the session alone.
TRIGGERS = """
    CREATE SCHEMA app;
    CREATE TABLE app.session AS SELECT name, setting FROM pg_settings WHERE name !~ '^transaction_';
    CREATE TABLE app.seen (event text, name text, setting text);
    CREATE FUNCTION app.look() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO seen VALUES (TG_TABLE_NAME || ' ' || TG_OP);
        INSERT INTO seen SELECT TG_TABLE_NAME || ' ' || TG_OP, s.name, current_setting(s.name)
        FROM session s WHERE s.setting <> (SELECT p.setting FROM pg_settings p WHERE p.name = s.name);
        RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
    END $$;
    CREATE TRIGGER app_before BEFORE INSERT OR UPDATE OR DELETE ON pgflow.runs
        FOR EACH ROW EXECUTE FUNCTION app.look();
    CREATE TRIGGER "AFTER" AFTER INSERT OR UPDATE OR DELETE ON pgflow.runs
        FOR EACH ROW EXECUTE FUNCTION app.look();
    CREATE TRIGGER app_before BEFORE INSERT OR UPDATE OR DELETE ON pgflow.step_states
        FOR EACH ROW EXECUTE FUNCTION app.look();
    CREATE TRIGGER app_statement AFTER INSERT OR UPDATE OR DELETE ON pgflow.step_states
        FOR EACH STATEMENT EXECUTE FUNCTION app.look();
    CREATE CONSTRAINT TRIGGER app_deferred AFTER INSERT OR UPDATE OR DELETE ON pgflow.step_states
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION app.look();
"""
# What is in the way of a name without its schema. None of it is called, or the test fails.
TRAP_FUNCTIONS = [
    "clock_timestamp()",
    "now()",
    "gen_random_uuid()",
    "cardinality(text[])",
    "unnest(text[])",
    "unnest(uuid[])",
    "format(text, text)",
    "format(text, text, text)",
    "left(text, int)",
    "octet_length(text)",
    "pg_column_size(jsonb)",
    "jsonb_path_exists(jsonb, jsonpath)",
    "pg_notify(text, text)",
    "make_interval(int, int, int, int, int, int, double precision)",
    "split_part(text, text, int)",
    "concat_ws(text, text, text)",
    "jsonb_to_recordset(jsonb)",
    "row_security_active(oid)",
    "row_security_active(regclass)",
]
TRAP_OPERANDS = [
    *("text, text", "uuid, uuid", "int, int", "bigint, int", "int, bigint", "bigint, bigint", "jsonb, jsonb"),
    *("timestamptz, timestamptz", "timestamptz, interval", "interval, interval", "xid, xid", "text[], text[]"),
    *("text[], text", "boolean, boolean"),
]
TRAP_OPERATORS = ["=", "<>", "<", ">", "<=", ">=", "+", "-", "||", "*", "^", "~~"]
TRAP_TYPES = ["text", "uuid", "jsonb", "timestamptz", "xid", "record"]


@pytest.fixture
def watched(db: Connection) -> Connection:
    """A session with settings of its own, and with triggers that note which of them they do not find."""
    db.execute(SESSION)
    db.execute(TRIGGERS)
    return db


def test_every_function_that_writes_runs_or_step_states_is_tried_here(db: Connection) -> None:
    assert sorted([*TRANSITIONS, *WITH_OWNERS_RIGHTS]) == sorted(find_writers(db))


def test_no_function_that_writes_runs_or_step_states_has_a_setting_of_its_own(db: Connection) -> None:
    configured = column(
        db, "SELECT pronamespace::regnamespace || '.' || proname FROM pg_proc WHERE proconfig IS NOT NULL"
    )
    assert find_writers(db) & {*map(str, configured)} == WITH_OWNERS_RIGHTS


@pytest.mark.parametrize("name", sorted(TRANSITIONS.keys() - ROLLED_BACK))
def test_a_trigger_finds_the_settings_of_its_session(name: str, watched: Connection) -> None:
    run_id = prepare(watched, TRANSITIONS[name])
    watched.execute("DELETE FROM app.seen")
    make(watched, TRANSITIONS[name], run_id)
    assert value(watched, "SELECT count(*) FROM app.seen WHERE name IS NULL") != 0, "no trigger has run"
    assert watched.execute("SELECT DISTINCT * FROM app.seen WHERE name IS NOT NULL").fetchall() == []


def test_a_trigger_finds_the_settings_of_its_session_in_a_whole_run(watched: Connection) -> None:
    define(watched, "diamond", {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]})
    assert finish(watched, run_workflow(watched, "diamond").id) == ["a", "b", "c", "d"]
    assert watched.execute("SELECT DISTINCT * FROM app.seen WHERE name IS NOT NULL").fetchall() == []


@pytest.mark.parametrize("name", sorted(TRANSITIONS))
def test_no_object_of_another_schema_is_taken_for_one_of_ours_or_of_postgresql(
    name: str, db: Connection, connect: Connect
) -> None:
    run_id = prepare(db, TRANSITIONS[name])
    set_traps(db)
    trapped = connect()
    trapped.execute("SET search_path = trap, pg_temp, pg_catalog")
    call = TRANSITIONS[name].call
    for ours, qualified in (("gen_random_uuid", "pg_catalog.gen_random_uuid"), ("id = ", "id OPERATOR(pg_catalog.=) ")):
        call = call.replace(ours, qualified)
    trapped.execute(call.encode(), {"run": run_id})


def test_a_trap_is_one(db: Connection, connect: Connect) -> None:
    set_traps(db)
    trapped = connect()
    trapped.execute("SET search_path = trap, pg_temp, pg_catalog")
    for caught in ("SELECT now()", "SELECT 1 = 1", "SELECT ARRAY['a'::pg_catalog.text] || 'b'::pg_catalog.text"):
        with pytest.raises(Exception, match="taken"):
            trapped.execute(caught.encode())


def set_traps(db: Connection) -> None:
    """Create a schema of functions, operators and types that fail, under the names of PostgreSQL's own."""
    body = "LANGUAGE plpgsql AS $$ BEGIN RAISE 'taken'; END $$"
    statements = ["CREATE SCHEMA trap"]
    statements += [f"CREATE FUNCTION trap.{signature} RETURNS int {body}" for signature in TRAP_FUNCTIONS]
    for operands in TRAP_OPERANDS:
        statements.append(f"CREATE FUNCTION trap.taken({operands}) RETURNS boolean {body}")
        left, right = operands.split(", ")
        arguments = f"FUNCTION = trap.taken, LEFTARG = {left}, RIGHTARG = {right}"
        statements += [f"CREATE OPERATOR trap.{operator} ({arguments})" for operator in TRAP_OPERATORS]
    statements += [f"CREATE TYPE trap.{named} AS ENUM ('taken')" for named in TRAP_TYPES]
    for statement in statements:
        db.execute(statement.encode())
