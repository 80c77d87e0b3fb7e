"""What a weaker role can keep the owner from doing by holding a lock."""

from datetime import timedelta
from typing import LiteralString

import pytest

from pgflow_prefect.database.link import BOUND
from pgflow_prefect.database.schema import ENGINE_VERSION, SCRIPTS
from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connection
from tests.engine import claim, column, complete, define, finish, refused, run_workflow, statuses, value
from tests.integration.supabase import run_script
from tests.security.conftest import Party

BUSY = "55P03"
DENIED = "42501"
SCRIPTS_LOCK_OF_VERSION_1 = 7031902210563


@pytest.mark.parametrize("role", ["define", "run", "work", "observe"])
def test_no_advisory_lock_of_a_role_keeps_an_installation_waiting(kit: Connection, party: Party, role: str) -> None:
    party(role).execute("SELECT pg_advisory_lock(%s)", [SCRIPTS_LOCK_OF_VERSION_1])
    for script in SCRIPTS:
        kit.execute(shipped_path("sql", script).read_bytes().replace(b"lock_timeout = '10s'", b"lock_timeout = '1ms'"))
    run_script(kit, "api")
    run_script(kit, "roles")
    assert value(kit, "SELECT pgflow.engine_version()") == ENGINE_VERSION


@pytest.mark.parametrize("role", ["define", "run", "work", "observe"])
@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO pgflow.definitions (workflow_slug, version, step_count) VALUES ('chain', 99, 1)",
        "INSERT INTO pgflow.definition_steps VALUES (1, 'x', 0)",
        "INSERT INTO pgflow.definition_deps VALUES (1, 'a', 'c', 1)",
        "DELETE FROM pgflow.definition_steps",
        "SELECT pgflow.write_snapshot('chain')",
    ],
)
def test_no_role_writes_a_snapshot(kit: Connection, party: Party, role: str, statement: LiteralString) -> None:
    with refused(DENIED):
        party(role).execute(statement)


def test_a_worker_gets_the_snapshot_of_what_the_workflow_is(kit: Connection, party: Party) -> None:
    kit.execute("INSERT INTO pgflow.steps VALUES ('chain', 'd')")
    run = run_workflow(party("work"), "chain")
    steps = "SELECT slug FROM pgflow.definition_steps WHERE definition_id = %s ORDER BY 1"
    assert column(kit, steps, run.definition_id) == ["a", "b", "c", "d"]


def test_the_script_takes_back_what_earlier_ones_granted(kit: Connection, party: Party) -> None:
    kit.execute("GRANT INSERT ON pgflow.definitions, pgflow.definition_steps, pgflow.definition_deps TO pgflow_work")
    kit.execute("GRANT UPDATE (edited_in) ON pgflow.workflows TO pgflow_work")
    run_script(kit, "roles")
    worker = party("work")
    with refused(DENIED):
        worker.execute("INSERT INTO pgflow.definition_steps VALUES (1, 'x', 0)")
    with refused(DENIED):
        worker.execute("SELECT FROM pgflow.workflows FOR UPDATE")


@pytest.mark.parametrize("role", ["run", "work", "observe"])
@pytest.mark.parametrize("strength", ["UPDATE", "NO KEY UPDATE", "SHARE", "KEY SHARE"])
def test_only_roles_that_edit_workflows_lock_them(
    kit: Connection, party: Party, role: str, strength: LiteralString
) -> None:
    with refused(DENIED):
        party(role).execute("SELECT FROM pgflow.workflows FOR " + strength)


def test_a_first_run_that_is_left_open_keeps_no_edit_waiting(kit: Connection, party: Party) -> None:
    kit.execute("INSERT INTO pgflow.steps VALUES ('chain', 'd')")
    worker = party("work")
    worker.execute("BEGIN")
    older = run_workflow(worker, "chain").id
    party("define").execute("SET lock_timeout = '1s'; INSERT INTO pgflow.deps VALUES ('chain', 'a', 'd')")
    newer = run_workflow(kit, "chain").id
    worker.execute("COMMIT")
    assert statuses(kit, older) == {"a": "pending", "d": "pending"}
    assert finish(kit, newer) == ["a", "b", "d", "c"]


@pytest.mark.parametrize("role", ["run", "work"])
@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_an_open_transaction_of_a_first_run_delays_no_other_run(
    kit: Connection, party: Party, role: str, end: LiteralString
) -> None:
    kit.execute("INSERT INTO pgflow.steps VALUES ('chain', 'd')")
    holder = party(role)
    holder.execute("BEGIN")
    if role == "run":
        holder.execute("SELECT pgflow_api.run_workflow('chain', '{}')")
    else:
        run_workflow(holder, "chain")
    kit.execute("SET lock_timeout = '1ms'; SET statement_timeout = '60s'")
    kit.execute("ALTER FUNCTION pgflow.snapshot(text) SET lock_timeout = '1ms'")
    second, third = run_workflow(kit, "chain").id, run_workflow(kit, "chain").id
    holder.execute(end)
    for run_id in (second, third, run_workflow(kit, "chain").id):
        assert sorted(finish(kit, run_id)) == ["a", "b", "c", "d"]
    expected = 2 if end == "COMMIT" else 1
    assert value(kit, "SELECT count(*) FROM pgflow.definitions WHERE step_count = 4") == expected
    kit.execute("INSERT INTO pgflow.steps VALUES ('chain', 'e')")
    assert "e" in finish(kit, run_workflow(kit, "chain").id)


