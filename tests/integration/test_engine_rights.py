"""Who may do what: no role by accident, a role that was granted it everything; row-level security is never silent."""

from collections.abc import Iterator
from uuid import uuid4

import pytest
from psycopg import sql

from tests.conftest import Connect, Connection
from tests.engine import (
    CHAIN,
    DIAMOND,
    INVALID,
    column,
    define,
    finish,
    get_run,
    refused,
    reopen,
    run_workflow,
    statuses,
    value,
)
from tests.integration.transitions import TRANSITIONS, make, prepare

DENIED = "42501"
OWNERS_FUNCTIONS = ["check_written", "deps_edited", "find_definition", "snapshot", "steps_edited", "workflows_edited"]
TRIGGER_FUNCTIONS = [
    *(
        "check_written",
        "deps_edited",
        "refuse_slug",
        "replace_limits",
        "shorten_message",
        "steps_edited",
        "workflows_edited",
    ),
]
WRITERS = [name.removeprefix("pgflow.") for name in TRANSITIONS if name.startswith("pgflow.")]
INLINED = ["announce_run", "is_under_policies"]
WITHOUT_TABLES = [
    *("describe_child_end", "describe_leave", "find_date_lock", "may_try_again"),
    *("decide_step", "engine_version", "may_follow_failure", "outcome_of", "refuse_policies", "refuse_slug"),
]
TABLES = [
    *("workflows", "steps", "deps", "runs", "step_states"),
    *("definitions", "definition_steps", "definition_deps", "waiting_steps", "undone_steps", "step_maps", "step_items"),
]
RUN = """
    GRANT USAGE ON SCHEMA pgflow TO {role};
    GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA pgflow TO {role};
    GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pgflow TO {role};
"""
EDIT = """
    GRANT USAGE ON SCHEMA pgflow TO {role};
    GRANT SELECT, INSERT, DELETE ON pgflow.workflows, pgflow.steps, pgflow.deps TO {role};
"""


@pytest.fixture
def role(db: Connection) -> Iterator[str]:
    """A role without any rights; roles belong to the whole server."""
    name = f"role_{uuid4().hex[:12]}"
    db.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
    yield name
    db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


def grant(db: Connection, rights: str, role: str) -> None:
    db.execute(rights.format(role=role).encode())


def become(connection: Connection, role: str) -> Connection:
    connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
    return connection


def functions(db: Connection, condition: str) -> list[object]:
    """Return the names of our functions that meet a condition on pg_proc."""
    ours = f"pronamespace = 'pgflow'::regnamespace AND {condition}"
    return column(db, f"SELECT proname FROM pg_proc WHERE {ours} ORDER BY 1")  # noqa: S608  ours, above


def test_no_role_may_execute_anything_by_default(db: Connection) -> None:
    assert functions(db, "has_function_privilege('public', oid, 'EXECUTE')") == []


def test_only_triggers_and_snapshots_run_with_their_owners_rights(db: Connection) -> None:
    assert functions(db, "prosecdef") == OWNERS_FUNCTIONS
    assert functions(db, "prorettype = 'trigger'::regtype") == TRIGGER_FUNCTIONS


def test_every_function_that_writes_no_runs_names_its_search_path(db: Connection) -> None:
    given = "coalesce('search_path=pg_catalog, pgflow, pg_temp' = ANY (proconfig), false)"
    assert functions(db, "NOT " + given) == sorted([*WRITERS, *INLINED])


def test_every_function_that_reads_tables_turns_silent_filtering_off(db: Connection) -> None:
    without = functions(db, "NOT coalesce('row_security=off' = ANY (proconfig), false)")
    assert without == sorted([*WRITERS, *INLINED, *WITHOUT_TABLES])


def test_a_role_without_rights_can_do_nothing(db: Connection, role: str) -> None:
    define(db, "chain", CHAIN)
    become(db, role)
    with refused(DENIED):
        run_workflow(db, "chain")
    db.execute("RESET ROLE")


def test_a_role_that_was_granted_it_runs_a_workflow(db: Connection, connect: Connect, role: str) -> None:
    define(db, "diamond", DIAMOND)
    grant(db, RUN, role)
    worker = become(connect(), role)
    run_id = run_workflow(worker, "diamond").id
    worker.execute("SELECT pgflow.take_run(%s)", [run_id])
    worker.execute("SELECT pgflow.claim_step(%s, 'a')", [run_id])
    worker.execute("SELECT pgflow.fail_step(%s, 'a', 'broken')", [run_id])
    reopen(worker, run_id)
    assert finish(worker, run_id) == ["a", "b", "c", "d"]
    assert get_run(db, run_id).status == "completed"


