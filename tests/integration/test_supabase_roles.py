"""The four roles of the kit: what each may do, in a table, and that each can do the whole of its work."""

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import LiteralString
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import DictRow, dict_row

from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.schema import SCRIPTS
from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connect, Connection
from tests.engine import CHAIN, DIAMOND, INVALID, UNKNOWN, column, define, refused, statuses, value
from tests.integration.supabase import (
    DENIED,
    FAILED,
    KIT_ROLES,
    RUN,
    attempt,
    become,
    become_owner,
    borrowed_roles,
    create_role,
    read_rights,
    run_script,
    table,
    tabulate,
)

KIT = {name.removeprefix("pgflow_"): (name, None) for name in KIT_ROLES}

OPERATIONS: dict[str, LiteralString] = {
    "define a workflow": "INSERT INTO pgflow.workflows VALUES ('new')",
    "add a step": "INSERT INTO pgflow.steps VALUES ('chain', 'd')",
    "add a dep": "INSERT INTO pgflow.deps VALUES ('chain', 'a', 'c')",
    "take a dep away": "DELETE FROM pgflow.deps WHERE to_step_slug = 'c'",
    "bind a step": "SELECT pgflow_prefect.bind_step('chain', 'a', 'external')",
    "bind a step by hand": "INSERT INTO pgflow_prefect.bindings VALUES ('chain', 'a', 'external')",
    "read bindings": "SELECT count(*) FROM pgflow_prefect.bindings",
    "set a version": "UPDATE pgflow.workflows SET version = 7",
    "read definitions": "SELECT FROM pgflow.workflows, pgflow.steps, pgflow.deps",
    "read snapshots": "SELECT FROM pgflow.definitions, pgflow.definition_steps, pgflow.definition_deps",
    "write a snapshot": "INSERT INTO pgflow.definitions (workflow_slug, version, step_count) VALUES ('chain', 99, 1)",
    "find the roots": "SELECT * FROM pgflow.get_root_steps('chain')",
    "start a run": "SELECT pgflow_api.run_workflow('chain', '{}')",
    "cancel a run": "SELECT pgflow_api.cancel_run(%(run)s)",
    "reopen a run": "SELECT pgflow_api.reopen_run(%(failed)s)",
    "insert a run": "INSERT INTO pgflow.runs (workflow_slug, id, payload) VALUES ('chain', gen_random_uuid(), '1')",
    "insert a completed run": "INSERT INTO pgflow.runs VALUES ('chain', gen_random_uuid(), 'completed', '1')",
    "name another requester": (
        "INSERT INTO pgflow_api.requests (run_id, action, requested_by) VALUES (%(run)s, 'cancel', 'somebody')"
    ),
    "read runs": "SELECT payload FROM pgflow.runs",
    "read results": "SELECT step_result FROM pgflow.step_states",
    "read requests": "SELECT count(*) FROM pgflow_api.requests",
    "see what is ready": "SELECT pgflow.has_unmet_deps(%(run)s, 'b'), count(*) FROM pgflow.get_ready_steps(%(run)s)",
    "call the engine's run_workflow": "SELECT pgflow.run_workflow('chain', '{}')",
    "call the engine's cancel_run": "SELECT pgflow.cancel_run(%(run)s)",
    "start a step": "SELECT pgflow.start_step(%(run)s, 'a')",
    "claim a step": "SELECT pgflow.claim_step(%(run)s, 'a')",
    "complete a step": "SELECT pgflow.complete_step(%(run)s, 'a', '1')",
    "fail a step": "SELECT pgflow.fail_step(%(run)s, 'a', 'broken')",
    "take a run": "SELECT pgflow_prefect.take_run(%(run)s, gen_random_uuid(), 'me', 60, 3)",
    "enable a workflow": "SELECT pgflow_prefect.enable_workflow('chain')",
    "read owners": "SELECT count(*) FROM pgflow_prefect.owners",
    "write a result": "UPDATE pgflow.step_states SET step_result = '1' WHERE run_id = %(run)s",
    "write a status": "UPDATE pgflow.runs SET status = 'completed' WHERE id = %(run)s",
    "write a payload": "UPDATE pgflow.runs SET payload = '1' WHERE id = %(run)s",
    "take a step back": "DELETE FROM pgflow.step_states WHERE run_id = %(run)s",
    "delete a run": "DELETE FROM pgflow.runs WHERE id = %(run)s",
    "create a table": "CREATE TABLE pgflow.mine AS SELECT 1",
}

