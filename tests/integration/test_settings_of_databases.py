"""Settings that a role or a database carries: none of them changes what a command reads or writes."""

import logging
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from time import monotonic
from uuid import uuid4

import anyio.to_thread
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgflow_prefect.database.connection import connect as connect_product
from pgflow_prefect.database.diagnosis import open_diagnosis
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.schema import ADAPTER_VERSION, ENGINE_VERSION, install_schema, read_versions
from pgflow_prefect.database.step_connection import Connector, LazyConnection
from pgflow_prefect.database.step_transaction import StepTransaction
from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.errors import DatabaseReadOnlyError
from pgflow_prefect.models import ClaimRequest, Completion, Report, TaskElement, TaskKey
from pgflow_prefect.settings import Settings
from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connect, Connection
from tests.engine import DIAMOND, define, get_run, value, wait_until_blocked
from tests.json_values import decode

pytestmark = pytest.mark.anyio

Carry = Callable[..., None]
"""Has what a test connects by carry settings."""

SETTINGS = {
    "DateStyle": ["SQL, DMY", "German", "Postgres, MDY"],
    "IntervalStyle": ["sql_standard", "iso_8601"],
    "TimeZone": ["Asia/Kathmandu", "<+0330>-03:30"],
    "bytea_output": ["escape"],
    "standard_conforming_strings": ["off"],
    "extra_float_digits": ["-15"],
    "default_transaction_isolation": ["serializable", "repeatable read"],
    "default_transaction_deferrable": ["on"],
    "search_path": ["", "pgflow, pgflow_prefect", "shop, pg_catalog"],
    "role": ["pg_read_all_data"],
    "lock_timeout": ["10s"],
    "idle_in_transaction_session_timeout": ["10s"],
    "transaction_timeout": ["1min"],
    "idle_session_timeout": ["1min"],
    "row_security": ["off"],
    "jit": ["on"],
    "client_encoding": ["LATIN1", "SQL_ASCII", "WIN1252"],
    "transform_null_equals": ["on"],
    "array_nulls": ["off"],
    "quote_all_identifiers": ["on"],
}
EACH = [(name, text) for name, texts in SETTINGS.items() for text in texts]
SINCE = {"transaction_timeout": 170000, "idle_session_timeout": 140000}
"""The first version of PostgreSQL that has a setting."""

ALL_AT_ONCE = [(name, texts[0]) for name, texts in SETTINGS.items() if name != "role"]


@pytest.fixture
def admin(server_dsn: str) -> Iterator[Connection]:
    """A connection that no setting of this test's database reaches."""
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        yield connection


def carry(admin: Connection, dsn: str, *settings: tuple[str, str]) -> None:
    """Have the database carry these settings."""
    carry_by(sql.SQL("ALTER DATABASE {}").format(name_database(dsn)), admin, *settings)


def carry_by_role(admin: Connection, dsn: str, *settings: tuple[str, str]) -> None:
    """Have the role carry these settings, in this database alone."""
    role = sql.Identifier(admin.info.user)
    carry_by(sql.SQL("ALTER ROLE {} IN DATABASE {}").format(role, name_database(dsn)), admin, *settings)


def name_database(dsn: str) -> sql.Identifier:
    return sql.Identifier(str(psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]))


def carry_by(what: sql.Composed, admin: Connection, *settings: tuple[str, str]) -> None:
    for name, text in settings:
        if admin.info.server_version < SINCE.get(name, 0):
            continue
        # A list, as search_path is, must not become one quoted name.
        texts = sql.SQL(", ").join(map(sql.Literal, text.split(", ")))
        if name == "DateStyle":
            texts = sql.SQL("{}").format(sql.Literal(text))
        admin.execute(sql.SQL("{} SET {} = {}").format(what, sql.Identifier(name), texts))


