"""`sql/CONTRACT.md`, the functions that Python calls, and the database agree."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pgflow_prefect
from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connection
from tests.contract.document import Described, list_called, list_statements, read_document
from tests.contract.worlds import ReleasedWorld
from tests.engine import column
from tests.integration.supabase import borrowed_roles, run_script

FUNCTION = """
    SELECT p.proargnames[:p.pronargs],
           ARRAY(SELECT format_type(type, NULL)
                 FROM unnest(p.proargtypes) WITH ORDINALITY AS a (type, place) ORDER BY place),
           p.prosecdef, p.provolatile <> 'v', coalesce('row_security=off' = ANY (p.proconfig), false)
    FROM pg_proc p WHERE p.pronamespace = 'pgflow_prefect'::regnamespace AND p.proname = %s
      AND coalesce(obj_description(p.oid, 'pg_proc'), '') NOT LIKE 'Signature of version %%'
"""
TYPES = {
    "int": "integer",
    "int[]": "integer[]",
    "timestamptz": "timestamp with time zone",
    "timestamptz[]": "timestamp with time zone[]",
}
GRANTED = """
    SELECT DISTINCT r.rolname FROM pg_roles r, pg_proc p
    WHERE r.rolname ~ '^pgflow_' AND p.pronamespace = 'pgflow_prefect'::regnamespace AND p.proname = %s
      AND has_function_privilege(r.oid, p.oid, 'EXECUTE')
"""
OBJECTS = """
    SELECT relname FROM pg_class WHERE relnamespace = 'pgflow'::regnamespace AND relkind IN ('r', 'v', 'p')
    UNION SELECT proname FROM pg_proc WHERE pronamespace = 'pgflow'::regnamespace
"""

FORMS = """
    SELECT proname, pg_get_function_identity_arguments(oid) || ' -> ' || pg_get_function_result(oid) FROM pg_proc
    WHERE pronamespace = 'pgflow_prefect'::regnamespace
"""
INTERNAL = {
    "apply_binding",
    "begin_binding",
    "change_binding",
    "check_function",
    "check_payload",
    "choose_items",
    "choose_runs",
    "claim_installation",
    "current_stamp",
    "describe_end",
    "describe_failure",
    "describe_step",
    "does_step",
    "end_messages",
    "exhaust_task",
    "find_column",
    "find_definition_id",
    "find_due",
    "find_free",
    "find_functions",
    "find_json_problem",
    "find_lost_messages",
    "find_next_due",
    "find_queue",
    "find_worker",
    "give_sign_of_life",
    "grant_queue",
    "guard_steps",
    "guard_tasks",
    "has_step_triggers",
    "how_held",
    "is_awaited",
    "is_claimed",
    "is_given_up",
    "is_leased",
    "is_others",
    "is_same_stamp",
    "is_stale",
    "keep_claimed",
    "lock_moves",
    "may_execute",
    "move_step",
    "move_step_back",
    "needs_guard",
    "note_flow_run",
    "put_back",
    "put_in",
    "read_item",
    "read_output",
    "read_outputs",
    "refuse_forbidden",
    "refuse_policies",
    "refuse_step_queues",
    "report_items",
    "return_message",
    "set_aside",
    "shorten",
    "stop_edge_workers",
    "sweep_step",
    "take_again",
    "take_new_tasks",
    "take_out",
}

SHOWN_TO_PEOPLE = {
    "airflow/operators.py": "a note on an imported task says how to start a run in SQL",
    "cli/demo.py": "the demo prints the statements that a person would type",
    "database/definition_script.py": "`export` writes the SQL that defines a workflow",
    "database/implementations/classic.py": "messages say where to insert a workflow, and how to start a run in SQL",
    "database/schema.py": "a message says what a database of another program has not",
    "definitions/graph.py": "a message says where to insert steps",
    "deployment/diagnosis/database.py": "`doctor` shows the commands that enable triggers",
    "execution/reporting/artifacts.py": "an artifact says in which table its run is",
}
"""The files of the package that name objects of the schema `pgflow` in text for people, and why."""

PACKAGE = Path(pgflow_prefect.__file__).parent
DESCRIBED = {each.name: each for each in read_document()}
CLASSIC = {name: each for name, each in DESCRIBED.items() if not each.only_released}
ONLY_RELEASED = {name: each for name, each in DESCRIBED.items() if each.only_released}


def test_every_function_that_python_calls_is_described_and_no_other() -> None:
    assert sorted(DESCRIBED) == sorted(list_called())
    assert len(DESCRIBED) == len(read_document()), "each once"


@pytest.mark.parametrize("name", sorted(CLASSIC))
def test_a_described_function_exists_with_its_arguments_and_the_rights_of_its_caller(
    name: str, shared_db: Connection
) -> None:
    check_function(CLASSIC[name], shared_db)


def test_the_functions_of_the_released_schema_alone_exist_like_the_others(released: ReleasedWorld) -> None:
    for described in ONLY_RELEASED.values():
        check_function(described, released.db)


def check_function(described: Described, db: Connection) -> None:
    """Check that a function is as the page describes it."""
    found = db.execute(FUNCTION, [described.name]).fetchall()
    assert len(found) == 1, "one function of this name"
    [(names, types, is_definer, only_reads, is_strict)] = found
    expected = [argument.split(" ", 1) for argument in described.arguments]
    assert (names or []) == [argument for argument, _ in expected]
    assert types == [TYPES.get(written, written) for _, written in expected]
    assert not is_definer
    if only_reads:
        assert described.locks == ""
        assert is_strict, "it raises an error where rows are hidden"


def test_the_roles_may_call_what_the_page_says(server_dsn: str, dsn: str, db: Connection) -> None:
    with borrowed_roles(server_dsn, dsn):
        run_script(db, "api")
        run_script(db, "roles")
        granted = {name: sorted(map(str, column(db, GRANTED, name))) for name in CLASSIC}
    described = {
        name: sorted(f"pgflow_{role}" for role in each.who if role != "owner") for name, each in CLASSIC.items()
    }
    assert granted == described


@pytest.mark.parametrize("name", sorted(list_statements()))
def test_a_statement_calls_functions_of_our_schema_only(name: str) -> None:
    statement = re.sub(r"--[^\n]*", "", list_statements()[name])
    assert re.findall(r"\bpgflow(?:_api)?\s*\.\s*\w+", statement) == []
    assert re.findall(r"\bpgflow_prefect\s*\.\s*\w+\b(?!\s*\()", statement) == [], "tables and views are not for Python"


def test_only_text_for_people_names_what_is_in_the_schema_pgflow(shared_db: Connection) -> None:
    objects = "|".join(map(str, column(shared_db, OBJECTS)))
    named = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for text in _list_texts(path)
        if re.search(rf"\bpgflow\.(?:{objects})\b", text)
    }
    assert named == set(SHOWN_TO_PEOPLE)


def _list_texts(path: Path) -> Iterator[str]:
    """Yield the string constants of a module that are no docstrings: statements and messages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_the_released_implementation_has_the_functions_that_the_page_names(
    released: ReleasedWorld, shared_db: Connection
) -> None:
    section = shipped_path("sql", "CONTRACT.md").read_text(encoding="utf-8").split("## What `released/` has so far")[1]
    named = set(re.findall(r"`(\w+)`[,.]", section))
    ours = {str(name): str(form) for name, form in released.db.execute(FORMS)}
    assert ours.keys() - INTERNAL - ONLY_RELEASED.keys() == named
    classic = {(str(name), str(form)) for name, form in shared_db.execute(FORMS)}  # former forms among them
    assert {(name, ours[name]) for name in named} - classic == set()