ALLOWED = """
                                      define   run      work     observe
    define a workflow                 yes      -        -        -
    add a step                        yes      -        -        -
    add a dep                         yes      -        -        -
    take a dep away                   yes      -        -        -
    bind a step                       yes      -        -        -
    bind a step by hand               -        -        -        -
    read bindings                     yes      -        yes      yes
    set a version                     -        -        -        -
    read definitions                  yes      yes      yes      yes
    read snapshots                    yes      -        yes      yes
    write a snapshot                  -        -        -        -
    find the roots                    yes      -        yes      yes
    start a run                       -        yes      -        -
    cancel a run                      -        yes      -        -
    reopen a run                      -        yes      -        -
    insert a run                      -        yes      yes      -
    insert a completed run            -        -        -        -
    name another requester            -        -        -        -
    read runs                         -        yes      yes      yes
    read results                      -        yes      yes      yes
    read requests                     -        -        -        yes
    see what is ready                 -        -        yes      yes
    call the engine's run_workflow    -        -        yes      -
    call the engine's cancel_run      -        -        yes      -
    start a step                      -        -        yes      -
    claim a step                      -        -        yes      -
    complete a step                   -        -        yes      -
    fail a step                       -        -        yes      -
    take a run                        -        -        yes      -
    enable a workflow                 -        -        yes      -
    read owners                       -        -        yes      yes
    write a result                    -        -        yes      -
    write a status                    -        -        yes      -
    write a payload                   -        -        -        -
    take a step back                  -        -        yes      -
    delete a run                      -        -        -        -
    create a table                    -        -        -        -
"""

# What the store asks for a person who edits definitions; everything else it asks for a worker.
EDITS = {
    "insert_workflow", "lock_workflow", "insert_steps", "set_rules", "insert_deps", "delete_steps", "delete_deps",
    "bind_step", "undo_binding", "observe_workflow", "name_airflow_dags", "remove_airflow_dags",
}  # fmt: skip


@pytest.fixture(autouse=True)
def roles(server_dsn: str, dsn: str) -> Iterator[None]:
    with borrowed_roles(server_dsn, dsn):
        yield


@pytest.fixture
def kit(db: Connection) -> Connection:
    """A database with the roles, a pending run and a failed one."""
    run_script(db, "api")
    run_script(db, "roles")
    define(db, "chain", CHAIN)
    for run_id in (RUN, FAILED):
        db.execute("SELECT pgflow.run_workflow('chain', '{}', %s)", [run_id])
    db.execute("SELECT pgflow.fail_step(%s, 'a', 'broken')", [FAILED])
    return db


def ask(db: Connection, query: str, **parameters: object) -> DictRow:
    """Run one of the store's statements as the store does and return its first row."""
    with db.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(QUERIES[query], defaultdict(lambda: None, parameters)).fetchone()
    assert row is not None
    return row


def test_each_role_may_do_what_the_table_says(kit: Connection) -> None:
    assert tabulate(kit, KIT, OPERATIONS) == table(ALLOWED)


def test_no_other_role_may_do_anything(kit: Connection) -> None:
    stranger = become(kit, create_role(kit))
    assert {attempt(stranger, statement) for statement in OPERATIONS.values()} == {"-"}


def test_service_role_may_do_what_all_four_may(kit: Connection) -> None:
    for name, (role, _) in KIT.items():
        for operation, statement in OPERATIONS.items():
            if attempt(become(kit, role), statement) == "yes":
                assert attempt(become(kit, "service_role"), statement) == "yes", (name, operation)