async def execute_run(store: Store, db: Connection) -> None:
    """Execute a run through the store, and look at what every command shows of it."""
    run_id, flow_run_id = uuid4(), uuid4()
    before = datetime.now(UTC) - timedelta(minutes=1)
    epoch = await store.create_run("diamond", '{"name": "J\u00fcrgen \u20ac \u6f22"}', run_id, flow_run_id)
    assert epoch == 1
    assert (await store.list_enabled())["diamond"].since > before
    ended: list[str] = []
    for step in ("a", "b", "c", "d"):
        request = ClaimRequest(TaskKey(step), flow_run_id, None, with_payload=True)
        claim = await store.claim_step(run_id, epoch, request)
        assert decode(claim.payload) == {"name": "J\u00fcrgen \u20ac \u6f22"}
        completion = Completion(
            request.task, '{"ratio": 0.12345678901234567, "text": "\\\\d+ \\"x\\""}', claim.attempt, flow_run_id
        )
        [report] = await store.perform_tasks([TaskElement(run_id, epoch, completion)])
        assert isinstance(report, Report)
        ended.append(report.status)
    assert ended == ["completed"] * 4

    run = await store.read_run(run_id)
    assert run.finished_at is not None
    assert before < run.finished_at < datetime.now(UTC) + timedelta(minutes=1)
    assert run.finished_at.utcoffset() == timedelta(0)
    assert [each.id for each in await store.list_runs(since=before)] == [run_id]
    states = await store.list_step_states(run_id)
    assert [state.step_slug for state in states] == ["a", "b", "c", "d"]
    assert decode(states[0].step_result) == {"ratio": 0.12345678901234567, "text": '\\d+ "x"'}
    assert await store.load_run_definition(run_id) == await store.load_definition("diamond")
    assert (await store.read_clock()).tzinfo is not None
    assert db.execute("SELECT count(*) FROM pgflow.step_states WHERE status = 'completed'").fetchone() == (4,)


@pytest.mark.parametrize(("name", "text"), [pytest.param(*each, id="=".join(each)) for each in EACH])
async def test_a_run_is_executed_and_shown(dsn: str, db: Connection, admin: Connection, name: str, text: str) -> None:
    define(db, "diamond", DIAMOND)
    db.execute("SELECT pgflow_prefect.enable_workflow('diamond')")
    if name == "role":
        rights = "GRANT USAGE ON SCHEMA pgflow, pgflow_prefect TO {0}; GRANT ALL ON ALL TABLES IN SCHEMA pgflow TO {0};"
        rights += "GRANT ALL ON ALL TABLES IN SCHEMA pgflow_prefect TO {0};"
        rights += "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pgflow, pgflow_prefect TO {0}"
        db.execute(rights.format(text).encode())
    carry(admin, dsn, (name, text))
    settings = Settings.model_validate({"dsn": dsn})
    async with open_store(settings) as store:
        await execute_run(store, db)


async def test_all_settings_at_once_change_nothing(dsn: str, db: Connection, admin: Connection) -> None:
    define(db, "diamond", DIAMOND)
    db.execute("SELECT pgflow_prefect.enable_workflow('diamond')")
    carry(admin, dsn, *ALL_AT_ONCE)
    settings = Settings.model_validate({"dsn": dsn})
    async with open_store(settings) as store:
        await execute_run(store, db)
        assert (await store.count_prunable(timedelta(hours=1))) == []
    async with open_diagnosis(dsn, settings) as doctor:
        assert await doctor.find_versions() == (ENGINE_VERSION, ADAPTER_VERSION)
        assert (await doctor.read_server()).now.tzinfo is not None
        assert await doctor.list_missing_rights() == []


async def test_all_settings_of_a_role_at_once_change_nothing(dsn: str, db: Connection, admin: Connection) -> None:
    define(db, "diamond", DIAMOND)
    db.execute("SELECT pgflow_prefect.enable_workflow('diamond')")
    carry_by_role(admin, dsn, *ALL_AT_ONCE)
    async with open_store(Settings.model_validate({"dsn": dsn})) as store:
        await execute_run(store, db)


@pytest.mark.parametrize("carry_it", [carry, carry_by_role], ids=["database", "role"])
async def test_a_session_that_the_server_ends_while_it_is_idle_costs_no_statement(
    dsn: str, db: Connection, admin: Connection, carry_it: Carry
) -> None:
    if admin.info.server_version < SINCE["idle_session_timeout"]:
        pytest.skip("PostgreSQL 14 brought it")
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name = 'pgflow-prefect'"
    async with open_store(Settings.model_validate({"dsn": dsn}), size=3) as store:
        carry_it(admin, dsn, ("idle_session_timeout", "300ms"))  # connections that are opened later carry it
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = %s AND application_name = 'pgflow-prefect'",
            [db.info.dbname],
        )
        await store.drop_broken_connections()
        for _ in range(2):
            async with anyio.create_task_group() as group:  # each on a connection of its own
                for _ in range(3):
                    group.start_soon(store.list_enabled)
            with anyio.fail_after(180):
                while value(admin, others, db.info.dbname) != 0:
                    await anyio.sleep(0.05)
        await store.read_clock()


