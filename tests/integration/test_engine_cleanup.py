"""Scripts that empty pgflow's first five tables go on to work, and nothing of what came later stays behind."""

from tests.conftest import Connection
from tests.engine import CHAIN, DIAMOND, column, complete, define, fail, finish, run_workflow, start_run, value

CLEANUP = """
    DELETE FROM pgflow.step_states;
    DELETE FROM pgflow.runs;
    DELETE FROM pgflow.deps;
    DELETE FROM pgflow.steps;
    DELETE FROM pgflow.workflows;
"""


def tables_with_rows(db: Connection) -> set[str]:
    """Return the tables of both schemas that are not empty; the database's own id is of no workflow."""
    tables = column(db, "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' AND relname !~ '^(pg|sql)_'")
    found = {str(table) for table in tables if value(db, f"SELECT EXISTS (TABLE {table})")}
    return found - {"pgflow_prefect.installation"}


SETTINGS = {"pgflow.limits"}
"""What is no data of workflows or runs, and stays."""


def fill(db: Connection) -> None:
    """Leave runs in every state, edited definitions, and joins that wait."""
    finish(db, start_run(db, "chain", CHAIN))
    fail(db, run_workflow(db, "chain").id, "a")
    run_id = start_run(db, "diamond", DIAMOND)
    complete(db, run_id, "a")
    complete(db, run_id, "b")
    db.execute("INSERT INTO pgflow.deps VALUES ('diamond', 'a', 'd')")
    run_workflow(db, "diamond")


def test_deleting_the_rows_of_the_first_five_tables_leaves_nothing(db: Connection) -> None:
    fill(db)
    assert {"pgflow.definitions", "pgflow.definition_deps", "pgflow.waiting_steps"} <= tables_with_rows(db)
    db.execute(CLEANUP)
    assert tables_with_rows(db) == SETTINGS


def test_so_does_a_truncate_that_cascades(db: Connection) -> None:
    fill(db)
    db.execute("TRUNCATE pgflow.workflows CASCADE")
    assert tables_with_rows(db) == SETTINGS


def test_deleting_one_workflow_leaves_the_others_alone(db: Connection) -> None:
    fill(db)
    for table in ("step_states", "runs", "deps", "steps"):
        db.execute(f"DELETE FROM pgflow.{table} WHERE workflow_slug = 'chain'".encode())  # noqa: S608
    db.execute("DELETE FROM pgflow.workflows WHERE slug = 'chain'")
    run = run_workflow(db, "diamond")
    assert finish(db, run.id) == ["a", "b", "c", "d"]


def test_everything_can_be_defined_again_after_it(db: Connection) -> None:
    fill(db)
    db.execute(CLEANUP)
    define(db, "chain", CHAIN)
    assert finish(db, run_workflow(db, "chain").id) == ["a", "b", "c"]