def test_only_triggers_have_the_owners_rights_and_no_role_may_use_them(kit: Connection) -> None:
    ours = """
        SELECT proname, prosecdef, prorettype = 'trigger'::regtype FROM pg_proc
        WHERE pronamespace = 'pgflow_api'::regnamespace AND (prosecdef OR prorettype = 'trigger'::regtype) ORDER BY 1
    """
    assert kit.execute(ours).fetchall() == [
        ("begin_run", True, True),
        ("do_request", True, True),
        ("shorten_reason", False, True),
    ]
    for role in ("public", *KIT_ROLES, "service_role"):
        usable = """
            SELECT proname FROM pg_proc WHERE prorettype = 'trigger'::regtype
            AND pronamespace::regnamespace::text ~ '^pgflow' AND has_function_privilege(%s, oid, 'EXECUTE')
        """
        assert column(kit, usable, role) == []


def test_a_workflow_goes_from_hand_to_hand(kit: Connection, connect: Connect) -> None:
    definer = become(connect(), "pgflow_define")
    define(definer, "diamond", DIAMOND)
    with refused(INVALID, "has a cycle"):
        definer.execute("INSERT INTO pgflow.deps VALUES ('diamond', 'd', 'a')")

    runner = become(connect(), "pgflow_run")
    run_id = value(runner, """SELECT id FROM pgflow_api.run_workflow('diamond', '{"n": 1}')""")
    assert isinstance(run_id, UUID)
    assert statuses(runner, run_id) == {"a": "pending"}

    worker = become(connect(), "pgflow_work")
    flow_run_id = uuid4()
    holder = {"held_by": "the worker", "lease": 60, "max_recoveries": 3}
    ask(worker, "enable_workflow", workflow_slug="diamond", enabled=True)
    reserved = ask(worker, "take_runs", workflow_slugs=["diamond"], wanted=1, adopt=True, **holder)
    assert reserved["run_id"] == run_id
    ours = {"run_id": run_id, "epoch": reserved["epoch"]}
    assert ask(worker, "link_flow_run", flow_run_id=flow_run_id, queued=False, **ours, **holder)["linked"]
    for step in DIAMOND:
        task = ours | {"step_slug": step, "task_index": 0, "task_run_id": uuid4()}
        claimed = ask(worker, "claim_step", with_payload=True, bound="python", **task)
        assert (claimed["status"], json.loads(claimed["payload"])) == ("pending", {"n": 1})
        ask(worker, "note_state", state_name="Running", **task)
        done = ask(worker, "complete_step", result='"done"', attempt=claimed["attempt"], **task)
        assert done["status"] == "completed"
        leases = {"run_ids": [run_id], "epochs": [reserved["epoch"]], "lease": 60}
        assert ask(worker, "extend_leases", **leases)["holds"] == ("completed" if step == "d" else "held")
    assert ask(worker, "settle_runs", run_ids=[run_id], epochs=[reserved["epoch"]])["run_id"] == run_id

    observer = become(connect(), "pgflow_observe")
    seen = ask(observer, "read_run", run_id=run_id, lease=60)
    assert (seen["status"], seen["flow_run_id"], seen["held_by"]) == ("completed", flow_run_id, "the worker")
    assert json.loads(ask(observer, "read_results", run_id=run_id, step_slugs=["d"])["results"]) == {"d": "done"}
    result = "SELECT step_result FROM pgflow.step_states WHERE run_id = %s AND step_slug = 'd'"
    assert value(runner, result, run_id) == "done"


def test_a_worker_starts_fails_reopens_and_cancels_runs_of_its_own(kit: Connection, connect: Connect) -> None:
    worker = become(connect(), "pgflow_work")
    kit.execute("UPDATE pgflow.workflows SET version = version + 1")  # so that the run takes a snapshot
    ours = {"run_id": uuid4(), "workflow_slug": "chain", "payload": "{}", "held_by": "me", "flow_run_id": uuid4()}
    task = ours | {"step_slug": "a", "task_index": 0, "task_run_id": uuid4(), "bound": "python"}
    epoch = ask(worker, "create_run", lease=60, max_recoveries=3, **ours)["epoch"]
    claimed = ask(worker, "claim_step", epoch=epoch, **task)
    ask(worker, "fail_step", epoch=epoch, attempt=claimed["attempt"], error_message="x", state_name="Failed", **task)
    ask(worker, "reopen_run", **ours)
    epoch = ask(worker, "take_run", lease=60, max_recoveries=3, force=False, **ours)["epoch"]
    assert ask(worker, "complete_pending_step", epoch=epoch, result="1", **task)["accepted"]
    ask(worker, "repair_run", **ours)
    assert ask(worker, "release_run", epoch=epoch, **ours)["released"]
    ask(worker, "cancel_run", reason="enough", **ours)
    assert value(kit, "SELECT error_message FROM pgflow.runs WHERE id = %s", ours["run_id"]) == "enough"


