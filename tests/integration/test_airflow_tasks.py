"""Tasks of Airflow ask who does them: at each moment one side has a step, whatever rows say meanwhile."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, LiteralString
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.conftest import Connect, Connection
from tests.engine import (
    complete,
    define,
    fail,
    get_run,
    get_state,
    refused,
    reopen,
    statuses,
    value,
    wait_until_blocked,
)
from tests.integration.supabase import DENIED, become, create_role
from tests.integration.test_external_claims import bind, claim_for_prefect

FUNCTIONS = ("claim_airflow_task", "watch_airflow_tasks", "end_airflow_task")
STEPS = {"a": [], "b": ["a"], "c": ["b"]}


@pytest.fixture
def dag(db: Connection) -> str:
    """A DAG that is observed, and whose tasks ask."""
    define(db, "dag", STEPS)
    db.execute("SELECT pgflow_prefect.observe_workflow('dag')")
    db.execute("SELECT pgflow_prefect.name_airflow_dags('{dag}')")
    return "dag"


@pytest.fixture
def run_id(dag: str) -> UUID:
    """The id of the run that the first question starts."""
    return uuid4()


@pytest.fixture
def airflow(db: Connection, connect: Connect) -> Iterator[Connection]:
    """A login that may execute the three functions, and nothing else."""
    name = create_role(db)
    db.execute(f"GRANT USAGE ON SCHEMA pgflow_prefect TO {name}".encode())
    for function in FUNCTIONS:
        db.execute(f"GRANT EXECUTE ON FUNCTION pgflow_prefect.{function} TO {name}".encode())
    yield become(connect(), name)
    db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


def ask(db: Connection, run_id: UUID, task: str, attempt: int = 1, dag: str = "dag") -> dict[str, Any]:
    """Ask as a try of a task does, and return the answer's columns."""
    statement: LiteralString = """
        SELECT to_jsonb(c) FROM pgflow_prefect.claim_airflow_task(%s, %s, %s, %s, '{"conf": {}}', NULL, NULL, NULL) c
    """
    [[found]] = db.execute(statement, [dag, task, attempt, run_id]).fetchall()
    assert isinstance(found, dict)
    return found


def answer(db: Connection, run_id: UUID, task: str, attempt: int = 1) -> object:
    return ask(db, run_id, task, attempt)["answer"]


def end(
    db: Connection,
    run_id: UUID,
    task: str,
    outcome: str = "completed",
    result: object = None,
    *,
    attempt: int = 1,
    taken: list[str] | None = None,
) -> object:
    statement = "SELECT pgflow_prefect.end_airflow_task(%s, %s, %s, %s, %s, 'so it is', %s, false)"
    return value(db, statement, run_id, task, attempt, outcome, json.dumps(result), taken)


def is_over(db: Connection, run_id: UUID, task: str, attempt: int = 1) -> bool:
    """Tell whether a waiting task is to ask again."""
    statement: LiteralString = "SELECT pgflow_prefect.watch_airflow_tasks(ARRAY[%s]::uuid[], ARRAY[%s], ARRAY[%s])"
    return db.execute(statement, [run_id, task, attempt]).fetchall() == [(1,)]


def test_airflow_does_a_step_that_no_row_has_moved(run_id: UUID, db: Connection, airflow: Connection) -> None:
    assert ask(airflow, run_id, "a") | {"waited": None} == {
        "answer": "airflow", "result": None, "message": None, "taken": None, "moved": [], "waited": None,
    }  # fmt: skip
    assert get_run(db, run_id).payload == {"conf": {}}
    assert end(airflow, run_id, "a", result=[1]) is True
    assert get_state(db, run_id, "a").step_result == [1]
    assert statuses(db, run_id) == {"a": "completed", "b": "pending"}


