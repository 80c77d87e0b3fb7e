"""Reads DAGs and runs from Airflow's metadata database."""

from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import LiteralString

import psycopg
from psycopg import IsolationLevel, errors

from pgflow_prefect.database.airflow.runs import RunStatements
from pgflow_prefect.database.connection import Connection, Row, connect
from pgflow_prefect.database.dsn import check_dsn
from pgflow_prefect.database.queries import read_statements
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError, UsageError

QUERIES = read_statements("airflow/queries")

TABLES = "serialized_dag, dag_run, task_instance, xcom"
"""What a role of ours reads."""

SOURCE = "--airflow-dsn or PGFLOW_AIRFLOW_DSN"
"""Where the address of Airflow's database is given, for errors."""


@dataclass(frozen=True)
class DagRow:
    """A serialized DAG, as Airflow's database has it.

    Attributes:
        dag_id: the DAG.
        size: of the document in bytes, as it is stored.
        data: JSON, or None.
        compressed: JSON, compressed by zlib, or None. Both are None where the document is too big.
    """

    dag_id: str
    size: int
    data: bytes | None
    compressed: bytes | None


class AirflowDatabase(RunStatements):
    """Airflow's metadata database. Each statement is a transaction that can only read, and so is a `snapshot`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[None]:
        """Let all statements in this block see the same moment.

        Raises:
            DatabaseUnavailableError: the server does not answer.
        """
        with _explain(self._connection):
            await self._connection.set_isolation_level(IsolationLevel.REPEATABLE_READ)
            async with self._connection.transaction():
                await self._connection.execute(QUERIES["write_bytes_as_hex"])
                yield

    async def list_dags(self) -> list[str]:
        """Return the ids of all DAGs."""
        return [str(row["dag_id"]) for row in await self._fetch(QUERIES["list_dags"])]

    async def load_dags(self, dag_ids: Collection[str], most_bytes: int) -> dict[str, DagRow]:
        """Return the newest documents of DAGs, by id; leave out those that Airflow does not know.

        Args:
            dag_ids: the DAGs.
            most_bytes: the size of a document that is read.
        """
        rows = await self._fetch(QUERIES["load_dags"], dag_ids=list(dag_ids), most_bytes=most_bytes)
        return {str(row["dag_id"]): _read_row(row) for row in rows}

    async def _fetch(self, query: LiteralString, **parameters: object) -> list[Row]:
        with _explain(self._connection):
            async with self._connection.transaction():
                return await (await self._connection.execute(query, parameters)).fetchall()

    async def _fetch_run_rows(self, query: str, **parameters: object) -> list[Row]:
        with _explain(self._connection):
            return await (await self._connection.execute(QUERIES[query], parameters, binary=True)).fetchall()


@asynccontextmanager
async def open_airflow(dsn: str, *, timeout: float) -> AsyncIterator[AirflowDatabase]:  # noqa: ASYNC109  libpq's
    """Connect to Airflow's metadata database.

    Args:
        dsn: its address.
        timeout: seconds to wait for the server.

    Raises:
        UsageError: the address can't be right.
        DatabaseUnavailableError: the server can't be reached.
    """
    check_dsn(dsn, SOURCE)
    try:
        connection = await connect(dsn, timeout=timeout)
    except DatabaseUnavailableError as error:
        raise DatabaseUnavailableError(
            f"can't connect to Airflow's database: {error.__cause__}\ncheck that it runs and that {SOURCE} names it"
        ) from error
    try:
        await connection.set_read_only(True)
        yield AirflowDatabase(connection)
    finally:
        await connection.close()


@contextmanager
def _explain(connection: Connection) -> Iterator[None]:
    """Raise errors that say what is wrong with Airflow's database, not with that of pgflow."""
    try:
        yield
    except (errors.UndefinedTable, errors.UndefinedColumn) as error:
        raise UsageError(
            f"the database {connection.info.dbname!r} has no table of Airflow that fits: {error.diag.message_primary}. "
            "Name Airflow's metadata database; if its tables are in a schema, add options=-csearch_path%3DSCHEMA"
        ) from error
    except errors.InsufficientPrivilege as error:
        raise PgflowPrefectError(
            f"the role {connection.info.user!r} may not read Airflow's database: {error.diag.message_primary}. "
            f"Let it: GRANT SELECT ON {TABLES} TO {connection.info.user}"
        ) from error
    except psycopg.Error as error:
        raise DatabaseUnavailableError(f"Airflow's database: {error.diag.message_primary or error}") from error


def _read_row(row: Row) -> DagRow:
    data, compressed, size = row["data"], row["data_compressed"], row["size"]
    assert isinstance(size, int)
    return DagRow(
        dag_id=str(row["dag_id"]),
        size=size,
        data=data.encode() if isinstance(data, str) else None,
        compressed=bytes(compressed) if isinstance(compressed, bytes | memoryview) else None,
    )