def test_no_statement_of_the_store_is_refused(kit: Connection) -> None:
    known: dict[str, object] = {
        "run_id": RUN, "workflow_slug": "chain", "step_slug": "a", "status": "pending", "limit": 1, "lease": 60,
        "held_by": "me", "max_recoveries": 3, "epoch": 0, "run_ids": [RUN], "epochs": [0], "force": False,
    }  # fmt: skip
    refusals: dict[str, str] = {}
    for query, statement in QUERIES.items():
        become(kit, "pgflow_define" if query in EDITS else "pgflow_work")
        try:
            with kit.transaction(force_rollback=True):
                kit.execute(statement, defaultdict(lambda: None, known))
        except psycopg.errors.InsufficientPrivilege as refusal:
            refusals[query] = str(refusal)
        except psycopg.Error:
            pass  # NULL where it needs something: it was let in
    owners = {"prune_runs", "prune_run", "prune_definitions", "prune_backfills", "find_gone_runs"}
    assert refusals.keys() == owners, "deleting runs is the owner's"


def test_doctor_finds_all_rights_for_pgflow_work_and_few_for_pgflow_observe(kit: Connection) -> None:
    def list_missing(role: str) -> set[object]:
        become(kit, role)
        return {row[0] for row in kit.execute(QUERIES["list_missing_rights"], {"run_id": None})}

    assert list_missing("pgflow_work") == set()
    missing = list_missing("pgflow_observe")
    assert {"INSERT on pgflow_prefect.owners", "EXECUTE on function pgflow.claim_step"} <= missing
    assert "SELECT on pgflow.runs" not in missing


def test_a_member_who_logs_in_has_the_rights_of_the_role(kit: Connection, dsn: str) -> None:
    login = create_role(kit, "LOGIN PASSWORD 'secret' IN ROLE pgflow_work")
    with psycopg.connect(make_conninfo(dsn, user=login, password="secret"), autocommit=True) as worker:  # noqa: S106
        assert statuses(worker, RUN) == {"a": "pending"}
        worker.execute("SELECT pgflow.complete_step(%s, 'a', '1')", [RUN])
    assert statuses(kit, RUN) == {"a": "completed", "b": "pending"}


def test_what_can_t_be_started_or_asked_for_is_named(kit: Connection) -> None:
    kit.execute("INSERT INTO pgflow.workflows VALUES ('empty')")
    runner = become(kit, "pgflow_run")
    with refused(UNKNOWN, 'unknown workflow "nothing"'):
        runner.execute("SELECT pgflow_api.run_workflow('nothing', '{}')")
    with refused(INVALID, "payload .* is NULL"):
        runner.execute("SELECT pgflow_api.run_workflow('chain', NULL)")
    with refused(INVALID, "has no steps"):
        runner.execute("SELECT pgflow_api.run_workflow('empty', '{}')")
    with refused(INVALID, 'exists already, of workflow "chain"'):
        runner.execute("SELECT pgflow_api.run_workflow('empty', '{}', %s)", [RUN])
    with refused(UNKNOWN, "unknown run"):
        runner.execute("SELECT pgflow_api.cancel_run(%s)", [uuid4()])
    with refused(UNKNOWN, "unknown run NULL"):
        runner.execute("SELECT pgflow_api.reopen_run(NULL)")


def test_the_same_run_id_again_returns_the_run_that_exists(kit: Connection) -> None:
    runner = become(kit, "pgflow_run")
    again = "SELECT id FROM pgflow_api.run_workflow('chain', '{}', %s)"
    assert value(runner, again, RUN) == RUN
    assert value(runner, "SELECT count(*) FROM pgflow.runs") == 2