def test_a_moved_step_waits_and_ends_as_it_ended_here(run_id: UUID, db: Connection, airflow: Connection) -> None:
    bind(db, "dag", "a", "python")
    assert ask(airflow, run_id, "a")["answer"] == "wait"
    assert ask(airflow, run_id, "a")["moved"] == ["a"]
    assert not is_over(airflow, run_id, "a")
    assert claim_for_prefect(db, run_id, "a") == ("pending", 1, False)
    assert not is_over(airflow, run_id, "a")
    complete(db, run_id, "a", 12345678901234567890)
    assert is_over(airflow, run_id, "a")
    assert ask(airflow, run_id, "a")["result"] == "12345678901234567890"
    assert ask(airflow, run_id, "a", attempt=2)["answer"] == "completed", "a clear gets what is stored"


def test_a_moved_step_that_fails_here_fails_there(run_id: UUID, db: Connection, airflow: Connection) -> None:
    bind(db, "dag", "a", "python")
    assert answer(airflow, run_id, "a") == "wait"
    claim_for_prefect(db, run_id, "a")
    fail(db, run_id, "a", "no such customer")
    assert is_over(airflow, run_id, "a")
    found = ask(airflow, run_id, "a")
    assert (found["answer"], found["message"]) == ("failed", "no such customer")
    reopen(db, run_id)
    assert answer(airflow, run_id, "a", attempt=2) == "wait"


def test_a_moved_step_that_is_skipped_here_is_skipped_there(run_id: UUID, db: Connection, airflow: Connection) -> None:
    bind(db, "dag", "a", "python")
    assert answer(airflow, run_id, "a") == "wait"
    db.execute("SELECT pgflow.skip_step(%s, 'a', 'a holiday')", [run_id])
    found = ask(airflow, run_id, "a")
    assert (found["answer"], found["message"]) == ("skipped", "a holiday")


def test_a_row_that_is_flipped_while_airflow_executes_counts_from_the_next_try(
    run_id: UUID, db: Connection, airflow: Connection
) -> None:
    assert answer(airflow, run_id, "a") == "airflow"
    bind(db, "dag", "a", "python")
    assert claim_for_prefect(db, run_id, "a")[2] is True, "a worker here waits"
    assert answer(airflow, run_id, "a") == "airflow", "a sensor that looks again has it still"
    assert answer(airflow, run_id, "a", attempt=2) == "wait", "its process was killed"
    assert answer(airflow, run_id, "a") == "stale", "it was not"
    assert claim_for_prefect(db, run_id, "a") == ("pending", 2, False)
    assert end(airflow, run_id, "a", result="late") is False, "the report of the former process"


def test_a_step_goes_back_to_airflow_while_that_waits(run_id: UUID, db: Connection, airflow: Connection) -> None:
    bind(db, "dag", "a", "python")
    assert answer(airflow, run_id, "a") == "wait"
    db.execute("SELECT pgflow_prefect.undo_binding('dag', 'a')")
    assert is_over(airflow, run_id, "a")
    assert answer(airflow, run_id, "a") == "airflow"
    assert claim_for_prefect(db, run_id, "a", "external")[2] is True


def test_a_step_that_a_worker_has_begun_stays_here_after_an_undo(
    run_id: UUID, db: Connection, airflow: Connection
) -> None:
    bind(db, "dag", "a", "python")
    assert answer(airflow, run_id, "a") == "wait"
    claim_for_prefect(db, run_id, "a")
    db.execute("SELECT pgflow_prefect.undo_binding('dag', 'a')")
    assert not is_over(airflow, run_id, "a")
    complete(db, run_id, "a", "ours")
    assert ask(airflow, run_id, "a")["result"] == '"ours"', "it is not executed there as well"


def test_airflow_begins_before_the_ends_above_are_reported(run_id: UUID, db: Connection, airflow: Connection) -> None:
    assert answer(airflow, run_id, "b") == "airflow"
    bind(db, "dag", "b", "python")
    assert answer(airflow, run_id, "a") == "airflow"
    assert end(airflow, run_id, "a") is True
    assert claim_for_prefect(db, run_id, "b")[2] is True, "what Airflow executes is not executed here"
    assert end(airflow, run_id, "b", result=2) is True
    assert get_state(db, run_id, "c").status == "pending"


