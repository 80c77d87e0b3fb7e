"""What each hot function of the contract reads grows neither with its run nor with the number of runs.

A session keeps the plans that it made while the tables were empty, and statistics lag behind a growing table. So the
plans here are made on small runs, and then used on a large one beside many others.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import LiteralString, NamedTuple
from uuid import uuid4

import pytest
from psycopg.rows import dict_row

from pgflow_prefect.database.queries import QUERIES
from tests.conftest import Connect, Connection
from tests.contract.document import read_document
from tests.engine import define, run_workflow, value

SMALL = {"one": [], "next": ["one"], "other": []}
LARGE = SMALL | {f"step {number}": [] for number in range(1000)}
MOST = 80
"""Rows that a call may read: those of the step, its neighbours, its run and its task run, some several times."""

OTHERS = 5000
MANY_RUNS = """
    SET session_replication_role = replica;
    INSERT INTO pgflow.runs (workflow_slug, id, payload, status, finished_at)
    SELECT CASE WHEN n % 10 = 0 THEN 'large' ELSE 'small' END, gen_random_uuid(), '{}',
           CASE WHEN n % 10 = 0 THEN 'pending' ELSE 'completed' END, now()
    FROM generate_series(1, 5000) n;
    INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug, status, attempts, started_at)
    SELECT r.workflow_slug, r.id, s.slug, r.status, 1, now()
    FROM pgflow.runs r JOIN pgflow.steps s ON s.workflow_slug = 'small' ON CONFLICT DO NOTHING;
    INSERT INTO pgflow_prefect.owners (run_id, epoch, held_by, lease_until)
    SELECT id, 0, 'another process', 'infinity' FROM pgflow.runs ON CONFLICT DO NOTHING;
    INSERT INTO pgflow_prefect.task_runs (run_id, step_slug, task_run_id, state_name, attempt)
    SELECT run_id, step_slug, run_id, 'Completed', 1 FROM pgflow.step_states ON CONFLICT DO NOTHING;
    SET session_replication_role = origin
"""
"""Rows of runs that another process has taken."""

ROWS_READ = """
    SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint FROM pg_stat_xact_user_tables
    WHERE schemaname IN ('pgflow', 'pgflow_prefect')
"""
HOLDER = {"held_by": "the tests", "lease": 60, "max_recoveries": 3, "holder": None}


class Call(NamedTuple):
    """A call of a hot function: a statement of Python's by its name, or SQL where it is a part of one."""

    statement: str
    parameters: Mapping[str, object]


class HeldRun:
    """A run that this test owns, so that each hot function can be called on it."""

    def __init__(self, db: Connection, workflow: str) -> None:
        self.db = db
        self.workflow = workflow
        self.run_id = run_workflow(db, workflow, {}).id
        taken = self.ask("take_run", flow_run_id=uuid4(), force=False, **HOLDER)
        self.epoch = taken["epoch"]

    def ask(self, statement: str, **parameters: object) -> dict[str, object]:
        with self.db.cursor(row_factory=dict_row) as cursor:
            cursor.execute(_find(statement).encode(), self.fill(parameters))
            row = cursor.fetchone()
        assert row is not None
        return row

    def fill(self, parameters: Mapping[str, object]) -> Mapping[str, object]:
        """Return the parameters of a statement about this run; those that the caller does not name are NULL."""
        known = {"run_id": self.run_id, "task_index": 0, "task_run_id": self.run_id}
        return defaultdict(lambda: None, known | {"epoch": getattr(self, "epoch", None)} | dict(parameters))

    def claim(self, step: str, bound: str = "python") -> object:
        """Claim a step, and return which attempt it is."""
        wanted = {"with_payload": True, "bound": bound, "has_function": True, "handler": bound}
        return self.ask("claim_step", step_slug=step, **wanted)["attempt"]


def claim_step(run: HeldRun) -> Call:
    wanted = {"with_payload": True, "bound": "python", "has_function": True, "handler": "python"}
    return Call("claim_step", {"step_slug": "one", **wanted})


def complete_step(run: HeldRun) -> Call:
    return Call("complete_step", {"step_slug": "one", "attempt": run.claim("one"), "result": "1"})


def complete_pending_step(run: HeldRun) -> Call:
    return Call("complete_pending_step", {"step_slug": "one", "attempt": run.claim("one"), "result": "1"})


