"""What PostgreSQL refuses, as errors of this package: told apart by what a caller can do about them."""

from collections.abc import Iterator
from typing import LiteralString
from uuid import UUID

import psycopg
import pytest

from pgflow_prefect.database.translation import find_users_function, is_transient, translate_errors
from pgflow_prefect.errors import (
    DatabaseUnavailableError,
    PgflowPrefectError,
    ResultInvalidError,
    RunNotPendingError,
    SchemaMissingError,
    SupersededError,
    TransientError,
    UsageError,
)
from tests.conftest import Connect, Connection

RUN = UUID(int=1)


@pytest.fixture(scope="module")
def postgres(server_dsn: str) -> Iterator[Connection]:
    """A database without pgflow."""
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        yield connection


def provoke(connection: Connection, statement: LiteralString, run_id: UUID | None = None) -> PgflowPrefectError:
    """Execute a statement and return the error that comes of it."""
    with pytest.raises(PgflowPrefectError) as raised, translate_errors(run_id):
        connection.execute(statement)
    assert isinstance(raised.value.__cause__, psycopg.Error), "the cause is attached"
    return raised.value


@pytest.mark.parametrize(
    ("statement", "error", "message"),
    [
        ("SELECT 1 FROM pgflow.runs", SchemaMissingError, "run `pgflow-prefect init` first"),
        ("SELECT pgflow.engine_version()", SchemaMissingError, "run `pgflow-prefect init` first"),
        ("SELECT no_such_function()", SchemaMissingError, "no_such_function() does not exist"),
        (r"""SELECT '"\u0000"'::jsonb""", ResultInvalidError, "unsupported Unicode escape sequence (\\u0000 cannot"),
        ("SELECT 'x'::jsonb", ResultInvalidError, "invalid input syntax for type json"),
        ("SELECT repeat('x', 1100000000)", ResultInvalidError, "requested length too large"),
        ("SELEKT 1", PgflowPrefectError, 'PostgreSQL: syntax error at or near "SELEKT"'),
        ("DO $$ BEGIN RAISE no_data_found USING MESSAGE = 'gone'; END $$", UsageError, "gone"),
        (
            "DO $$ BEGIN RAISE invalid_parameter_value USING MESSAGE = 'no steps', HINT = 'Insert some.'; END $$",
            UsageError,
            "no steps. Insert some.",
        ),
    ],
)
def test_a_refusal_is_told_by_what_to_do(
    postgres: Connection, statement: LiteralString, error: type[PgflowPrefectError], message: str
) -> None:
    translated = provoke(postgres, statement)
    assert type(translated) is error
    assert message in str(translated)


def test_missing_rights_are_told_as_such(connect: Connect) -> None:
    connection = connect()
    connection.execute("SET ROLE pg_monitor")
    translated = provoke(connection, "SELECT 1 FROM pgflow.runs")
    assert str(translated).startswith("the database user may not do this: permission denied")


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "55P03", "08006", "53300", "57P01", "57P03"])
def test_what_may_pass_in_a_moment_is_transient(postgres: Connection, sqlstate: str) -> None:
    with pytest.raises(TransientError) as raised, translate_errors():
        postgres.execute(
            psycopg.sql.SQL("DO $$ BEGIN RAISE SQLSTATE {} USING MESSAGE = 'not now'; END $$").format(
                psycopg.sql.Literal(sqlstate)
            )
        )
    assert str(raised.value) == "PostgreSQL: not now"
    assert isinstance(raised.value, DatabaseUnavailableError)


def test_a_lock_that_is_held_is_transient(connect: Connect) -> None:
    holder = connect()
    holder.execute("BEGIN")
    holder.execute("LOCK TABLE pgflow.runs")
    assert isinstance(provoke(connect(), "BEGIN; LOCK TABLE pgflow.runs NOWAIT"), TransientError)


def test_a_connection_that_is_cut_is_transient_at_once_and_afterwards(connect: Connect) -> None:
    connection = connect()
    assert isinstance(provoke(connection, "SELECT pg_terminate_backend(pg_backend_pid())"), TransientError)
    assert isinstance(provoke(connection, "SELECT 1"), TransientError)