@pytest.mark.parametrize("first", ["airflow", "mirror"])
def test_the_first_report_of_a_step_counts(first: str, run_id: UUID, db: Connection, airflow: Connection) -> None:
    assert answer(airflow, run_id, "a") == "airflow"
    if first == "airflow":
        assert end(airflow, run_id, "a", result=1) is True
        complete(db, run_id, "a", 2)
    else:
        complete(db, run_id, "a", 1)
        assert end(airflow, run_id, "a", result=2) is False
    assert get_state(db, run_id, "a").step_result == 1


def test_a_task_of_airflows_that_is_cleared_is_executed_there_again(
    run_id: UUID, db: Connection, airflow: Connection
) -> None:
    assert answer(airflow, run_id, "a") == "airflow"
    end(airflow, run_id, "a", result=1)
    assert answer(airflow, run_id, "a", attempt=2) == "airflow"


def test_a_branch_that_airflow_takes_skips_the_others_here(db: Connection, dag: str, airflow: Connection) -> None:
    db.execute("INSERT INTO pgflow.steps (workflow_slug, slug) VALUES ('dag', 'other')")
    db.execute("INSERT INTO pgflow.deps VALUES ('dag', 'a', 'other')")
    run_id = uuid4()
    assert answer(airflow, run_id, "a") == "airflow"
    assert end(airflow, run_id, "a", result="b", taken=["b"]) is True
    assert get_state(db, run_id, "other").skip_reason == "branch_not_taken"
    assert get_state(db, run_id, "b").status == "pending"


def test_a_branch_that_is_taken_here_is_told_to_airflow(db: Connection, dag: str, airflow: Connection) -> None:
    db.execute("INSERT INTO pgflow.steps (workflow_slug, slug) VALUES ('dag', 'other')")
    db.execute("INSERT INTO pgflow.deps VALUES ('dag', 'a', 'other')")
    bind(db, "dag", "a", "python")
    run_id = uuid4()
    assert answer(airflow, run_id, "a") == "wait"
    claim_for_prefect(db, run_id, "a")
    db.execute("SELECT pgflow.take_branches(%s, 'a', '{other}')", [run_id])
    assert ask(airflow, run_id, "a")["taken"] == ["other"]


@pytest.mark.parametrize("outcome", ["skipped", "failed"])
def test_airflow_reports_other_ends(outcome: str, run_id: UUID, db: Connection, airflow: Connection) -> None:
    assert answer(airflow, run_id, "a") == "airflow"
    assert end(airflow, run_id, "a", outcome) is True
    state = get_state(db, run_id, "a")
    assert (state.status, state.error_message or state.skip_note) == (
        "failed" if outcome == "failed" else "completed",
        "so it is",
    )


def test_a_task_that_gives_up_fails_a_step_that_no_worker_has_begun(
    run_id: UUID, db: Connection, airflow: Connection
) -> None:
    bind(db, "dag", "b", "python")
    assert answer(airflow, run_id, "b") == "wait"
    assert end(airflow, run_id, "b", "gave-up") is True
    assert get_state(db, run_id, "b").error_message == "so it is"


def test_a_task_that_gives_up_leaves_a_step_that_a_worker_has_begun(
    run_id: UUID, db: Connection, airflow: Connection
) -> None:
    bind(db, "dag", "a", "python")
    assert answer(airflow, run_id, "a") == "wait"
    claim_for_prefect(db, run_id, "a")
    assert end(airflow, run_id, "a", "gave-up") is False
    assert get_state(db, run_id, "a").status == "pending"


def test_a_report_without_a_question_counts_while_the_step_is_airflows(
    run_id: UUID, db: Connection, airflow: Connection
) -> None:
    assert answer(airflow, run_id, "b") == "airflow"
    assert end(airflow, run_id, "a", result=1) is True, "the database was away when the task began"
    bind(db, "dag", "c", "python")
    assert end(airflow, run_id, "c", result=1) is False


