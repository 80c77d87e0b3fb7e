"""Callers of SQL whom row-level security applies to: our functions and views raise an error, and show no part."""

from collections.abc import Iterator
from typing import LiteralString
from uuid import uuid4

import pytest

from tests.conftest import Connect, Connection
from tests.engine import CHAIN, define, refused, run_workflow, value

DENIED = "42501"
HIDDEN = "query would be affected by row-level security policy"
# Functions that read rows or edit a definition; those that move runs have a test of their own.
CALLS: dict[str, LiteralString] = {
    "view external_steps": "SELECT * FROM pgflow_prefect.external_steps",
    "view external_steps of one run": "SELECT * FROM pgflow_prefect.external_steps WHERE run_id = %(run)s",
    "get_ready_steps": "SELECT pgflow.get_ready_steps(%(run)s)",
    "has_unmet_deps": "SELECT pgflow.has_unmet_deps(%(run)s, 'b')",
    "get_root_steps": "SELECT pgflow.get_root_steps('chain')",
    "list_workflows": "SELECT pgflow_prefect.list_workflows()",
    "load_definitions": "SELECT pgflow_prefect.load_definitions(NULL)",
    "read_end": "SELECT pgflow_prefect.read_end(%(run)s, ARRAY['a'])",
    "list_step_states": "SELECT pgflow_prefect.list_step_states(%(run)s)",
    "find_handover": "SELECT pgflow_prefect.find_handover(%(run)s, 'a', 0, 1)",
    "insert_workflow": "SELECT pgflow_prefect.insert_workflow('another')",
    "insert_steps": "SELECT pgflow_prefect.insert_steps('chain', ARRAY['z'])",
    "insert_deps": "SELECT pgflow_prefect.insert_deps('chain', ARRAY['a'], ARRAY['c'])",
    "delete_steps": "SELECT pgflow_prefect.delete_steps('chain', ARRAY['c'])",
    "delete_deps": "SELECT pgflow_prefect.delete_deps('chain', ARRAY['b'], ARRAY['c'])",
    "enable_workflow": "SELECT pgflow_prefect.enable_workflow('chain')",
}


@pytest.fixture
def role(db: Connection) -> Iterator[str]:
    """A role with every right, and without BYPASSRLS."""
    name = f"hidden_{uuid4().hex[:12]}"
    db.execute(f"CREATE ROLE {name}".encode())
    for schema in ("pgflow", "pgflow_prefect"):
        db.execute(
            f"GRANT USAGE ON SCHEMA {schema} TO {name}; GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {name};"
            f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO {name}".encode()
        )
    yield name
    db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


@pytest.mark.parametrize("policies", ["none", "one that shows a few rows"])
@pytest.mark.parametrize("name", CALLS)
def test_a_caller_whose_rows_are_hidden_gets_an_error(
    db: Connection, connect: Connect, role: str, name: str, policies: str
) -> None:
    define(db, "chain", CHAIN)
    db.execute("SELECT pgflow_prefect.bind_step('chain', 'a', 'external')")
    run_id = run_workflow(db, "chain").id
    for table in ("runs", "step_states", "workflows", "steps", "deps"):
        db.execute(f"ALTER TABLE pgflow.{table} ENABLE ROW LEVEL SECURITY".encode())
        if policies != "none":
            db.execute(f"CREATE POLICY few ON pgflow.{table} USING (random() < 0.5)".encode())
    caller = connect()
    caller.execute(f"SET ROLE {role}".encode())
    with refused(DENIED, HIDDEN):
        caller.execute(CALLS[name], {"run": run_id})
    assert value(db, "SELECT count(*) FROM pgflow.steps") == len(CHAIN)


def test_the_view_of_external_steps_shows_them_to_a_role_that_sees_every_row(
    db: Connection, connect: Connect, role: str
) -> None:
    define(db, "chain", CHAIN)
    db.execute("SELECT pgflow_prefect.bind_step('chain', 'a', 'external')")
    run_workflow(db, "chain")
    db.execute("ALTER TABLE pgflow.runs ENABLE ROW LEVEL SECURITY")
    db.execute(f"ALTER ROLE {role} BYPASSRLS".encode())
    caller = connect()
    caller.execute(f"SET ROLE {role}".encode())
    assert value(caller, "SELECT count(*) FROM pgflow_prefect.external_steps") == 1
