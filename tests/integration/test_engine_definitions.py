"""A definition may be edited at any time, and a run keeps the one that it began with."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import Connect, Connection
from tests.engine import (
    CHAIN,
    DIAMOND,
    IN_USE,
    NOT_READY,
    UNKNOWN,
    cancel,
    claim,
    column,
    complete,
    define,
    finish,
    get_run,
    insert_run,
    refused,
    reopen,
    run_workflow,
    start_run,
    start_step,
    statuses,
    value,
    wait_until_blocked,
)

DELETE_C = "DELETE FROM pgflow.steps WHERE workflow_slug = 'chain' AND slug = 'c'"


def snapshots(db: Connection, workflow: str) -> list[object]:
    return column(db, "SELECT version FROM pgflow.definitions WHERE workflow_slug = %s ORDER BY 1", workflow)


def add_step(db: Connection, workflow: str, step: str, upstream: str) -> None:
    db.execute("INSERT INTO pgflow.steps VALUES (%s, %s)", [workflow, step])
    db.execute("INSERT INTO pgflow.deps VALUES (%s, %s, %s)", [workflow, upstream, step])


def remove_dep(db: Connection, workflow: str, upstream: str, step: str) -> None:
    dep = [workflow, upstream, step]
    db.execute("DELETE FROM pgflow.deps WHERE (workflow_slug, from_step_slug, to_step_slug) = (%s, %s, %s)", dep)


def test_two_workflows_may_use_the_same_step_slugs_in_another_order(db: Connection) -> None:
    forwards = start_run(db, "forwards", CHAIN)
    backwards = start_run(db, "backwards", {"c": [], "b": ["c"], "a": ["b"]})
    assert finish(db, forwards) == ["a", "b", "c"]
    assert finish(db, backwards) == ["c", "b", "a"]


def test_a_step_waits_for_the_upstreams_of_its_own_workflow_only(db: Connection) -> None:
    define(db, "other", {"a": [], "x": [], "b": ["a", "x"]})
    run_id = start_run(db, "chain", CHAIN)
    complete(db, run_id, "a")
    assert value(db, "SELECT pgflow.has_unmet_deps(%s, 'b')", run_id) is False
    assert column(db, "SELECT slug FROM pgflow.get_root_steps('other')") == ["a", "x"]
    assert column(db, "SELECT slug FROM pgflow.get_root_steps('chain')") == ["a"]


def test_an_edit_does_not_reach_a_pending_run(db: Connection) -> None:
    before = start_run(db, "chain", CHAIN)
    add_step(db, "chain", "d", "a")
    remove_dep(db, "chain", "b", "c")
    after = run_workflow(db, "chain").id
    assert statuses(db, after) == {"a": "pending", "c": "pending"}
    assert finish(db, before) == ["a", "b", "c"]
    assert finish(db, after) == ["a", "c", "b", "d"]
    assert {get_run(db, run_id).status for run_id in (before, after)} == {"completed"}


def test_a_step_that_was_added_later_is_unknown_to_an_older_run(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    add_step(db, "chain", "d", "a")
    complete(db, run_id, "a")
    with refused(UNKNOWN, 'unknown step "d"'):
        start_step(db, run_id, "d")


def test_a_snapshot_is_taken_once_a_version(db: Connection) -> None:
    define(db, "chain", CHAIN)
    assert snapshots(db, "chain") == []
    first, second = run_workflow(db, "chain"), run_workflow(db, "chain")
    assert first.definition_id == second.definition_id
    add_step(db, "chain", "d", "c")
    third = run_workflow(db, "chain")
    assert third.definition_id != first.definition_id
    assert len(snapshots(db, "chain")) == 2


def test_an_edit_that_changes_nothing_needs_no_snapshot(db: Connection) -> None:
    first = get_run(db, start_run(db, "chain", CHAIN))
    db.execute("INSERT INTO pgflow.steps VALUES ('chain', 'a') ON CONFLICT DO NOTHING")
    db.execute("UPDATE pgflow.deps SET to_step_slug = 'c' WHERE from_step_slug = 'nowhere'")
    assert run_workflow(db, "chain").definition_id == first.definition_id


def test_a_run_after_an_edit_in_the_same_transaction_has_the_edit(db: Connection) -> None:
    define(db, "chain", CHAIN)
    with db.transaction():
        before = run_workflow(db, "chain").id
        add_step(db, "chain", "d", "c")
        after = run_workflow(db, "chain").id
    assert finish(db, before) == ["a", "b", "c"]
    assert finish(db, after) == ["a", "b", "c", "d"]


def test_an_edit_that_is_rolled_back_leaves_no_trace(db: Connection) -> None:
    run = get_run(db, start_run(db, "chain", CHAIN))
    with db.transaction(force_rollback=True):
        add_step(db, "chain", "d", "c")
    assert run_workflow(db, "chain").definition_id == run.definition_id


def test_emptying_the_deps_is_an_edit_too(db: Connection) -> None:
    start_run(db, "chain", CHAIN)
    db.execute("TRUNCATE pgflow.deps")
    assert statuses(db, run_workflow(db, "chain").id) == {"a": "pending", "b": "pending", "c": "pending"}


def test_steps_cannot_be_emptied_under_a_pending_run(db: Connection) -> None:
    start_run(db, "chain", CHAIN)
    with refused(NOT_READY, "can't be deleted"):
        db.execute("TRUNCATE pgflow.steps CASCADE")
    db.execute("TRUNCATE pgflow.workflows CASCADE")
    assert value(db, "SELECT count(*) FROM pgflow.definitions") == 0


def test_a_run_inserted_by_hand_gets_the_definition_of_its_first_transition(db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id = insert_run(db, "chain")
    add_step(db, "chain", "d", "c")
    claim(db, run_id, "a")
    add_step(db, "chain", "e", "a")
    assert finish(db, run_id) == ["a", "b", "c", "d"]
    assert get_run(db, run_id).status == "completed"


def test_a_step_that_a_pending_run_has_yet_to_start_cannot_be_deleted(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    remove_dep(db, "chain", "b", "c")
    with refused(NOT_READY, f"""step "c" of workflow "chain" can't be deleted: run {run_id} is pending"""):
        db.execute(DELETE_C)
    assert finish(db, run_id) == ["a", "b", "c"]


