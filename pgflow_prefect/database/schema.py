"""Installs the two schemas, and checks their versions."""

from psycopg.errors import DependentObjectsStillExist

from pgflow_prefect.database.connection import Connection
from pgflow_prefect.database.implementations import CLASSIC, FoundSchema, Implementation, find_schema
from pgflow_prefect.database.implementations.released import WORKING
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.translation import translate_errors
from pgflow_prefect.database.upgrade import upgrade
from pgflow_prefect.errors import (
    HiddenRowsError,
    NotOnReleasedError,
    PgflowPrefectError,
    SchemaMissingError,
    SchemaNewerError,
    UsageError,
)
from pgflow_prefect.shipped import shipped_path

ENGINE_VERSION = 6
ADAPTER_VERSION = 10

SCRIPTS = CLASSIC.scripts
"""The scripts of the classic schemas, in this order; the last one sets the version."""


def read_scripts() -> str:
    """Return the SQL that installs or upgrades both schemas, for `psql` or an SQL editor."""
    return "\n".join(shipped_path("sql", name).read_text(encoding="utf-8") for name in SCRIPTS)


async def read_versions(connection: Connection) -> tuple[int, int]:
    """Return the installed versions of engine and adapter; 0 for one that is missing."""
    with translate_errors():
        row = await (await connection.execute(QUERIES["find_versions"])).fetchone()
    assert row is not None
    return int(str(row["engine"] or 0)), int(str(row["adapter"] or 0))


def describe_foreign_schema(table: str) -> str:
    """Say that a schema of our name belongs to another program, as this table shows."""
    whose = "the pgflow that npm has (pgflow.dev)" if table == "flows" else "another program"
    return (
        f"the schema pgflow belongs to {whose}: it has pgflow.{table}, and no pgflow.workflows with a slug. "
        "`pgflow-prefect` needs a database of its own"
    )


async def refuse_hidden_rows(connection: Connection) -> None:
    """Check that row-level security hides no row of ours from the role of this process.

    Raises:
        HiddenRowsError: with the table, the role, and what to do.
    """
    with translate_errors():
        row = await (await connection.execute(QUERIES["find_hidden"])).fetchone()
    if row is not None:
        raise HiddenRowsError(
            f"the database role {str(row['user'])!r} may not see every row of {row['name']}: "
            "row-level security applies to it. Connect as the owner of the tables, or let a superuser say "
            f"`ALTER ROLE {row['quoted']} BYPASSRLS`; `pgflow-prefect guide rights` says why"
        )


async def check_schema(
    connection: Connection, *, only_reads: bool = False, executes_moved: bool = False
) -> Implementation:
    """Check that the database has both schemas in the right versions, and return its implementation.

    Args:
        connection: to the database.
        only_reads: also accept a schema whose runs this package can only read and show.
        executes_moved: also accept a schema of which this package executes the flows that were moved.

    Raises:
        SchemaMissingError: with the command that installs them.
        SchemaNewerError: with the command that upgrades this program.
        NotOnReleasedError: the command does not work on the database's schema.
        HiddenRowsError: row-level security hides rows from this role.
    """
    engine, adapter = await read_versions(connection)
    name = connection.info.dbname
    implementation = CLASSIC
    if engine == 0:
        found = await find_schema(connection)
        if found.foreign_table is not None:
            raise SchemaMissingError(f"database {name!r}: {describe_foreign_schema(found.foreign_table)}")
        _refuse_unknown(name, found)
        implementation = found.implementation or CLASSIC
    fits = implementation.executes or only_reads or (implementation.moves_flows and executes_moved)
    if not fits:
        raise NotOnReleasedError(f"this does not work on database {name!r}: it has {describe_limited_schema()}")
    needed = [("pgflow_prefect", adapter, ADAPTER_VERSION)]
    if implementation is CLASSIC:
        needed.insert(0, ("pgflow", engine, ENGINE_VERSION))
    if missing := " and ".join(schema for schema, version, _ in needed if not version):
        raise SchemaMissingError(f"database {name!r} has no schema {missing}: run `pgflow-prefect init` first")
    _refuse_newer(connection, engine, adapter)
    if any(version < wanted for _, version, wanted in needed):
        raise SchemaMissingError(
            f"the schema of database {name!r} is older than this program: run `pgflow-prefect init` to upgrade it"
        )
    await refuse_hidden_rows(connection)
    return implementation


