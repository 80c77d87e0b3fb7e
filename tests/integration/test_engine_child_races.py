"""Parents and children that several sessions move at once: no deadlock, nothing lost, nothing stuck."""

import random
from collections.abc import Callable
from threading import Thread
from uuid import UUID

import psycopg
import pytest

from tests.conftest import Connection
from tests.engine import column, define, run_workflow, value
from tests.integration.test_engine_children import move
from tests.integration.test_engine_outcomes import say

SESSIONS, ACTIONS, PARENTS = 4, 50, 8
EXPECTED = {"55000", "P0002"}  # another session was faster

PENDING = (
    "SELECT run_id, step_slug FROM pgflow.step_states WHERE status = 'pending' AND step_slug IN ('ask', 'pay', 'tell')"
)
REPORTS = {
    "complete": "SELECT pgflow.complete_step(%s, %s, '1')",
    "fail": "SELECT pgflow.fail_step(%s, %s, 'no')",
}
KINDS = [*["complete"] * 3, *["fail"] * 2, *["cancel"] * 2, *["reopen"] * 3, "move", "repair"]


def act(db: Connection, chance: random.Random) -> None:
    """Do one thing to any run."""
    [runs, pending] = column(db, "SELECT id FROM pgflow.runs ORDER BY id"), db.execute(PENDING).fetchall()
    kind = chance.choice(KINDS)
    run = chance.choice(runs)
    if kind in REPORTS:
        if pending:
            db.execute(REPORTS[kind].encode(), chance.choice(pending))
    elif kind == "move":
        db.execute("SELECT pgflow.move_children()")
    elif kind in {"cancel", "reopen", "repair"}:
        db.execute(f"SELECT pgflow.{kind}_run(%s)".encode(), [run])


def work(db: Connection, seed: int, problems: list[str]) -> None:
    chance = random.Random(seed)  # noqa: S311  no secret
    for _ in range(ACTIONS):
        try:
            act(db, chance)
        except psycopg.Error as error:
            if error.sqlstate not in EXPECTED:
                problems.append(f"{error.sqlstate}: {error}")


def bring_to_an_end(db: Connection, parents: list[UUID]) -> None:
    """Reopen what failed, and complete what is pending, until all parents are completed."""
    for _ in range(100):
        for parent in parents:
            if value(db, "SELECT status FROM pgflow.runs WHERE id = %s", parent) == "failed":
                db.execute("SELECT pgflow.reopen_run(%s)", [parent])
        move(db)
        for step in db.execute(f"{PENDING} ORDER BY step_slug").fetchall():
            db.execute(REPORTS["complete"].encode(), step)
        if value(db, "SELECT bool_and(status = 'completed') FROM pgflow.runs WHERE parent_run_id IS NULL"):
            return
    pytest.fail("a parent waits for ever")


@pytest.mark.parametrize("seed", range(3))
def test_parents_and_children_that_several_sessions_move_at_once_all_end(
    db: Connection, connect: Callable[[], Connection], seed: int
) -> None:
    define(db, "leaf", {"ask": []})
    define(db, "middle", {"pay": [], "nested": ["pay"]})
    say(db, "middle", "nested", child_workflow="leaf", child_retries=1)
    define(db, "top", {"each": [], "one": [], "tell": ["each", "one"]})
    say(db, "top", "one", child_workflow="middle")
    say(db, "top", "each", step_type="map", child_workflow="leaf", max_children=2, when_item_fails="continue")
    parents = [run_workflow(db, "top", [1, 2, 3]).id for _ in range(PARENTS)]
    problems: list[str] = []
    threads = [Thread(target=work, args=(connect(), 1000 * seed + number, problems)) for number in range(SESSIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    bring_to_an_end(db, parents)
    results = column(db, "SELECT step_result FROM pgflow.step_states WHERE step_slug = 'one'")
    assert results == [{"nested": {"ask": 1}}] * PARENTS
    results = column(db, "SELECT step_result FROM pgflow.step_states WHERE step_slug = 'each'")
    assert results == [[{"ask": 1}] * 3] * PARENTS