def test_nor_can_it_be_renamed(db: Connection) -> None:
    start_run(db, "chain", CHAIN)
    remove_dep(db, "chain", "b", "c")
    with refused(NOT_READY, "can't be deleted"):
        db.execute("UPDATE pgflow.steps SET slug = 'd' WHERE slug = 'c'")


def test_a_step_that_a_run_has_started_is_kept_by_the_foreign_key(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    finish(db, run_id)
    remove_dep(db, "chain", "b", "c")
    with refused(IN_USE):
        db.execute(DELETE_C)


@pytest.mark.parametrize("end", ["cancelled", "never there"])
def test_a_step_that_no_pending_run_waits_for_can_be_deleted(db: Connection, end: str) -> None:
    define(db, "chain", CHAIN)
    if end == "cancelled":
        cancel(db, run_workflow(db, "chain").id)
    remove_dep(db, "chain", "b", "c")
    db.execute(DELETE_C)
    assert finish(db, run_workflow(db, "chain").id) == ["a", "b"]


def test_a_run_whose_step_was_deleted_cannot_be_reopened(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    cancel(db, run_id)
    remove_dep(db, "chain", "b", "c")
    db.execute(DELETE_C)
    with refused(NOT_READY, """can't be reopened: its step "c" has been deleted"""):
        reopen(db, run_id)
    assert get_run(db, run_id).status == "failed"


def test_a_deletion_waits_for_a_run_that_is_just_being_created(db: Connection, connect: Connect) -> None:
    define(db, "chain", CHAIN)
    creating, deleting = connect(), connect()

    def delete_last_step() -> None:
        deleting.execute("DELETE FROM pgflow.deps WHERE to_step_slug = 'c'")
        deleting.execute(DELETE_C)

    cancel(db, run_workflow(db, "chain").id)  # the version has its snapshot: a run takes no lock but the foreign key's
    with ThreadPoolExecutor(1) as pool:
        with creating.transaction():
            run_id = run_workflow(creating, "chain").id
            deletion = pool.submit(delete_last_step)
            wait_until_blocked(db, deleting.info.backend_pid)
        with refused(NOT_READY, f"run {run_id} is pending"):
            deletion.result()
    assert finish(db, run_id) == ["a", "b", "c"]


def test_all_deps_of_a_diamond_are_in_its_snapshot(db: Connection) -> None:
    run_id = start_run(db, "diamond", DIAMOND)
    degrees = db.execute("SELECT slug, in_degree FROM pgflow.definition_steps ORDER BY 1").fetchall()
    assert degrees == [("a", 0), ("b", 1), ("c", 1), ("d", 2)]
    assert finish(db, run_id) == ["a", "b", "c", "d"]