def test_a_run_that_is_started_by_a_plain_insert_is_announced_and_under_way(kit: Connection, connect: Connect) -> None:
    listener = connect()
    listener.execute("LISTEN pgflow_runs")
    run_id = uuid4()
    insert = "INSERT INTO pgflow.runs (workflow_slug, id, payload) VALUES ('chain', %s, '1')"
    become(kit, "pgflow_run").execute(insert, [run_id])
    assert [str(run_id) in heard.payload for heard in listener.notifies(timeout=30, stop_after=1)] == [True]
    assert statuses(kit, run_id) == {"a": "pending"}


def test_a_request_records_the_role_that_made_it(kit: Connection) -> None:
    become(kit, "pgflow_run").execute("SELECT pgflow_api.cancel_run(%s, 'too late')", [RUN])
    become(kit, "pgflow_observe")
    assert kit.execute("SELECT run_id, action, reason, requested_by FROM pgflow_api.requests").fetchall() == [
        (RUN, "cancel", "too late", "pgflow_run")
    ]


@pytest.mark.parametrize("script", ["api", "roles"])
def test_a_second_run_of_the_script_changes_nothing(kit: Connection, script: str) -> None:
    before = read_rights(kit)
    run_script(kit, script)
    assert read_rights(kit) == before


def test_the_roles_do_not_need_the_adapter_and_get_it_when_it_comes(kit: Connection) -> None:
    kit.execute("DROP SCHEMA pgflow_prefect CASCADE")
    run_script(kit, "roles")
    for part in SCRIPTS[1:]:
        kit.execute(shipped_path("sql", part).read_bytes())
    claims = "SELECT pgflow_prefect.enable_workflow('chain')"
    assert attempt(become(kit, "pgflow_work"), claims) == "-"
    kit.execute("RESET ROLE")
    run_script(kit, "roles")
    assert attempt(become(kit, "pgflow_work"), claims) == "yes"


def test_what_an_administrator_granted_beside_it_stays(kit: Connection) -> None:
    kit.execute("GRANT UPDATE (payload) ON pgflow.runs TO pgflow_work")
    run_script(kit, "roles")
    assert attempt(become(kit, "pgflow_work"), OPERATIONS["write a payload"]) == "yes"


def test_the_script_names_what_is_missing(db: Connection, connect: Connect) -> None:
    with refused("P0001", "pgflow_api is missing"):
        run_script(connect(), "roles")
    run_script(db, "api")
    stranger = become(connect(), create_role(db))
    db.execute("GRANT USAGE ON SCHEMA pgflow, pgflow_api TO PUBLIC")
    with refused(DENIED, "does not own the tables"):
        run_script(stranger, "roles")


def test_an_owner_who_may_create_roles_installs_everything(db: Connection) -> None:
    become_owner(db, "CREATEROLE")
    for script in ("api", "roles", "api", "roles"):
        run_script(db, script)
    db.execute("RESET ROLE")
    define(db, "chain", CHAIN)
    for run_id in (RUN, FAILED):
        db.execute("SELECT pgflow.run_workflow('chain', '{}', %s)", [run_id])
    db.execute("SELECT pgflow.fail_step(%s, 'a', 'broken')", [FAILED])
    assert tabulate(db, KIT, OPERATIONS) == table(ALLOWED)


def test_an_owner_who_may_not_create_roles_is_told_what_to_ask_for(db: Connection, connect: Connect) -> None:
    become_owner(db, "")
    run_script(db, "api")
    with refused(DENIED, "the role pgflow_define is missing, and .* may not create roles") as caught:
        run_script(db, "roles")
    hint = str(caught.value.diag.message_hint)
    connect().execute(hint.partition(": ")[2].partition("; then")[0].encode())
    db.execute("ROLLBACK")
    run_script(db, "roles")
    assert set(KIT_ROLES) <= set(column(db, "SELECT rolname FROM pg_roles"))


def test_taking_it_back_leaves_no_role(kit: Connection) -> None:
    for role in KIT_ROLES:
        kit.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())
    kit.execute("DROP TRIGGER begin_run ON pgflow.runs; DROP SCHEMA pgflow_api CASCADE")
    kit.execute("SELECT pgflow.run_workflow('chain', '{}')")
