"""Row-level security: users see and start their own runs only, and workers go on to work."""

from collections.abc import Iterator
from typing import LiteralString
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

from tests.conftest import Connect, Connection
from tests.engine import (
    CHAIN,
    INVALID,
    UNKNOWN,
    claim,
    column,
    complete,
    define,
    finish,
    refused,
    statuses,
    take,
    value,
)
from tests.integration.supabase import (
    ALICE,
    AUTH,
    BOB,
    DENIED,
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

UNDER_POLICIES = "query would be affected by row-level security"

ACTORS = {
    "anon": ("anon", None),
    "nobody": ("authenticated", None),
    "alice": ("authenticated", ALICE),
    "bob": ("authenticated", BOB),
    "service": ("service_role", None),
    "define": ("pgflow_define", None),
    "run": ("pgflow_run", None),
    "work": ("pgflow_work", None),
    "observe": ("pgflow_observe", None),
}

# The only run is Alice's.
OPERATIONS: dict[str, LiteralString] = {
    "read definitions": "SELECT FROM pgflow.workflows, pgflow.steps, pgflow.deps",
    "edit definitions": "INSERT INTO pgflow.steps VALUES ('chain', 'd')",
    "read snapshots": "SELECT FROM pgflow.definitions, pgflow.definition_steps",
    "read the run": "SELECT payload FROM pgflow.runs WHERE id = %(run)s",
    "read its results": "SELECT step_result FROM pgflow.step_states WHERE run_id = %(run)s",
    "start a run": "SELECT pgflow_api.run_workflow('chain', '{}')",
    "start it in Alice's name": (
        "INSERT INTO pgflow.runs (workflow_slug, id, payload, owner_id) "
        "VALUES ('chain', gen_random_uuid(), '1', %(alice)s)"
    ),
    "start it as completed": (
        "INSERT INTO pgflow.runs (workflow_slug, id, payload, status) "
        "VALUES ('chain', gen_random_uuid(), '1', 'completed')"
    ),
    "start the run again by its id": "SELECT pgflow_api.run_workflow('chain', '1', %(run)s)",
    "cancel the run": "SELECT pgflow_api.cancel_run(%(run)s)",
    "cancel it by a request": "INSERT INTO pgflow_api.requests (run_id, action) VALUES (%(run)s, 'cancel')",
    "reopen it by a request": "INSERT INTO pgflow_api.requests (run_id, action) VALUES (%(run)s, 'reopen')",
    "read requests": "SELECT FROM pgflow_api.requests",
    "give the run away": "UPDATE pgflow.runs SET owner_id = %(bob)s WHERE id = %(run)s",
    "write a result": "UPDATE pgflow.step_states SET step_result = '1' WHERE run_id = %(run)s",
    "delete the run": "DELETE FROM pgflow.runs WHERE id = %(run)s",
    "call the engine": "SELECT pgflow.complete_step(%(run)s, 'a', '1')",
    "claim by the adapter": "SELECT pgflow_prefect.take_run(%(run)s, NULL, 'me', 60, 3)",
    "read flow runs": "SELECT count(*) FROM pgflow_prefect.flow_runs",
    "choose whose runs are": "SELECT pgflow_api.protect_runs('true')",
}

ALLOWED = """
                                      anon     nobody   alice    bob      service  define   run      work     observe
    read definitions                  -        yes      yes      yes      yes      yes      yes      yes      yes
    edit definitions                  -        -        -        -        yes      yes      -        -        -
    read snapshots                    -        -        -        -        yes      yes      -        yes      yes
    read the run                      -        none     yes      none     yes      -        yes      yes      yes
    read its results                  -        none     yes      none     yes      -        yes      yes      yes
    start a run                       -        -        yes      yes      yes      -        yes      -        -
    start it in Alice's name          -        -        -        -        yes      -        -        -        -
    start it as completed             -        -        -        -        -        -        -        -        -
    start the run again by its id     -        -        yes      -        yes      -        yes      -        -
    cancel the run                    -        none     yes      none     yes      -        yes      -        -
    cancel it by a request            -        -        yes      -        yes      -        yes      -        -
    reopen it by a request            -        -        -        -        yes      -        yes      -        -
    read requests                     -        -        -        -        yes      -        -        -        yes
    give the run away                 -        -        -        -        yes      -        -        -        -
    write a result                    -        -        -        -        yes      -        -        yes      -
    delete the run                    -        -        -        -        -        -        -        -        -
    call the engine                   -        -        -        -        yes      -        -        yes      -
    claim by the adapter              -        -        -        -        yes      -        -        yes      -
    read flow runs                    -        -        -        -        yes      -        -        yes      yes
    choose whose runs are             -        -        -        -        -        -        -        -        -
"""


@pytest.fixture(autouse=True)
def roles(server_dsn: str, dsn: str) -> Iterator[None]:
    with borrowed_roles(server_dsn, dsn):
        yield


@pytest.fixture
def supabase(db: Connection) -> Connection:
    """A database as Supabase has it, with the kit's roles and a workflow."""
    db.execute(AUTH.encode())
    run_script(db, "api")
    run_script(db, "roles")
    define(db, "chain", CHAIN)
    return db


@pytest.fixture
def protected(supabase: Connection, connect: Connect) -> Connection:
    """The same under row-level security, with a run of Alice's that a request was made for."""
    run_script(supabase, "row_level_security")
    start(sign_in(connect(), ALICE), RUN)
    supabase.execute("SELECT pgflow.fail_step(%s, 'a', 'broken')", [RUN])
    become(connect(), "service_role").execute("SELECT pgflow_api.reopen_run(%s)", [RUN])
    return supabase


def sign_in(db: Connection, user: UUID | None = None, **claims: object) -> Connection:
    return become(db, "authenticated", user, **claims)


def start(db: Connection, run_id: UUID, payload: object = None) -> object:
    return value(db, "SELECT status FROM pgflow_api.run_workflow('chain', %s, %s)", Jsonb(payload), run_id)


def visible(db: Connection) -> list[object]:
    return column(db, "SELECT id FROM pgflow.runs ORDER BY 1")


def test_each_role_may_do_what_the_table_says(protected: Connection) -> None:
    assert tabulate(protected, ACTORS, OPERATIONS) == table(ALLOWED)


def test_every_table_is_behind_policies(protected: Connection) -> None:
    without = """
        SELECT oid::regclass::text FROM pg_class
        WHERE relkind = 'r' AND relnamespace::regnamespace::text ~ '^pgflow' AND NOT relrowsecurity
    """
    assert column(protected, without) == []
    opened = "SELECT DISTINCT tablename FROM pg_policies WHERE 'authenticated' = ANY (roles) OR 'public' = ANY (roles)"
    assert sorted(map(str, column(protected, opened))) == [
        "deps",
        "requests",
        "runs",
        "step_items",
        "step_maps",
        "step_states",
        "steps",
        "workflows",
    ]


def test_two_users_see_the_items_of_their_own_maps(protected: Connection, connect: Connect) -> None:
    protected.execute("UPDATE pgflow.steps SET step_type = 'map' WHERE slug = 'a'")
    alice, bob = sign_in(connect(), ALICE), sign_in(connect(), BOB)
    for user, items in ((alice, [1, 2]), (bob, [3])):
        assert start(user, uuid4(), items) == "pending"
    protected.execute("SELECT pgflow.repair_run(id) FROM pgflow.runs")
    assert column(alice, "SELECT item FROM pgflow.step_items ORDER BY item_index") == [1, 2]
    assert column(bob, "SELECT total FROM pgflow.step_maps") == [1]


def test_two_users_see_their_own_runs_and_steps(protected: Connection, connect: Connect) -> None:
    alice, bob = sign_in(connect(), ALICE), sign_in(connect(), BOB)
    his = uuid4()
    assert start(bob, his, {"secret": True}) == "pending"
    assert (visible(alice), visible(bob)) == ([RUN], [his])
    assert (statuses(alice, RUN), statuses(alice, his), statuses(bob, his)) == ({"a": "pending"}, {}, {"a": "pending"})
    assert column(protected, "SELECT owner_id FROM pgflow.runs ORDER BY id = %s", his) == [ALICE, BOB]


def test_the_child_of_a_users_run_is_that_users(protected: Connection, connect: Connect) -> None:
    protected.execute("INSERT INTO pgflow.workflows (slug) VALUES ('parent')")
    protected.execute(
        "INSERT INTO pgflow.steps (workflow_slug, slug, child_workflow) VALUES ('parent', 'nested', 'chain')"
    )
    alice, bob, his = sign_in(connect(), ALICE), sign_in(connect(), BOB), uuid4()
    bob.execute("INSERT INTO pgflow.runs (workflow_slug, id, payload) VALUES ('parent', %s, '{}')", [his])
    protected.execute("SELECT pgflow.repair_run(%s)", [his])  # as a worker does, which is no user
    [child] = column(protected, "SELECT id FROM pgflow.runs WHERE parent_run_id = %s", his)
    assert set(visible(bob)) == {his, child}
    assert visible(alice) == [RUN]


def test_a_run_of_another_user_is_an_unknown_run(protected: Connection, connect: Connect) -> None:
    bob = sign_in(connect(), BOB)
    with refused(UNKNOWN, f"unknown run {RUN}"):
        bob.execute("SELECT pgflow_api.cancel_run(%s)", [RUN])
    with refused(DENIED, "exists already, and is not yours"):
        start(bob, RUN)
    with refused(DENIED, "violates row-level security policy"):
        bob.execute("INSERT INTO pgflow_api.requests (run_id, action) VALUES (%s, 'cancel')", [RUN])
    assert statuses(protected, RUN) == {"a": "pending"}


def test_a_user_cancels_his_own_run(protected: Connection, connect: Connect) -> None:
    alice = sign_in(connect(), ALICE)
    cancelled = "SELECT status, error_message FROM pgflow_api.cancel_run(%s, 'changed my mind')"
    assert alice.execute(cancelled, [RUN]).fetchall() == [("failed", "changed my mind")]
    with refused(DENIED):
        alice.execute("SELECT pgflow_api.reopen_run(%s)", [RUN])


def test_without_a_user_nothing_starts(protected: Connection, connect: Connect) -> None:
    with refused(DENIED, "violates row-level security policy"):
        start(sign_in(connect()), uuid4())


def test_a_user_who_takes_a_name_gains_nothing(protected: Connection, connect: Connect) -> None:
    bob = connect()
    bob.execute("""
        CREATE TEMP TABLE runs AS SELECT * FROM pgflow.runs;
        CREATE FUNCTION pg_temp.snapshot(text) RETURNS pgflow.definitions LANGUAGE plpgsql
        AS 'BEGIN RAISE ''taken''; END';
        SET search_path = pg_temp, public, pgflow
    """)
    assert start(sign_in(bob, BOB), his := uuid4()) == "pending"
    assert statuses(protected, his) == {"a": "pending"}


def test_the_server_starts_runs_in_a_users_name(protected: Connection, connect: Connect) -> None:
    insert = "INSERT INTO pgflow.runs (workflow_slug, id, payload, owner_id) VALUES ('chain', %s, '1', %s)"
    become(connect(), "service_role").execute(insert, [his := uuid4(), BOB])
    assert statuses(sign_in(connect(), BOB), his) == {"a": "pending"}


def test_runs_from_before_have_no_owner_until_they_are_given_one(supabase: Connection, connect: Connect) -> None:
    supabase.execute("SELECT pgflow.run_workflow('chain', '{}', %s)", [RUN])
    run_script(supabase, "row_level_security")
    alice = sign_in(connect(), ALICE)
    assert visible(alice) == []
    supabase.execute("UPDATE pgflow.runs SET owner_id = %s", [ALICE])
    assert visible(alice) == [RUN]


def test_a_worker_executes_a_users_run_and_the_user_sees_the_results(protected: Connection, connect: Connect) -> None:
    worker = become(connect(), "pgflow_work")
    epoch = take(worker, RUN)
    for step in CHAIN:
        attempt_number = claim(worker, RUN, step, epoch).attempt
        complete(worker, RUN, step, f"{step} is done", epoch=epoch, attempt=attempt_number)
    alice = sign_in(connect(), ALICE)
    assert column(alice, "SELECT step_result FROM pgflow.step_states ORDER BY 1") == [
        f"{step} is done" for step in CHAIN
    ]
    assert column(alice, "SELECT status FROM pgflow.runs") == ["completed"]


def test_a_worker_has_to_become_the_role_that_it_is_a_member_of(protected: Connection, dsn: str) -> None:
    login = create_role(protected, "LOGIN PASSWORD 'secret' IN ROLE pgflow_work")
    theirs = make_conninfo(dsn, user=login, password="secret")  # noqa: S106
    with psycopg.connect(theirs, autocommit=True) as worker, refused(DENIED, UNDER_POLICIES):
        take(worker, RUN)
    [advice] = [row[1] for row in run_script(protected, "row_level_security") if row[0] == login]
    protected.execute(str(advice).partition(": ")[2].encode())
    with psycopg.connect(theirs, autocommit=True) as worker:
        assert finish(worker, RUN) == ["a", "b", "c"]
    assert (login, "becomes pgflow_work") in run_script(protected, "row_level_security")


TEAM = "payload ->> 'team' = (SELECT auth.jwt() ->> 'team')"


def test_an_expression_decides_whose_a_run_is(supabase: Connection, connect: Connect) -> None:
    script = "SELECT pgflow_api.protect_runs(%s)"
    run_script(supabase, "row_level_security")
    supabase.execute(script, [TEAM])
    red, blue = sign_in(connect(), ALICE, team="red"), sign_in(connect(), BOB, team="blue")
    start(red, RUN, {"team": "red"})
    assert (visible(red), visible(blue)) == ([RUN], [])
    with refused(DENIED, "violates row-level security policy"):
        start(blue, uuid4(), {"team": "red"})
    with refused(UNKNOWN):
        blue.execute("SELECT pgflow_api.cancel_run(%s)", [RUN])
    run_script(supabase, "row_level_security")  # leaves the choice alone
    assert (visible(red), visible(blue)) == ([RUN], [])
    supabase.execute("SELECT pgflow_api.protect_runs()")
    assert (visible(red), visible(blue)) == ([RUN], [])  # Alice's own, now
    assert value(supabase, "SELECT count(*) FROM pg_policies WHERE tablename = 'runs'") == 3


def test_an_expression_looks_at_other_tables_with_the_users_eyes(protected: Connection, connect: Connect) -> None:
    protected.execute("""
        CREATE TABLE public.members (user_id uuid, workflow_slug text);
        ALTER TABLE public.members ENABLE ROW LEVEL SECURITY;
        CREATE POLICY own ON public.members TO authenticated USING (user_id = auth.uid());
        GRANT SELECT ON public.members TO authenticated;
        SELECT pgflow_api.protect_runs('workflow_slug IN (SELECT m.workflow_slug FROM public.members m)')
    """)
    protected.execute("INSERT INTO public.members VALUES (%s, 'chain')", [BOB])
    alice, bob = sign_in(connect(), ALICE), sign_in(connect(), BOB)
    assert (visible(alice), visible(bob)) == ([], [RUN])
    with refused(UNKNOWN):
        alice.execute("SELECT pgflow_api.cancel_run(%s)", [RUN])
    bob.execute("SELECT pgflow_api.cancel_run(%s)", [RUN])


def test_an_invalid_condition_is_refused_and_changes_nothing(protected: Connection) -> None:
    before = read_rights(protected)
    for expression in (
        "true); DROP TABLE pgflow.step_states CASCADE; --",
        "true; DROP TABLE pgflow.step_states CASCADE",
        "true) WITH CHECK (true",
        "true) UNION ALL SELECT (true",
        "payload",
        "no_such_column = 1",
        "",
    ):
        with refused(INVALID, "this is no condition on a row"):
            protected.execute("SELECT pgflow_api.protect_runs(%s)", [expression])
    assert read_rights(protected) == before


def test_a_comment_at_the_end_of_an_expression_swallows_nothing(protected: Connection, connect: Connect) -> None:
    protected.execute("SELECT pgflow_api.protect_runs('workflow_slug = ''open'' -- for now')")
    assert visible(sign_in(connect(), ALICE)) == []


def test_without_auth_an_expression_is_needed(db: Connection) -> None:
    run_script(db, "api")
    with refused("42883", "no function auth.uid") as caught:
        run_script(db, "row_level_security")
    assert "protect_runs" in str(caught.value.diag.message_hint)


@pytest.mark.parametrize("script", ["api", "roles", "row_level_security"])
def test_a_second_run_of_a_script_changes_nothing(protected: Connection, script: str) -> None:
    before = read_rights(protected)
    run_script(protected, script)
    assert read_rights(protected) == before


def test_a_table_that_came_later_is_behind_policies_after_the_next_run(protected: Connection, connect: Connect) -> None:
    protected.execute("CREATE TABLE pgflow_prefect.later (id int); INSERT INTO pgflow_prefect.later VALUES (1)")
    run_script(protected, "roles")
    run_script(protected, "row_level_security")
    seen = "SELECT * FROM pgflow_prefect.later"
    assert attempt(become(connect(), "pgflow_observe"), seen) == "yes"
    assert attempt(sign_in(connect(), ALICE), seen) == "-"


def test_the_order_of_the_scripts_does_not_matter(db: Connection) -> None:
    db.execute(AUTH.encode())
    run_script(db, "api")
    run_script(db, "row_level_security")
    run_script(db, "roles")
    run_script(db, "row_level_security")
    define(db, "chain", CHAIN)
    start(become(db, "authenticated", ALICE), RUN)
    become(db, "service_role").execute("SELECT pgflow.fail_step(%s, 'a', 'broken')", [RUN])
    db.execute("SELECT pgflow_api.reopen_run(%s)", [RUN])
    assert tabulate(db, ACTORS, OPERATIONS) == table(ALLOWED)


@pytest.mark.parametrize("attributes", ["CREATEROLE BYPASSRLS", "CREATEROLE"])
def test_an_owner_like_supabases_installs_everything(db: Connection, connect: Connect, attributes: str) -> None:
    db.execute(AUTH.encode())
    owner = become_owner(db, attributes)
    connect().execute(f"GRANT USAGE ON SCHEMA auth TO {owner}".encode())
    for script in ("api", "roles", "row_level_security") * 2:
        shown = run_script(db, script)
    define(db, "chain", CHAIN)
    start(sign_in(connect(), ALICE), RUN)
    worker = become(connect(), "pgflow_work")
    if "BYPASSRLS" in attributes and db.info.server_version >= 160000:
        assert shown == [(name, "ready") for name in ("pgflow_define", "pgflow_observe", "pgflow_work")]
        assert finish(worker, RUN) == ["a", "b", "c"]
        return
    assert [str(advice).partition(": ")[2] for _, advice in shown] == [
        f"ALTER ROLE {name} BYPASSRLS" for name in ("pgflow_define", "pgflow_observe", "pgflow_work")
    ]
    with refused(DENIED, UNDER_POLICIES):
        take(worker, RUN)
    assert finish(db, RUN) == ["a", "b", "c"]  # the owner of the tables may go on in any case


def test_taking_it_back_opens_nothing_to_users(protected: Connection, connect: Connect) -> None:
    protected.execute("REVOKE ALL ON ALL TABLES IN SCHEMA pgflow, pgflow_api FROM authenticated")
    for [relation] in protected.execute("""
        SELECT oid::regclass::text FROM pg_class
        WHERE relkind = 'r' AND relnamespace::regnamespace::text ~ '^pgflow'
    """).fetchall():
        protected.execute(f"ALTER TABLE {relation} DISABLE ROW LEVEL SECURITY".encode())
    alice = sign_in(connect(), ALICE)
    assert {attempt(alice, statement) for statement in OPERATIONS.values()} == {"-"}
    assert finish(become(connect(), "pgflow_work"), RUN) == ["a", "b", "c"]