def test_an_edit_that_is_left_open_counts_from_a_later_run(kit: Connection, party: Party) -> None:
    kit.execute("INSERT INTO pgflow.steps VALUES ('chain', 'd')")
    kit.execute("ALTER FUNCTION pgflow.snapshot(text) SET lock_timeout = '10ms'")
    definer = party("define")
    definer.execute("BEGIN; INSERT INTO pgflow.steps VALUES ('chain', 'e')")
    assert statuses(kit, run_workflow(kit, "chain").id) == {"a": "pending", "d": "pending"}
    definer.execute("COMMIT")
    assert statuses(kit, run_workflow(kit, "chain").id) == {"a": "pending", "d": "pending", "e": "pending"}


def test_a_deletion_that_is_left_open_keeps_no_start_waiting_for_ever(kit: Connection, party: Party) -> None:
    kit.execute("INSERT INTO pgflow.steps VALUES ('chain', 'd')")
    kit.execute("ALTER FUNCTION pgflow.snapshot(text) SET lock_timeout = '10ms'")
    definer = party("define")
    definer.execute("BEGIN; DELETE FROM pgflow.steps WHERE slug = 'd'")
    with refused(BUSY, 'workflow "chain" is locked by another transaction'):
        run_workflow(kit, "chain")
    definer.execute("COMMIT")
    assert statuses(kit, run_workflow(kit, "chain").id) == {"a": "pending"}


def test_a_login_with_a_time_out_keeps_a_start_waiting_no_longer(kit: Connection, party: Party) -> None:
    kit.execute("INSERT INTO pgflow.steps VALUES ('chain', 'd')")
    login = value(party("work"), "SELECT session_user")
    kit.execute(f"ALTER ROLE {login} SET idle_in_transaction_session_timeout = '200ms'".encode())
    worker = party("work")
    worker.execute("BEGIN")
    run_workflow(worker, "chain")
    assert statuses(kit, run_workflow(kit, "chain").id) == {"a": "pending", "d": "pending"}
    assert value(kit, "SELECT count(*) FROM pgflow.definitions WHERE step_count = 4") == 1


def test_an_open_deletion_keeps_nothing_else_waiting(kit: Connection, party: Party) -> None:
    """Neither another workflow, nor a claim, nor a look waits. What starts a next step of the workflow waits."""
    define(kit, "other", {"only": [], "after": ["only"]})
    begun, other = run_workflow(kit, "chain").id, run_workflow(kit, "other").id
    for workflow in ("chain", "other"):
        kit.execute("SELECT pgflow_prefect.enable_workflow(%s)", [workflow])
    kit.execute("INSERT INTO pgflow.steps VALUES ('chain', 'd')")
    definer = party("define")
    definer.execute("BEGIN; DELETE FROM pgflow.steps WHERE slug = 'd'")

    worker, observer = party("work"), party("observe")
    for session in (worker, observer, kit):
        session.execute("SET lock_timeout = '1ms'")
    take = "SELECT run_id FROM pgflow_prefect.take_runs(ARRAY['chain', 'other'], 100, true, 'the tests', 60, 3)"
    assert {begun, other} <= {*column(worker, take)}
    assert claim(worker, begun, "a").attempt == 1
    with refused(BUSY):
        complete(worker, begun, "a")
    assert finish(worker, other) == ["only", "after"]
    assert finish(worker, run_workflow(worker, "other").id) == ["only", "after"]
    assert column(observer, "SELECT slug FROM pgflow_prefect.list_workflows()") == ["chain", "other"]
    assert value(observer, "SELECT status FROM pgflow_prefect.read_run(%s, 60, true)", begun) == "pending"
    assert value(observer, "SELECT steps FROM pgflow_prefect.load_definitions(ARRAY['chain'])") == ["a", "b", "c", "d"]

    definer.execute("COMMIT")
    assert finish(worker, begun) == ["a", "b", "c"]


def test_a_start_gives_up_its_lock_before_python_gives_up_the_statement(kit: Connection) -> None:
    """Else nothing would say which workflow is locked."""
    waits = "SELECT replace(option, 'lock_timeout=', '')::interval FROM pg_proc, unnest(proconfig) AS option"
    once = value(kit, f"{waits} WHERE oid = 'pgflow.snapshot(text)'::regprocedure AND option LIKE 'lock_timeout=%%'")
    assert isinstance(once, timedelta)
    assert 2 * once.total_seconds() < BOUND / 1.5