def describe_limited_schema() -> str:
    """Name a schema whose runs this package can only read and show, and say what works."""
    return f"the schema of the released pgflow (pgflow.dev). On that, these commands work: {WORKING}"


def _refuse_unknown(database: str, found: FoundSchema) -> None:
    """Refuse a later version of the released pgflow whose words this program could only misread.

    Raises:
        SchemaNewerError: with each of them.
    """
    if found.unknown:
        named = ", ".join(f"pgflow.{each}" for each in found.unknown)
        raise SchemaNewerError(
            f"database {database!r} has a version of pgflow that this program does not know: {named}. "
            "Upgrade the program: `pip install --upgrade pgflow-prefect`"
        )


def _refuse_newer(connection: Connection, engine: int, adapter: int) -> None:
    if engine > ENGINE_VERSION or adapter > ADAPTER_VERSION:
        raise SchemaNewerError(
            f"the schema of database {connection.info.dbname!r} is newer than this program: it has pgflow {engine} and "
            f"pgflow_prefect {adapter}, and this program knows {ENGINE_VERSION} and {ADAPTER_VERSION}. "
            "Upgrade the program: `pip install --upgrade pgflow-prefect`"
        )


async def has_other_isolation(connection: Connection) -> bool:
    """Tell whether the role or the database has another default than READ COMMITTED."""
    with translate_errors():
        row = await (await connection.execute(QUERIES["read_isolation"])).fetchone()
    return row is not None and row["isolation"] != "read committed"


async def install_schema(connection: Connection) -> Implementation:
    """Install or upgrade the scripts for the schema of the database, by default the classic ones; return which.

    Changes nothing if they are current. It never installs one schema over another one.

    Raises:
        PgflowPrefectError: the database user may not create them, or a table stayed locked too long.
        SchemaNewerError: they are newer than this package, whose functions would replace theirs.
    """
    engine, adapter = await read_versions(connection)
    _refuse_newer(connection, engine, adapter)
    found = await find_schema(connection)
    _refuse_unknown(connection.info.dbname, found)
    implementation = found.implementation or CLASSIC  # whose script refuses a schema of another program
    await upgrade(connection, implementation.scripts)
    return implementation


async def remove_schema(connection: Connection) -> bool:
    """Remove all that this package has installed in a database of the released pgflow; False: there was nothing.

    Raises:
        UsageError: the database has the classic schema, whose runs and bindings are rows of this package.
        PgflowPrefectError: an object of another program depends on ours, or a table stayed locked too long.
    """
    engine, adapter = await read_versions(connection)
    found = (await find_schema(connection)).implementation
    if engine or found is CLASSIC:
        raise UsageError(
            f"database {connection.info.dbname!r} has the schema that this program installs itself: its workflows and "
            "runs are rows there. Drop the database, or its schemas pgflow and pgflow_prefect, yourself"
        )
    is_there = bool(adapter) or await _has_adapter(connection)
    if found is None and not is_there:
        return False
    with translate_errors():  # where the schema is gone, messages of moved steps may still be missing
        try:
            await connection.execute(shipped_path("sql", "released/remove.sql").read_bytes())
        except DependentObjectsStillExist as error:
            raise PgflowPrefectError(
                f"an object that is not of this program depends on the schema pgflow_prefect of database "
                f"{connection.info.dbname!r}: {error.diag.message_detail}. Nothing was removed: drop that object first"
            ) from error
    return is_there


async def _has_adapter(connection: Connection) -> bool:
    with translate_errors():
        return await (await connection.execute(QUERIES["find_adapter"])).fetchone() is not None
