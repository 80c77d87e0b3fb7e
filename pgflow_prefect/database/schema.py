"""Installing the two schemas, and telling whether they are there."""

from psycopg import errors

from pgflow_prefect.database.connection import Connection
from pgflow_prefect.database.link import without_bound
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.translation import translate_errors
from pgflow_prefect.errors import PgflowPrefectError, SchemaMissingError
from pgflow_prefect.shipped import shipped_path

ENGINE_VERSION = 3
ADAPTER_VERSION = 7

SCRIPTS = ("pgflow.sql", "classic/pgflow_prefect.sql", "classic/definitions.sql", "classic/runs.sql")
"""What installs the classic schemas, in this order; the last one says which version is there."""


def read_scripts() -> str:
    """Return the SQL that installs or upgrades both schemas, as `psql` or an SQL editor take it."""
    return "\n".join(shipped_path("sql", name).read_text(encoding="utf-8") for name in SCRIPTS)


async def read_versions(connection: Connection) -> tuple[int, int]:
    """Return the installed versions of engine and adapter; 0 for one that is missing."""
    with translate_errors():
        row = await (await connection.execute(QUERIES["find_versions"])).fetchone()
    assert row is not None
    return int(str(row["engine"] or 0)), int(str(row["adapter"] or 0))


async def _find_foreign_table(connection: Connection) -> str | None:
    with translate_errors():
        row = await (await connection.execute(QUERIES["find_foreign_table"])).fetchone()
    return None if row is None else str(row["name"])


def describe_foreign_schema(table: str) -> str:
    """Say that another program has a schema of our name, which this table shows."""
    whose = "the pgflow that npm has (pgflow.dev)" if table == "flows" else "another program"
    return (
        f"the schema pgflow belongs to {whose}: it has pgflow.{table}, and no pgflow.workflows with a slug. "
        "`pgflow-prefect` needs a database of its own"
    )


async def check_schema(connection: Connection) -> None:
    """Make sure that the database has both schemas, in the versions that this package needs.

    Raises:
        SchemaMissingError: with the command that installs them.
    """
    engine, adapter = await read_versions(connection)
    if engine == 0 and (table := await _find_foreign_table(connection)) is not None:
        raise SchemaMissingError(f"database {connection.info.dbname!r}: {describe_foreign_schema(table)}")
    if engine == 0 or adapter == 0:
        missing = " and ".join(
            name for name, version in (("pgflow", engine), ("pgflow_prefect", adapter)) if not version
        )
        raise SchemaMissingError(
            f"database {connection.info.dbname!r} has no schema {missing}: run `pgflow-prefect init` first"
        )
    if engine < ENGINE_VERSION or adapter < ADAPTER_VERSION:
        raise SchemaMissingError(
            f"the schema of database {connection.info.dbname!r} is older than this program: "
            "run `pgflow-prefect init` to upgrade it"
        )


async def has_other_isolation(connection: Connection) -> bool:
    """Tell whether role or database have another default than READ COMMITTED."""
    with translate_errors():
        row = await (await connection.execute(QUERIES["read_isolation"])).fetchone()
    return row is not None and row["isolation"] != "read committed"


async def install_schema(connection: Connection) -> None:
    """Install or upgrade both schemas; changes nothing where they are current.

    Raises:
        PgflowPrefectError: the database user may not create them, or a table stayed locked too long.
    """
    with translate_errors(), without_bound():
        try:
            for name in SCRIPTS:
                await connection.execute(shipped_path("sql", name).read_bytes())
        except errors.LockNotAvailable as error:
            raise PgflowPrefectError(
                f"another transaction holds a table of database {connection.info.dbname!r} that has to be changed: "
                "let that transaction end, and run `pgflow-prefect init` again"
            ) from error
