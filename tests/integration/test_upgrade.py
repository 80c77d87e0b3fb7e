"""`init` upgrades a database of the former version while its functions are in use."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID, uuid4

import anyio
import anyio.to_thread
import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

from pgflow_prefect.consumer import perform
from pgflow_prefect.database import upgrade as upgrades
from pgflow_prefect.database.connection import connect as connect_product
from pgflow_prefect.database.schema import ADAPTER_VERSION, ENGINE_VERSION, SCRIPTS, install_schema, read_versions
from pgflow_prefect.database.store import open_store
from pgflow_prefect.deployment.diagnosis.database import DATABASE_CHECKS
from pgflow_prefect.deployment.diagnosis.findings import Outcome, Patient, carry_out
from pgflow_prefect.errors import PgflowPrefectError, SchemaNewerError
from pgflow_prefect.settings import Settings
from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connection
from tests.engine import define, run_workflow, value, wait_until_blocked, wait_until_true
from tests.former import SCRIPTS as FORMER_SCRIPTS
from tests.former import install_former, read_former

pytestmark = pytest.mark.anyio

KEYED = ("task_runs", "external_claims", "shadow_reports")

CLAIM = """
    SELECT status, attempt FROM pgflow_prefect.claim_step(
        %s, %s, 0, gen_random_uuid(), NULL, true, 'python', true, 'python')
"""
"""As the former version's Python says it."""

TAKE = """
    SELECT run_id FROM pgflow_prefect.take_runs(
        ARRAY['chain'], 10, adopt => false, held_by => 'the tests', lease => 60, max_recoveries => 3)
"""

COMPLETE = "SELECT status FROM pgflow_prefect.complete_step(%s, %s, '1', 0, %s, gen_random_uuid())"


@pytest.fixture
def old_dsn(empty_dsn: str) -> str:
    """A database of the former version."""
    install_former(empty_dsn)
    return empty_dsn