def perform_tasks(run: HeldRun) -> Call:
    task = {"run_id": str(run.run_id), "epoch": run.epoch, "task_index": 0, "task_run_id": str(run.run_id)}
    completion = {"do": "complete", "step_slug": "one", "result": 1, "attempt": run.claim("one")}
    claim = {"do": "claim", "step_slug": "next", "with_payload": True, "bound": "python", "has_function": True}
    return Call("perform_tasks", {"elements": json.dumps([task | completion, task | claim | {"handler": "python"}])})


def fail_step(run: HeldRun) -> Call:
    attempt = run.claim("one")
    return Call(
        "fail_step", {"step_slug": "one", "attempt": attempt, "error_message": "broken", "state_name": "Failed"}
    )


def note_state(run: HeldRun) -> Call:
    run.claim("one")
    return Call("note_state", {"step_slug": "one", "state_name": "AwaitingRetry", "message": "not yet"})


def lock_run(run: HeldRun) -> Call:
    return Call("SELECT pgflow_prefect.lock_run(%(run_id)s)", {})


def hold_map(run: HeldRun) -> dict[str, object]:
    """Begin a run of a map beside this one, claim an item of it, and return the parameters that name that."""
    workflow = f"{run.workflow} map"
    run.db.execute("INSERT INTO pgflow.workflows VALUES (%s) ON CONFLICT DO NOTHING", [workflow])
    run.db.execute(
        "INSERT INTO pgflow.steps (workflow_slug, slug, step_type) VALUES (%s, 'rows', 'map') ON CONFLICT DO NOTHING",
        [workflow],
    )
    run_id = run_workflow(run.db, workflow, [*range(1000 if run.workflow == "large" else 5)]).id
    epoch = value(run.db, "SELECT pgflow.take_run(%s)", run_id)
    run.db.execute("SELECT pgflow.claim_items(%s, 'rows', 2, %s)", [run_id, epoch])
    return {"run_id": run_id, "epoch": epoch, "step_slug": "rows"}


def work_items(run: HeldRun) -> Call:
    reports = [{"do": "complete", "item_index": 0, "attempt": 1, "result": 1}, {"do": "retry", "item_index": 1}]
    return Call("work_items", hold_map(run) | {"reports": json.dumps(reports), "wanted": 2})


def complete_pending_items(run: HeldRun) -> Call:
    return Call("complete_pending_items", hold_map(run) | {"item_indexes": [0], "attempts": [1], "result": "[1]"})


def find_item_handover(run: HeldRun) -> Call:
    return Call("find_item_handover", hold_map(run) | {"item_index": 0, "attempt": 1})


def report_item(run: HeldRun) -> Call:
    return Call("report_item", hold_map(run) | {"item_index": 0, "attempt": 1, "result": "1"})


def watch_steps(run: HeldRun) -> Call:
    run.claim("one", "external")
    awaited = {"step_slugs": ["one"], "task_indexes": [0], "epochs": [run.epoch], "bound": ["external"]}
    ours = {"run_ids": [run.run_id], "task_run_ids": [run.run_id], "have_function": [False]}
    return Call("watch_steps", awaited | ours)


def check_result(run: HeldRun) -> Call:
    return Call("SELECT pgflow_prefect.check_result('{}')", {})


def find_handover(run: HeldRun) -> Call:
    return Call("find_handover", {"step_slug": "one", "attempt": run.claim("one", "queue")})


def report_completion(run: HeldRun) -> Call:
    return Call("report_completion", {"step_slug": "one", "attempt": run.claim("one", "queue"), "result": "1"})


def report_failure(run: HeldRun) -> Call:
    attempt = run.claim("one", "queue")
    return Call("report_failure", {"step_slug": "one", "attempt": attempt, "error_message": "broken"})


def take_runs(run: HeldRun) -> Call:
    run.ask("enable_workflow", workflow_slug="waiting", enabled=True)
    run_workflow(run.db, "waiting", {})  # it looks at the free runs of a workflow, the oldest first
    return Call("take_runs", {"workflow_slugs": ["waiting"], "wanted": 1, "adopt": True, "expired": False, **HOLDER})


def extend_leases(run: HeldRun) -> Call:
    return Call("extend_leases", {"run_ids": [run.run_id], "epochs": [run.epoch], "lease": 60})