def test_a_mistake_is_not_transient() -> None:
    assert not is_transient(psycopg.errors.UniqueViolation())
    assert not is_transient(psycopg.ProgrammingError("can't adapt type"))
    assert is_transient(psycopg.OperationalError("the connection is lost"))


@pytest.mark.parametrize(
    ("constraint", "error"), [("runs_epoch", SupersededError), ("runs_status", RunNotPendingError)]
)
def test_a_run_that_is_taken_is_told_from_one_that_has_ended(
    postgres: Connection, constraint: str, error: type[PgflowPrefectError]
) -> None:
    statement = psycopg.sql.SQL(
        "DO $$ BEGIN RAISE object_not_in_prerequisite_state USING MESSAGE = 'no', CONSTRAINT = {}; END $$"
    ).format(psycopg.sql.Literal(constraint))
    with pytest.raises(error) as raised, translate_errors(RUN):
        postgres.execute(statement)
    if isinstance(raised.value, SupersededError):
        assert raised.value.run_id == RUN


def test_text_that_utf_8_can_t_hold_is_a_value_that_can_t_be_stored(postgres: Connection) -> None:
    with pytest.raises(ResultInvalidError, match="surrogates not allowed"), translate_errors():
        postgres.execute("SELECT %s::jsonb", ['"\ud800"'])


USERS_ERRORS = {
    "a missing table": ("INSERT INTO audit VALUES (1);", 'relation "audit" does not exist'),
    "a missing right": ("RAISE insufficient_privilege USING MESSAGE = 'not yours';", "not yours"),
    "an invalid value": ("RAISE invalid_parameter_value USING MESSAGE = 'no';", "no"),
    "a wrong date": ("PERFORM 'x'::date;", 'invalid input syntax for type date: "x"'),
    "no data": ("RAISE no_data_found USING MESSAGE = 'nothing';", "nothing"),
    "our own code": ("RAISE object_not_in_prerequisite_state USING CONSTRAINT = 'runs_epoch', MESSAGE = 'no';", "no"),
}


@pytest.mark.parametrize("what", USERS_ERRORS)
@pytest.mark.parametrize("name", ["guard", "cancel_run", '"Guard"'])
def test_an_error_of_a_users_trigger_names_its_function(connect: Connect, what: str, name: str) -> None:
    connection = connect()
    body, message = USERS_ERRORS[what]
    connection.execute("INSERT INTO pgflow.workflows VALUES ('w'); INSERT INTO pgflow.steps VALUES ('w', 'a')")
    connection.execute(
        f"""CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$;
            CREATE TRIGGER guard BEFORE INSERT ON pgflow.runs FOR EACH ROW EXECUTE FUNCTION {name}()""".encode()
    )
    translated = provoke(connection, "SELECT pgflow.run_workflow('w', '1')", RUN)
    assert type(translated) is PgflowPrefectError
    assert str(translated).startswith(f"PostgreSQL: {message}; your function ")
    assert f"{name}() raised this" in str(translated)
    assert "init" not in str(translated)


@pytest.mark.parametrize(
    ("context", "function"),
    [
        ("PL/pgSQL function shop.audit() line 3 at SQL statement\nPL/pgSQL function pgflow.f() line 1", "shop.audit()"),
        ("PL/pgSQL-Funktion audit() Zeile 3 bei SQL-Anweisung", "audit()"),
        ("fonction PL/pgSQL audit(), ligne 3, \u00e0 instruction SQL", "audit()"),
        ("funci\u00f3n PL/pgSQL audit() en la l\u00ednea 3 en sentencia SQL", "audit()"),
        ('SQL statement "UPDATE pgflow.runs SET a = f(1)"\nPL/pgSQL function pgflow.take_run(uuid) line 5', None),
        ("PL/pgSQL function claim_step(uuid,text,integer) line 5 at assignment", None),
        ("PL/pgSQL function pgflow_prefect.take_run(uuid,uuid) line 5\nPL/pgSQL function mine(int) line 1", "mine()"),
        ("PL/pgSQL function inline_code_block line 1 at RAISE", None),
        ("", None),
        (None, None),
    ],
)
def test_the_innermost_function_that_is_not_ours_is_found(context: str | None, function: str | None) -> None:
    assert find_users_function(context) == function