@pytest.fixture
def old(old_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(old_dsn, autocommit=True) as db:
        define(db, "chain", {"a": [], "b": ["a"]})
        yield db


async def init(dsn: str) -> None:
    async with await connect_product(dsn, timeout=10) as connection:
        await install_schema(connection)


def are_keyed_by_task(db: Connection) -> bool:
    keys = read_keys(db)
    return all(keys[table] == ["run_id", "step_slug", "task_index"] for table in KEYED)


def read_keys(db: Connection) -> dict[str, list[str]]:
    rows: list[Any] = db.execute(
        """SELECT c.conrelid::regclass::text, array_agg(a.attname::text ORDER BY k.place)
           FROM pg_constraint c CROSS JOIN unnest(c.conkey) WITH ORDINALITY AS k (number, place)
           JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.number
           WHERE c.contype = 'p' AND c.connamespace = 'pgflow_prefect'::regnamespace GROUP BY 1"""
    ).fetchall()
    return {str(name).removeprefix("pgflow_prefect."): key for name, key in rows}


def describe_indexes(db: Connection) -> list[str]:
    found = db.execute(
        "SELECT indexdef FROM pg_indexes WHERE schemaname IN ('pgflow', 'pgflow_prefect') ORDER BY 1"
    ).fetchall()
    return [str(definition) for (definition,) in found]


async def test_an_upgraded_database_has_the_keys_and_indexes_of_a_fresh_one(
    old: Connection, old_dsn: str, db: Connection
) -> None:
    await init(old_dsn)
    assert are_keyed_by_task(old)
    assert read_keys(old) == read_keys(db)
    assert describe_indexes(old) == describe_indexes(db)


def test_pasted_scripts_upgrade_as_init_does(old: Connection, db: Connection) -> None:
    for script in SCRIPTS:
        old.execute(shipped_path("sql", script).read_bytes())
    assert read_keys(old) == read_keys(db)
    assert describe_indexes(old) == describe_indexes(db)


async def test_a_worker_of_the_former_version_goes_on(old: Connection, old_dsn: str) -> None:
    run = run_workflow(old, "chain", {}).id
    assert old.execute(CLAIM, [run, "a"]).fetchone() == ("pending", 1)
    await init(old_dsn)
    assert old.execute(COMPLETE, [run, "a", 1]).fetchone() == ("completed",)
    assert old.execute(CLAIM, [run, "b"]).fetchone() == ("pending", 1)
    [claimed] = old.execute(
        "SELECT status FROM pgflow_prefect.complete_and_claim(%s, 0, %s, '[]')",
        [run, f'[{{"step_slug": "b", "result": 2, "attempt": 1, "task_run_id": "{uuid4()}"}}]'],
    ).fetchall()
    assert claimed == ("completed",)
    assert value(old, "SELECT status FROM pgflow.runs WHERE id = %s", run) == "completed"


async def test_a_statement_inside_a_former_function_finds_the_former_key(
    old: Connection, old_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim waits for its run inside the former function, and goes on there after the scripts."""
    monkeypatch.setattr(upgrades, "FORMER_PATIENCE", 60.0)
    run = run_workflow(old, "chain", {}).id
    old.execute(shipped_path("sql", "pgflow.sql").read_bytes())
    async with await connect_product(old_dsn, timeout=10) as connection:
        for table in KEYED:  # `init` begins so, and would wait for the claim here
            await upgrades._prepare_key(connection, table)
    with (
        ThreadPoolExecutor(1) as thread,
        psycopg.connect(old_dsn, autocommit=True) as worker,
        psycopg.connect(old_dsn) as holder,
    ):
        worker.execute("SET statement_timeout = '60s'")
        holder.execute("SELECT FROM pgflow.runs WHERE id = %s FOR UPDATE", [run])
        claim = thread.submit(lambda: worker.execute(CLAIM, [run, "a"]).fetchone())
        await anyio.to_thread.run_sync(wait_until_blocked, old, worker.info.backend_pid)
        async with anyio.create_task_group() as group:
            group.start_soon(init, old_dsn)
            with anyio.fail_after(180):
                while value(old, "SELECT pgflow_prefect.adapter_version()") != ADAPTER_VERSION:
                    await anyio.sleep(0.02)
            assert not are_keyed_by_task(old), "the former key stays as long as the statement"
            holder.rollback()
            assert await anyio.to_thread.run_sync(claim.result) == ("pending", 1)
    assert are_keyed_by_task(old)


async def test_init_notes_what_was_cancelled_before_and_while_it_looked(
    old: Connection, old_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, while_it_looked, reopened = (run_workflow(old, "chain", {}).id for _ in range(3))
    cancel = "SELECT pgflow.cancel_run(%s, 'changed our mind')"
    for run in (before, reopened):
        old.execute(cancel, [run])
    look = upgrades._look_for_cancelled

    async def look_slowly(connection: Any) -> None:
        await look(connection)
        assert value(old, "SELECT count(*) FROM pgflow.ended_before WHERE run_id IS NOT NULL") == 2
        old.execute(cancel, [while_it_looked])
        old.execute("SELECT pgflow.reopen_run(%s)", [reopened])

    monkeypatch.setattr(upgrades, "_look_for_cancelled", look_slowly)
    await init(old_dsn)
    noted = old.execute("SELECT id FROM pgflow.runs WHERE ended_as = 'cancelled'").fetchall()
    assert {run for (run,) in noted} == {before, while_it_looked}
    assert value(old, "SELECT to_regclass('pgflow.ended_before')") is None


async def test_an_interrupted_upgrade_goes_on_where_it_was(
    old: Connection, old_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stop(connection: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(upgrades, "_await_former_statements", stop)
        with pytest.raises(KeyboardInterrupt):
            await init(old_dsn)
    run = run_workflow(old, "chain", {}).id
    assert old.execute(CLAIM, [run, "a"]).fetchone() == ("pending", 1), "both keys are there"
    await init(old_dsn)
    assert are_keyed_by_task(old)


async def test_an_index_that_was_left_unfinished_is_built_anew(old: Connection, old_dsn: str) -> None:
    old.execute("ALTER TABLE pgflow_prefect.task_runs ADD COLUMN task_index INT NOT NULL DEFAULT 0")
    old.execute("CREATE UNIQUE INDEX task_runs_by_task ON pgflow_prefect.task_runs (run_id, step_slug, task_index)")
    unfinished = "UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass"
    old.execute(unfinished, ["pgflow_prefect.task_runs_by_task"])
    await init(old_dsn)
    assert are_keyed_by_task(old)


async def test_an_index_of_runs_that_was_left_unfinished_is_built_anew(
    old: Connection, old_dsn: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stop(connection: Any, index: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(upgrades, "_drop_index", stop)
        with pytest.raises(KeyboardInterrupt):
            await init(old_dsn)
    run_workflow(old, "chain", {})
    old.execute("SELECT pgflow_prefect.enable_workflow('chain')")
    assert old.execute(TAKE).fetchall() == [], "it is older"
    old.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'pgflow.runs_to_take'::regclass")
    await init(old_dsn)
    assert describe_indexes(old) == describe_indexes(db)
    assert value(old, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'pgflow.runs_to_take'::regclass") is True
    newer = run_workflow(old, "chain", {}).id
    assert old.execute(TAKE).fetchall() == [(newer,)]


async def test_a_role_that_was_granted_the_epoch_alone_notes_who_has_taken_a_run(old: Connection, old_dsn: str) -> None:
    name = f"taker_{uuid4().hex[:8]}"
    role = sql.Identifier(name)
    old.execute(sql.SQL("CREATE ROLE {0}; GRANT UPDATE (epoch) ON pgflow.runs TO {0}").format(role))
    try:
        await init(old_dsn)
        assert value(old, "SELECT has_column_privilege(%s, 'pgflow.runs', 'taken_in', 'UPDATE')", name) is True
    finally:
        old.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


async def test_what_a_former_worker_holds_is_not_taken_after_an_upgrade(old: Connection, old_dsn: str) -> None:
    old.execute("SELECT pgflow_prefect.enable_workflow('chain')")
    held, free = (run_workflow(old, "chain", {}).id for _ in range(2))
    old.execute("SELECT pgflow_prefect.take_run(%s, gen_random_uuid(), 'former', 600, 3)", [held])
    await init(old_dsn)
    assert old.execute(TAKE).fetchall() == [(free,)]
    assert old.execute(TAKE).fetchall() == []


async def test_init_makes_an_empty_database_with_the_keys_of_tasks(empty_dsn: str) -> None:
    await init(empty_dsn)

    with psycopg.connect(empty_dsn, autocommit=True) as db:
        assert are_keyed_by_task(db)
        define(db, "chain", {"a": []})
        run = run_workflow(db, "chain", {}).id
        assert db.execute(CLAIM, [run, "a"]).fetchone() == ("pending", 1)


async def test_two_upgrades_at_once_end_as_one_does(old: Connection, old_dsn: str) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(init, old_dsn)
    assert are_keyed_by_task(old)
    run = run_workflow(old, "chain", {}).id
    assert old.execute(CLAIM, [run, "a"]).fetchone() == ("pending", 1)


async def test_an_upgrade_accepts_what_another_one_prepares_at_the_same_moment(old: Connection, old_dsn: str) -> None:
    blocked = """
        SELECT EXISTS (SELECT FROM pg_stat_activity
                       WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0
                         AND query LIKE '%%CREATE UNLOGGED TABLE%%')
    """
    with psycopg.connect(old_dsn) as other:
        other.execute("CREATE UNLOGGED TABLE pgflow.ended_before AS SELECT NULL::uuid AS run_id, now() AS looked_at")
        async with anyio.create_task_group() as group:
            group.start_soon(init, old_dsn)
            await anyio.to_thread.run_sync(wait_until_true, old, blocked)
            other.commit()
    assert are_keyed_by_task(old)


async def test_a_statement_timeout_that_is_too_short_is_named(old: Connection, old_dsn: str) -> None:
    old.execute("SET statement_timeout = 0")
    with psycopg.connect(old_dsn) as holder, psycopg.connect(old_dsn, autocommit=True) as owner:
        owner.execute(
            sql.SQL("ALTER DATABASE {} SET statement_timeout = '300ms'").format(sql.Identifier(owner.info.dbname))
        )
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT FROM pgflow.runs")  # an index waits for this snapshot
        with pytest.raises(PgflowPrefectError, match="statement_timeout"):
            await init(old_dsn)


async def test_init_gives_way_to_a_transaction_that_holds_a_table(
    old: Connection, old_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrades, "LOCK_PATIENCE", 0.5)
    with psycopg.connect(old_dsn) as holder:
        holder.execute("LOCK TABLE pgflow_prefect.task_runs IN ACCESS SHARE MODE")
        with pytest.raises(PgflowPrefectError, match="another transaction holds a table"):
            await init(old_dsn)
    await init(old_dsn)


async def test_a_role_that_worked_before_an_upgrade_works_after_it(
    old: Connection, old_dsn: str, server_dsn: str
) -> None:
    role = f"former_worker_{uuid4().hex[:8]}"
    named = sql.Identifier(role)
    old.execute(sql.SQL("CREATE ROLE {}").format(named))
    try:
        for schema in ("pgflow", "pgflow_prefect"):
            rights = "GRANT USAGE ON SCHEMA {0} TO {1}; GRANT ALL ON ALL TABLES IN SCHEMA {0} TO {1}; "
            rights += "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {0} TO {1}"
            old.execute(sql.SQL(rights).format(sql.Identifier(schema), named))
        run = run_workflow(old, "chain", {}).id
        await init(old_dsn)
        old.execute(sql.SQL("SET ROLE {}").format(named))
        assert old.execute(CLAIM, [run, "a"]).fetchone() == ("pending", 1)
        assert old.execute(COMPLETE, [run, "a", 1]).fetchone() == ("completed",)
    finally:
        old.execute("RESET ROLE")
        old.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(named))


NEWER = {
    "the engine": ("pgflow", "engine", f"pgflow {ENGINE_VERSION + 1} and pgflow_prefect {ADAPTER_VERSION}"),
    "the adapter": ("pgflow_prefect", "adapter", f"pgflow {ENGINE_VERSION} and pgflow_prefect {ADAPTER_VERSION + 1}"),
}


def make_newer(db: Connection, schema: str, name: str) -> None:
    version = (ENGINE_VERSION if name == "engine" else ADAPTER_VERSION) + 1
    statement = "CREATE OR REPLACE FUNCTION {}.{}() RETURNS int LANGUAGE sql IMMUTABLE AS {}"
    db.execute(
        sql.SQL(statement).format(
            sql.Identifier(schema), sql.Identifier(f"{name}_version"), sql.Literal(f"SELECT {version}")
        )
    )


@pytest.mark.parametrize("part", NEWER)
async def test_a_database_that_is_newer_than_the_program_is_refused(part: str, db: Connection, dsn: str) -> None:
    schema, name, told = NEWER[part]
    make_newer(db, schema, name)
    message = f"is newer than this program: it has {told}.*pip install --upgrade"
    with pytest.raises(SchemaNewerError, match=message):
        async with open_store(Settings(dsn=dsn)):
            pass
    with pytest.raises(SchemaNewerError, match=message):
        await init(dsn)
    async with await connect_product(dsn, timeout=10) as connection:
        assert sum(await read_versions(connection)) == ENGINE_VERSION + ADAPTER_VERSION + 1, "nothing was replaced"


async def test_a_consumer_refuses_a_database_that_is_newer(db: Connection, dsn: str) -> None:
    make_newer(db, "pgflow_prefect", "adapter")
    message = (
        f'{{"run_id": "{UUID(int=1)}", "workflow_slug": "w", "step_slug": "a", "attempt": 1, '
        '"idempotency_key": "k", "input": {}}'
    )
    with pytest.raises(SchemaNewerError, match="is newer than this program"):
        await perform(message, lambda given: None, dsn)


async def test_doctor_says_that_a_database_is_newer(db: Connection, dsn: str) -> None:
    make_newer(db, "pgflow_prefect", "adapter")
    checks = [check for check in DATABASE_CHECKS if check.name in {"database", "writing", "server version", "schema"}]
    async with AsyncExitStack() as resources:
        patient = Patient(Settings(dsn=SecretStr(dsn)), "the test", resources)
        found = {each.check: each async for each in carry_out(checks, patient, lambda name: None)}
    assert found["schema"].outcome is Outcome.FAULT
    assert f"newer than this program: pgflow {ENGINE_VERSION}, pgflow_prefect {ADAPTER_VERSION + 1}" in (
        found["schema"].message
    )
    assert "pip install --upgrade pgflow-prefect" in (found["schema"].advice or "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_refuses_a_database_that_is_newer(script: str, db: Connection) -> None:
    make_newer(db, "pgflow", "engine")
    make_newer(db, "pgflow_prefect", "adapter")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="version"):
        db.execute(shipped_path("sql", script).read_bytes())


def describe_functions(db: Connection) -> list[str]:
    found = db.execute(
        """SELECT concat_ws(' ', p.oid, md5(p.prosrc), p.proacl::text, p.proargnames::text) FROM pg_proc p
           WHERE p.pronamespace IN ('pgflow'::regnamespace, 'pgflow_prefect'::regnamespace) ORDER BY 1"""
    ).fetchall()
    return [str(described) for (described,) in found]


@pytest.mark.parametrize("script", FORMER_SCRIPTS)
async def test_a_script_of_the_former_version_is_refused_by_an_upgraded_database(
    script: str, old: Connection, old_dsn: str
) -> None:
    await init(old_dsn)
    before = describe_functions(old)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="this script is of an older version"):
        old.execute(read_former(script))
    old.rollback()
    assert describe_functions(old) == before
    await init(old_dsn)
    assert describe_functions(old) == before, "the present script is not refused, and changes nothing"


def test_a_script_that_asks_for_no_version_is_refused(db: Connection) -> None:
    """The script of version 1 replaced functions without a look. This is what it does first to one of them."""
    before = describe_functions(db)
    with pytest.raises(psycopg.errors.InvalidFunctionDefinition, match="cannot change name of input parameter"):
        db.execute("CREATE OR REPLACE FUNCTION pgflow.refuse_cycle(workflow_slug text) RETURNS void LANGUAGE sql AS ''")
    assert describe_functions(db) == before


async def test_a_function_that_an_upgrade_makes_anew_keeps_its_rights_and_its_owner(
    old: Connection, old_dsn: str
) -> None:
    mark = uuid4().hex[:8]
    owner, granted = sql.Identifier(f"owner_{mark}"), sql.Identifier(f"granted_{mark}")
    rights = "SELECT proowner::regrole::text, proacl::text FROM pg_proc WHERE proname = 'refuse_cycle'"
    old.execute(sql.SQL("CREATE ROLE {}; CREATE ROLE {}").format(owner, granted))
    try:
        old.execute(
            sql.SQL(
                "ALTER FUNCTION pgflow.refuse_cycle(text) OWNER TO {0}; "
                "GRANT EXECUTE ON FUNCTION pgflow.refuse_cycle(text) TO {1} WITH GRANT OPTION"
            ).format(owner, granted)
        )
        before = [(owned, sorted(str(acl).strip("{}").split(","))) for owned, acl in old.execute(rights)]
        await init(old_dsn)
        assert [(owned, sorted(str(acl).strip("{}").split(","))) for owned, acl in old.execute(rights)] == before
    finally:
        for role in (owner, granted):
            old.execute(sql.SQL("REASSIGN OWNED BY {0} TO CURRENT_USER; DROP OWNED BY {0}; DROP ROLE {0}").format(role))


def test_every_script_says_how_long_it_waits_for_a_lock() -> None:
    for script in SCRIPTS:
        assert upgrades._SCRIPTS_PATIENCE in shipped_path("sql", script).read_bytes()