def test_a_role_that_may_only_edit_needs_no_right_on_our_own_tables(
    db: Connection, connect: Connect, role: str
) -> None:
    grant(db, EDIT, role)
    editor = become(connect(), role)
    define(editor, "chain", CHAIN)
    with refused(INVALID, "has a cycle"):
        editor.execute("INSERT INTO pgflow.deps VALUES ('chain', 'c', 'a')")
    editor.execute("DELETE FROM pgflow.deps WHERE to_step_slug = 'c'")
    editor.execute("DELETE FROM pgflow.steps WHERE slug = 'c'")
    with refused(DENIED):
        run_workflow(editor, "chain")


def test_an_object_in_a_users_own_schema_is_never_taken_for_ours(db: Connection, connect: Connect) -> None:
    define(db, "chain", CHAIN)
    trapped = connect()
    trapped.execute("CREATE TEMP TABLE runs (id int); CREATE TEMP TABLE step_states (id int)")
    trapped.execute("""
        CREATE FUNCTION public.now() RETURNS timestamptz LANGUAGE plpgsql AS $$ BEGIN RAISE 'taken'; END $$;
        CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql AS $$ BEGIN RAISE 'taken'; END $$;
        SET search_path = public, pg_temp, pg_catalog
    """)
    run_id = run_workflow(trapped, "chain").id
    assert finish(trapped, run_id) == ["a", "b", "c"]


@pytest.mark.parametrize("table", TABLES)
def test_row_level_security_of_any_table_is_an_error_and_not_silence(
    db: Connection, connect: Connect, role: str, table: str
) -> None:
    define(db, "diamond", DIAMOND)
    run_id = run_workflow(db, "diamond").id
    grant(db, RUN, role)
    db.execute(sql.SQL("ALTER TABLE pgflow.{} ENABLE ROW LEVEL SECURITY").format(sql.Identifier(table)))
    worker = become(connect(), role)
    with refused(DENIED, f'the role "{role}" may not see every row of pgflow.{table}') as caught:
        worker.execute("SELECT pgflow.complete_step(%s, 'a', NULL)", [run_id])
    assert f"ALTER ROLE {role} BYPASSRLS" in str(caught.value.diag.message_hint)
    with refused(DENIED, "row-level security"):
        run_workflow(worker, "diamond")
    assert statuses(db, run_id) == {"a": "pending"}


@pytest.mark.parametrize("name", sorted(TRANSITIONS))
@pytest.mark.parametrize("policies", ["none", "one that hides no row"])
def test_no_transition_is_made_by_a_role_that_row_level_security_applies_to(
    db: Connection, connect: Connect, role: str, name: str, policies: str
) -> None:
    run_id = prepare(db, TRANSITIONS[name])
    grant(db, RUN + RUN.replace("pgflow", "pgflow_prefect"), role)
    for table in ("runs", "step_states"):
        db.execute(f"ALTER TABLE pgflow.{table} ENABLE ROW LEVEL SECURITY".encode())
        if policies != "none":
            db.execute(f"CREATE POLICY everything ON pgflow.{table} USING (true) WITH CHECK (true)".encode())
    before = read_everything(db)
    worker = become(connect(), role)
    if policies == "none" and "FROM pgflow.runs r" in TRANSITIONS[name].call:
        return  # this caller sees no row to begin with
    with refused(DENIED, "query would be affected by row-level security policy for table"):
        make(worker, TRANSITIONS[name], run_id)
    assert read_everything(db) == before


def read_everything(db: Connection) -> list[tuple[object, ...]]:
    """Return all runs and step states."""
    runs = db.execute("SELECT * FROM pgflow.runs ORDER BY id").fetchall()
    return runs + db.execute("SELECT * FROM pgflow.step_states ORDER BY run_id, step_slug").fetchall()


def test_an_editor_behind_row_level_security_is_still_watched_for_cycles(
    db: Connection, connect: Connect, role: str
) -> None:
    define(db, "chain", CHAIN)
    grant(db, EDIT, role)
    db.execute("ALTER TABLE pgflow.deps ENABLE ROW LEVEL SECURITY")
    db.execute("CREATE POLICY only_insert ON pgflow.deps FOR INSERT WITH CHECK (true)")
    editor = become(connect(), role)
    assert value(editor, "SELECT count(*) FROM pgflow.deps") == 0
    with refused(INVALID, "has a cycle: a -> b -> c -> a"):
        editor.execute("INSERT INTO pgflow.deps VALUES ('chain', 'c', 'a')")
