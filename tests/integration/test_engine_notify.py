"""NOTIFY pgflow_runs: on a run's start and end, and never on a step, for it takes a database-wide lock at commit."""

import json
from uuid import UUID

import pytest

from tests.conftest import Connect, Connection
from tests.engine import (
    CHAIN,
    DIAMOND,
    cancel,
    claim,
    complete,
    define,
    fail,
    finish,
    insert_run,
    reopen,
    repair,
    run_workflow,
    start_run,
    start_step,
    take,
)


class Listener:
    """Hears what is announced; a notification is there as soon as a statement that follows its commit is through."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        connection.execute("LISTEN pgflow_runs")

    def heard(self) -> list[tuple[UUID, str]]:
        """Return the runs and statuses announced since the last call."""
        self.connection.execute("SELECT")
        payloads = [json.loads(notify.payload) for notify in self.connection.notifies(timeout=0)]
        return [(UUID(payload["run_id"]), payload["status"]) for payload in payloads]


@pytest.fixture
def listener(connect: Connect) -> Listener:
    return Listener(connect())


def test_a_runs_start_and_end_are_announced_and_no_step(db: Connection, listener: Listener) -> None:
    run_id = start_run(db, "diamond", DIAMOND)
    assert listener.heard() == [(run_id, "pending")]
    for step in "abc":
        start_step(db, run_id, step)
        claim(db, run_id, step)
        complete(db, run_id, step)
    take(db, run_id)
    assert listener.heard() == []
    complete(db, run_id, "d")
    assert listener.heard() == [(run_id, "completed")]


def test_a_failure_is_announced_once(db: Connection, listener: Listener) -> None:
    run_id = start_run(db, "pair", {"a": [], "b": []})
    listener.heard()
    fail(db, run_id, "a")
    assert listener.heard() == [(run_id, "failed")]
    fail(db, run_id, "b")
    cancel(db, run_id)
    assert listener.heard() == []


def test_cancelling_and_reopening_are_announced(db: Connection, listener: Listener) -> None:
    run_id = start_run(db, "chain", CHAIN)
    listener.heard()
    cancel(db, run_id)
    reopen(db, run_id)
    reopen(db, run_id)
    assert listener.heard() == [(run_id, "failed"), (run_id, "pending")]


def test_the_same_run_started_again_is_not_announced_again(db: Connection, listener: Listener) -> None:
    run_id = start_run(db, "chain", CHAIN)
    listener.heard()
    run_workflow(db, "chain", run_id=run_id)
    assert listener.heard() == []


def test_a_run_that_is_rolled_back_is_not_announced(db: Connection, listener: Listener) -> None:
    define(db, "chain", CHAIN)
    with db.transaction(force_rollback=True):
        finish(db, run_workflow(db, "chain").id)
    assert listener.heard() == []


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_a_run_that_a_repair_ends_is_announced(db: Connection, listener: Listener, status: str) -> None:
    run_id = start_run(db, "chain", {"a": []})
    listener.heard()
    db.execute("UPDATE pgflow.step_states SET status = %s", [status])
    repair(db, run_id)
    assert listener.heard() == [(run_id, status)]


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_so_is_a_run_inserted_by_hand_that_has_ended_already(db: Connection, listener: Listener, status: str) -> None:
    define(db, "chain", {"a": []})
    run_id = insert_run(db, "chain")
    db.execute("INSERT INTO pgflow.step_states VALUES ('chain', %s, 'a', %s)", [run_id, status])
    repair(db, run_id)
    assert listener.heard() == [(run_id, status)]