def test_runs_that_go_on_ask_after_their_dag_was_removed_and_new_ones_do_not(
    run_id: UUID, db: Connection, airflow: Connection
) -> None:
    bind(db, "dag", "b", "python")
    assert answer(airflow, run_id, "a") == "airflow"
    db.execute("SELECT pgflow_prefect.remove_airflow_dags('{dag}')")
    assert end(airflow, run_id, "a", result=1) is True
    assert answer(airflow, run_id, "b") == "wait", "a worker here does it, as its run began"
    assert not is_over(airflow, run_id, "b")
    new = uuid4()
    assert answer(airflow, new, "b") == "unknown"
    assert end(airflow, new, "b") is False
    assert db.execute("SELECT FROM pgflow.runs WHERE id = %s", [new]).fetchall() == []
    assert db.execute("SELECT pgflow_prefect.name_airflow_dags('{dag}')").fetchall() == [("dag",)]
    assert answer(airflow, new, "b") == "wait"


def test_dags_and_tasks_that_are_not_known_stay_with_airflow(run_id: UUID, db: Connection, airflow: Connection) -> None:
    define(db, "secret", {"a": []})
    for dag in ("gone", "secret"):
        assert ask(airflow, run_id, "a", dag=dag)["answer"] == "unknown"
    assert db.execute("SELECT FROM pgflow.runs").fetchall() == []
    assert answer(airflow, run_id, "new") == "unknown"


def test_a_run_of_another_workflow_is_out_of_reach(db: Connection, dag: str, airflow: Connection) -> None:
    define(db, "secret", {"a": []})
    other = uuid4()
    db.execute("SELECT pgflow.run_workflow('secret', '{}', %s)", [other])
    with refused("22023", "of workflow"):
        ask(airflow, other, "a")
    assert end(airflow, other, "a") is False
    assert statuses(db, other) == {"a": "pending"}


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT FROM pgflow.runs",
        "SELECT FROM pgflow_prefect.bindings",
        "SELECT pgflow_prefect.bind_step('dag', 'a', 'python')",
        "SELECT pgflow_prefect.name_airflow_dags('{secret}')",
        "SELECT pgflow_prefect.remove_airflow_dags('{dag}')",
        "SELECT pgflow_prefect.end_unseen_airflow_task(gen_random_uuid(), 'a', 1, 'completed', NULL, NULL)",
        "SELECT pgflow_prefect.claim_external_step(gen_random_uuid(), 'a')",
    ],
)
def test_airflows_role_can_do_nothing_else(statement: LiteralString, dag: str, airflow: Connection) -> None:
    with refused(DENIED):
        airflow.execute(statement)


def test_no_role_may_ask_by_default(db: Connection, connect: Connect, dag: str, run_id: UUID) -> None:
    stranger = create_role(db)
    try:
        db.execute(f"GRANT USAGE ON SCHEMA pgflow_prefect TO {stranger}".encode())
        with refused(DENIED):
            ask(become(connect(), stranger), run_id, "a")
    finally:
        db.execute(f"DROP OWNED BY {stranger}; DROP ROLE {stranger}".encode())


def test_a_workflow_that_is_not_known_is_not_named(db: Connection) -> None:
    with refused("P0002", "unknown workflow"):
        db.execute("SELECT pgflow_prefect.name_airflow_dags('{gone}')")


def test_a_step_that_is_a_run_of_another_workflow_is_never_airflows(
    run_id: UUID, db: Connection, airflow: Connection
) -> None:
    define(db, "child", {"x": []})
    db.execute("DELETE FROM pgflow_prefect.bindings WHERE step_slug = 'b'")
    db.execute("UPDATE pgflow.steps SET child_workflow = 'child' WHERE slug = 'b'")
    assert answer(airflow, run_id, "a") == "airflow"
    assert end(airflow, run_id, "a") is True
    assert (ask(airflow, run_id, "b")["answer"], ask(airflow, run_id, "b")["moved"]) == ("wait", ["b"])
    assert end(airflow, run_id, "b") is False
    assert get_state(db, run_id, "b").attempts == 1, "the child's end is not dropped"