def advance_backfills(run: HeldRun) -> Call:
    hours = "ARRAY(SELECT '2026-01-01'::timestamptz + n * interval '1 hour' FROM generate_series(1, 500) n)"
    run.db.execute(f"SELECT pgflow.start_backfill(%s, {hours})".encode(), [run.workflow])
    return Call("advance_backfills", {"at_most": 1})


def move_children(run: HeldRun) -> Call:
    run.db.execute("INSERT INTO pgflow.child_requests (run_id) VALUES (gen_random_uuid())")
    return Call("move_children", {"at_most": 1})


CALLS: Mapping[str, Callable[[HeldRun], Call]] = {
    each.__name__: each
    for each in (
        *(claim_step, complete_step, complete_pending_step, perform_tasks, fail_step, note_state, lock_run),
        *(
            work_items,
            complete_pending_items,
            find_item_handover,
            report_item,
            watch_steps,
            check_result,
            find_handover,
            report_completion,
            report_failure,
            take_runs,
            extend_leases,
        ),
        advance_backfills,
        move_children,
    )
}


def test_every_hot_function_is_called_here() -> None:
    assert {each.name for each in read_document() if each.is_hot and not each.only_released} == CALLS.keys()


MAINTENANCE = (
    *("SELECT", "ANALYZE", "ANALYZE pgflow.runs", "ANALYZE pgflow.step_states", "ANALYZE pgflow_prefect.owners"),
    *("ANALYZE pgflow_prefect.task_runs", "VACUUM pgflow.runs", "VACUUM ANALYZE pgflow.step_states"),
    *("VACUUM pgflow_prefect.owners", "VACUUM pgflow_prefect.task_runs"),
)
"""Autovacuum may have looked at none of the tables, at one, or at all of them."""


@pytest.mark.thorough
@pytest.mark.parametrize("maintain", MAINTENANCE)
@pytest.mark.parametrize("moment", ["small", "growing", "large"])
def test_a_hot_function_reads_what_its_own_step_takes(
    db: Connection, connect: Connect, maintain: LiteralString, moment: str
) -> None:
    define(db, "small", SMALL)
    define(db, "waiting", SMALL)
    define(db, "large", LARGE)
    for number in range(7):  # a plan for any parameters is made at the sixth time
        for make in CALLS.values():
            count_rows_read(run := HeldRun(db, "small"), make(run))
        if number == 0:
            db.execute(maintain if moment == "small" else "ANALYZE")
    other = connect()
    with db.transaction():
        db.execute(MANY_RUNS)
        if moment == "growing":  # the statistics tell of large tables that have next to no rows
            other.execute(maintain)
    if moment == "large":
        db.execute(maintain)
    read = {
        (name, workflow): count_rows_read(run := HeldRun(db, workflow), make(run))
        for name, make in CALLS.items()
        for workflow in ("small", "large")
    }
    assert {call: rows for call, rows in read.items() if rows >= MOST} == {}


def test_a_look_up_by_key_stays_one_however_the_planner_would_like_to_join(db: Connection) -> None:
    define(db, "small", SMALL)
    define(db, "waiting", SMALL)
    db.execute(MANY_RUNS.replace("'large'", "'waiting'"))
    db.execute("ANALYZE")
    db.execute("SET enable_nestloop = off")  # wrong statistics make it choose so, too
    read = {
        make.__name__: count_rows_read(run := HeldRun(db, "small"), make(run))
        for make in (watch_steps, find_handover, extend_leases)
    }
    assert {call: rows for call, rows in read.items() if rows >= MOST} == {}


def count_rows_read(run: HeldRun, call: Call) -> int:
    """Make a call, and return the rows that its statements have read."""

    def count() -> int:
        return int(str(value(run.db, ROWS_READ)))

    with run.db.transaction():  # within one, the statistics are not handed on
        before = count()
        run.db.execute(_find(call.statement).encode(), run.fill(call.parameters))
        return count() - before


def _find(statement: str) -> str:
    return QUERIES.get(statement, statement)


def test_the_count_sees_a_read_of_all_runs(db: Connection) -> None:
    define(db, "small", SMALL)
    define(db, "large", LARGE)
    run = HeldRun(db, "small")
    db.execute(MANY_RUNS)
    assert count_rows_read(run, Call("SELECT count(*) FROM pgflow.step_states WHERE status <> 'x'", {})) >= OTHERS