@pytest.mark.parametrize("carry_it", [carry, carry_by_role], ids=["database", "role"])
async def test_a_default_of_reading_only_is_respected_and_named(
    dsn: str, db: Connection, admin: Connection, carry_it: Carry
) -> None:
    define(db, "diamond", DIAMOND)
    carry_it(admin, dsn, ("default_transaction_read_only", "on"))
    async with open_store(Settings.model_validate({"dsn": dsn})) as store:
        with pytest.raises(DatabaseReadOnlyError, match="read-only"):
            await store.create_run("diamond", "1", uuid4(), uuid4())
        with pytest.raises(DatabaseReadOnlyError, match="default_transaction_read_only is on"):
            await store.check_writable()


@pytest.mark.parametrize("settings", [[each] for each in EACH if each[0] != "role"], ids=str)
async def test_both_schemas_are_installed_and_upgraded(
    empty_dsn: str, admin: Connection, settings: list[tuple[str, str]]
) -> None:
    carry(admin, empty_dsn, *settings)
    async with await connect_product(empty_dsn, timeout=10) as connection:
        await install_schema(connection)
        await install_schema(connection)
        assert await read_versions(connection) == (ENGINE_VERSION, ADAPTER_VERSION)


async def test_an_environment_with_another_encoding_changes_nothing(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("LATIN1", "SQL_ASCII"):
        monkeypatch.setenv("PGCLIENTENCODING", encoding)
        async with await connect_product(make_conninfo(dsn, client_encoding=encoding), timeout=10) as connection:
            assert connection.info.encoding == "utf-8"


async def test_a_default_isolation_level_does_not_make_claims_fail(
    dsn: str, db: Connection, connect: Connect, admin: Connection
) -> None:
    define(db, "diamond", DIAMOND)
    carry(admin, dsn, ("default_transaction_isolation", "serializable"))
    async with open_store(Settings.model_validate({"dsn": dsn})) as store:
        run_id, flow_run_id = uuid4(), uuid4()
        epoch = await store.create_run("diamond", "1", run_id, flow_run_id)
        assert epoch is not None
        other = connect()
        other.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        other.execute("UPDATE pgflow.runs SET error_message = 'locked' WHERE id = %s", [run_id])
        async with anyio.create_task_group() as group:
            request = ClaimRequest(TaskKey("a"), flow_run_id, None, with_payload=True)
            group.start_soon(store.claim_step, run_id, epoch, request)
            await anyio.to_thread.run_sync(wait_until_waiting, db)
            other.execute("COMMIT")  # a transaction that had begun before would get 40001 now
    assert get_run(db, run_id).error_message == "locked"
    assert value(db, "SELECT attempts FROM pgflow.step_states WHERE step_slug = 'a'") == 1


def wait_until_waiting(db: Connection) -> None:
    """Return once a session waits for a lock in this database."""
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    deadline = monotonic() + 180
    while (row := db.execute(waiting).fetchone()) is None:
        assert monotonic() < deadline, "no session waits"
    assert isinstance(row[0], int)
    wait_until_blocked(db, row[0])


@pytest.mark.parametrize("setting", ["idle_in_transaction_session_timeout", "transaction_timeout"])
async def test_a_handlers_transaction_stays_open(dsn: str, connect: Connect, admin: Connection, setting: str) -> None:
    if setting == "transaction_timeout" and admin.info.server_version < 170000:
        pytest.skip("PostgreSQL 17 brought it")
    carry(admin, dsn, (setting, "10min"))
    transaction = StepTransaction(Connector(dsn, timeout=10), uuid4(), TaskKey("a"), logging.getLogger(__name__))
    async with transaction:
        connection = transaction.connection
        assert isinstance(connection, LazyConnection)
        row = await (await connection.execute(f"SHOW {setting}")).fetchone()
    assert row == ("0",)
    assert value(connect(), f"SHOW {setting}") == "10min", "outside of it, it is what the database says"


def test_no_statement_has_a_backslash_that_a_setting_changes() -> None:
    """With standard_conforming_strings off, a backslash begins an escape in every string."""
    texts: dict[str, str] = {**QUERIES}
    for script in shipped_path("sql", "pgflow.sql").parent.rglob("*.sql"):
        texts[script.name] = script.read_text(encoding="utf-8")
    for name, text in texts.items():
        assert "\\" not in re.sub(r"\bE'(?:[^'\\]|''|\\.)*'", "", text), name