def test_a_map_stays_with_airflow_while_its_dag_asks(db: Connection, dag: str) -> None:
    db.execute("UPDATE pgflow.steps SET step_type = 'map', map_over = 'a' WHERE slug = 'b'")
    for kind in ("python", None):
        with refused("22023", "stays with Airflow"):
            db.execute("SELECT pgflow_prefect.bind_step('dag', 'b', %s)", [kind])
    with refused("22023", "stays with Airflow"):
        db.execute("SELECT pgflow_prefect.undo_binding('dag', 'b')")
    bind(db, "dag", "b", "external")
    db.execute("DELETE FROM pgflow_prefect.airflow_dags")
    bind(db, "dag", "b", "python")
    with refused("55000", "mapped tasks do not ask"):
        db.execute("SELECT pgflow_prefect.name_airflow_dags('{dag}')")


def test_a_map_stays_with_airflow_while_a_run_from_before_the_removal_goes_on(db: Connection, dag: str) -> None:
    db.execute("UPDATE pgflow.steps SET step_type = 'map', map_over = 'a' WHERE slug = 'b'")
    run = value(db, """SELECT id FROM pgflow.run_workflow('dag', '{"airflow_run_id": "run 1"}')""")
    db.execute("SELECT pgflow_prefect.remove_airflow_dags('{dag}')")
    with refused("22023", "stays with Airflow"):
        db.execute("SELECT pgflow_prefect.bind_step('dag', 'b', 'python')")
    db.execute("SELECT pgflow.cancel_run(%s, 'no more')", [run])
    db.execute("SELECT pgflow_prefect.bind_step('dag', 'b', 'python')")


def test_a_first_question_beside_the_removal_of_its_dag_begins_no_run(
    dag: str, run_id: UUID, db: Connection, connect: Connect
) -> None:
    remover, asker = connect(), connect()
    with ThreadPoolExecutor(1) as pool:
        with remover.transaction():
            remover.execute("SELECT pgflow_prefect.remove_airflow_dags('{dag}')")
            asked = pool.submit(answer, asker, run_id, "a")
            wait_until_blocked(db, asker.info.backend_pid)
        assert asked.result() == "unknown"
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 0


def test_a_binding_needs_no_table_of_airflows(db: Connection, dag: str) -> None:
    db.execute("UPDATE pgflow.steps SET step_type = 'map', map_over = 'a' WHERE slug = 'b'")
    db.execute("DROP TABLE pgflow_prefect.airflow_dags CASCADE")
    bind(db, "dag", "b", "python")


def test_of_two_that_claim_at_once_one_has_the_step(dag: str, db: Connection, dsn: str) -> None:
    """The row changes while both sides claim. Either Airflow has the step, or the worker here has it."""
    for _ in range(20):
        run_id = uuid4()
        db.execute("SELECT pgflow_prefect.bind_step('dag', 'a', 'external')")
        db.execute("SELECT pgflow.run_workflow('dag', '{}', %s)", [run_id])
        at_once = Barrier(3)

        def flip(at_once: Barrier = at_once) -> None:
            with psycopg.connect(dsn, autocommit=True) as connection:
                at_once.wait(60)
                bind(connection, "dag", "a", "python")

        def ask_there(run_id: UUID = run_id, at_once: Barrier = at_once) -> bool:
            with psycopg.connect(dsn, autocommit=True) as connection:
                at_once.wait(60)
                return answer(connection, run_id, "a") == "airflow"

        def claim_here(run_id: UUID = run_id, at_once: Barrier = at_once) -> bool:
            with psycopg.connect(dsn, autocommit=True) as connection:
                at_once.wait(60)
                kind = "SELECT kind FROM pgflow_prefect.bindings WHERE step_slug = 'a'"
                return claim_for_prefect(connection, run_id, "a", str(value(connection, kind)))[2] is False

        with ThreadPoolExecutor(3) as pool:
            flips, there, here = pool.submit(flip), pool.submit(ask_there), pool.submit(claim_here)
            flips.result()
            assert not (there.result() and here.result())
        if not there.result():
            assert answer(db, run_id, "a") == "wait"
