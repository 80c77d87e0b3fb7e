"""`perform_tasks`: completions, failures and claims of several runs in one statement."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.conftest import Connect, Connection
from tests.engine import define, run_workflow, value, wait_until_blocked

GRAPH = {"a": [], "b": ["a"]}

ROWS_READ = """
    SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint FROM pg_stat_xact_user_tables
    WHERE schemaname IN ('pgflow', 'pgflow_prefect')
"""


@pytest.fixture(autouse=True)
def workflow(db: Connection) -> None:
    define(db, "chain", GRAPH)


def start(db: Connection) -> UUID:
    run_id: UUID = run_workflow(db, "chain", {"n": 1}).id
    return run_id


def claim(run_id: UUID, step: str = "a", **other: object) -> dict[str, object]:
    element = {"do": "claim", "run_id": str(run_id), "epoch": 0, "step_slug": step, "task_index": 0}
    asked = {"task_run_id": str(uuid4()), "with_payload": True, "bound": "python", "has_function": True}
    return element | asked | other


def complete(run_id: UUID, step: str = "a", **other: object) -> dict[str, object]:
    element = {"do": "complete", "run_id": str(run_id), "epoch": 0, "step_slug": step, "task_index": 0, "attempt": 1}
    return element | {"task_run_id": str(uuid4()), "result": step} | other


def fail(run_id: UUID, step: str = "a", **other: object) -> dict[str, object]:
    return complete(run_id, step, do="fail", error_message="broken", state_name="Failed") | other


def perform(db: Connection, *elements: dict[str, object]) -> list[dict[str, Any]]:
    cursor = db.execute("SELECT * FROM pgflow_prefect.perform_tasks(%s)", [json.dumps(elements)])
    assert cursor.description is not None
    names = [column.name for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def outcomes(db: Connection, *elements: dict[str, object]) -> list[tuple[str, str | None]]:
    return [(row["outcome"], row["status"]) for row in perform(db, *elements)]


def test_each_element_has_its_row_in_their_order(db: Connection) -> None:
    runs = sorted((start(db) for _ in range(3)), reverse=True)
    rows = perform(db, *map(claim, runs))
    assert [(row["outcome"], row["status"], row["attempt"], row["payload"]) for row in rows] == [
        ("done", "pending", 1, {"n": 1})
    ] * 3
    rows = perform(db, complete(runs[0]), claim(runs[0], "b"), fail(runs[1]), complete(runs[2]), claim(runs[2], "b"))
    assert [(row["outcome"], row["status"], row["upstream_results"], row["error_message"]) for row in rows] == [
        ("done", "completed", None, None),
        ("done", "pending", {"a": "a"}, None),
        ("done", "failed", None, "broken"),
        ("done", "completed", None, None),
        ("done", "pending", {"a": "a"}, None),
    ]


def test_no_elements_have_no_rows(db: Connection) -> None:
    assert perform(db) == []


def test_a_lost_ended_or_deleted_run_does_not_delay_other_runs(db: Connection) -> None:
    lost, ended, gone, good = start(db), start(db), uuid4(), start(db)
    perform(db, claim(lost), claim(good))
    db.execute("SELECT pgflow_prefect.take_run(%s, %s, 'me', 60, 3)", [lost, uuid4()])
    db.execute("SELECT pgflow.cancel_run(%s, 'enough')", [ended])
    rows = perform(
        db, claim(lost), complete(lost), claim(ended), claim(gone), complete(gone), complete(good), claim(good, "b")
    )
    assert [(row["outcome"], row["status"]) for row in rows] == [
        ("superseded", None),
        ("superseded", "pending"),
        ("ended", None),
        ("gone", None),
        ("gone", None),
        ("done", "completed"),
        ("done", "pending"),
    ]
    assert "failed" in rows[2]["error_message"]
    assert str(gone) in rows[3]["error_message"]
    assert value(db, "SELECT stale_writes FROM pgflow_prefect.owners WHERE run_id = %s", lost) == 2


def test_a_completed_step_of_a_run_that_has_ended_is_no_refusal(db: Connection) -> None:
    run, other = start(db), start(db)
    perform(db, claim(run), complete(run), claim(run, "b"))
    assert outcomes(db, complete(run, "b"), claim(run, "b"), claim(other)) == [
        ("done", "completed"), ("done", "completed"), ("done", "pending")
    ]  # fmt: skip


def test_a_locked_run_is_tried_again_alone_and_delays_no_other_run(db: Connection, connect: Connect) -> None:
    held, free = start(db), start(db)
    db.execute("SET lock_timeout = '100ms'")
    holder = connect()
    with holder.transaction():
        holder.execute("SELECT pgflow.lock_run(%s)", [held])
        assert outcomes(db, claim(held), claim(free)) == [("locked", None), ("done", "pending")]
        with pytest.raises(psycopg.errors.LockNotAvailable):
            perform(db, claim(held))
    assert outcomes(db, claim(held)) == [("done", "pending")]


def test_a_batch_of_one_run_waits_for_its_lock(db: Connection, connect: Connect) -> None:
    run, holder, waiting = start(db), connect(), connect()
    with ThreadPoolExecutor(1) as thread:
        with holder.transaction():
            holder.execute("SELECT pgflow.lock_run(%s)", [run])
            claimed = thread.submit(outcomes, waiting, claim(run), claim(run))
            wait_until_blocked(db, waiting.info.backend_pid)
            assert not claimed.done()
        assert claimed.result() == [("done", "pending")] * 2


def test_batches_over_the_same_runs_do_each_element_once(db: Connection, connect: Connect) -> None:
    runs = sorted(start(db) for _ in range(40))
    batches = [runs, runs[::-1], runs[20:] + runs[:20], runs[::2] + runs[1::2]]

    def claim_all(batch: list[UUID]) -> int:
        session, left, locked = connect(), list(batch), 0
        while left:
            found = outcomes(session, *map(claim, left))
            left = [run for run, (outcome, _) in zip(left, found, strict=True) if outcome == "locked"]
            locked += len(left)
            if left:  # by itself it waits
                assert outcomes(session, claim(left.pop(0))) == [("done", "pending")]
        return locked

    with ThreadPoolExecutor(len(batches)) as pool:
        [*pool.map(claim_all, batches)]
    attempts = "SELECT array_agg(DISTINCT attempts) FROM pgflow.step_states WHERE step_slug = 'a'"
    assert value(db, attempts) == [len(batches)]


def test_an_error_of_one_element_undoes_all(db: Connection) -> None:
    run, other = start(db), start(db)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="has not been started"):
        perform(db, claim(run), claim(other, "b"))
    assert value(db, "SELECT sum(attempts) FROM pgflow.step_states") == 0


@pytest.mark.parametrize("element", [{"do": "skip"}, {"do": None}])
def test_an_element_that_says_nothing_known_is_refused(element: dict[str, object], db: Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="complete, fail or claim"):
        perform(db, claim(start(db)) | element)


def rows_read(db: Connection, act: Callable[[], object]) -> int:
    with db.transaction():
        before: Any = value(db, ROWS_READ)
        act()
        after: Any = value(db, ROWS_READ)
        return int(after - before)


@pytest.mark.parametrize("make", [claim, complete], ids=["claims", "completions"])
def test_a_batch_reads_as_many_rows_a_run_whatever_its_size(
    make: Callable[[UUID], dict[str, object]], db: Connection
) -> None:
    for _ in range(8):  # plans for any parameters are made, on a few rows
        run = start(db)
        perform(db, claim(run), complete(run))
    runs = [start(db) for _ in range(220)]
    if make is complete:
        perform(db, *map(claim, runs))
    few = rows_read(db, lambda: perform(db, *map(make, runs[:20])))
    many = rows_read(db, lambda: perform(db, *map(make, runs[20:])))
    assert many / 200 <= few / 20 * 1.2 + 1


REFUSED = [
    "claim_step(%(run)s, 'a', %(index)s, 0, %(run)s, NULL, true, 'python', true, 'x')",
    "complete_step(%(run)s, 'a', %(index)s, '1', 0, 1, %(run)s)",
    "complete_pending_step(%(run)s, 'a', %(index)s, '1', 0, 1, %(run)s)",
    "fail_step(%(run)s, 'a', %(index)s, 'broken', 0, 1, %(run)s, 'Failed')",
    "claim_external_step(%(run)s, 'a', %(index)s, NULL)",
    "report_completion(%(run)s, 'a', %(index)s, '1', 1)",
    "report_failure(%(run)s, 'a', %(index)s, 'broken', 1)",
]


@pytest.mark.parametrize("index", [1, -1, None])
def test_a_plain_step_has_no_other_task_than_the_first(index: int | None, db: Connection) -> None:
    run = start(db)
    perform(db, claim(run))
    for call in REFUSED:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match='step "a" has no task'):
            db.execute(f"SELECT pgflow_prefect.{call}".encode(), {"run": run, "index": index})
    assert value(db, "SELECT status FROM pgflow.step_states WHERE run_id = %s", run) == "pending"
