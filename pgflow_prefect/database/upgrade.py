"""Upgrades a database in use: no claim and no report waits for longer than a moment.

Each script upgrades the database in one transaction. Four changes would take too long for a transaction:

- A big table would stay locked while its new key is built. So `init` builds the index before, `CONCURRENTLY`.
- A statement that began before the scripts goes on with the former functions, and those need the former key. So `init`
  exchanges the key after the scripts, when such statements have ended.
- Former versions marked a cancelled run by its message only. So `init` reads all ended runs before the scripts.
- The indexes that runs are taken by, and found by their dates, need columns of the scripts. So `init` builds them after
  the scripts, `CONCURRENTLY`.

If a script or an exchange meets a lock, it gives way after half a second, and tries again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import LiteralString, NamedTuple

from psycopg import errors, sql

from pgflow_prefect.database.connection import Connection, Row
from pgflow_prefect.database.link import without_bound
from pgflow_prefect.database.queries import read_statements
from pgflow_prefect.database.translation import translate_errors
from pgflow_prefect.errors import PgflowPrefectError
from pgflow_prefect.shipped import shipped_path
from pgflow_prefect.waiting import make_pauses

LOCK_PATIENCE = 30.0
"""Seconds for which a statement that needs a lock is tried again."""

BUILD_PATIENCE = 3600.0
"""Seconds that the index of a table may take; it waits for older transactions, but none waits for it."""

FORMER_PATIENCE = 10.0
"""Seconds to wait for statements that began with the former functions."""

_INTERVAL = 0.05  # seconds between two checks of these statements
_SCRIPTS_PATIENCE = b"SET LOCAL lock_timeout = '10s';"
# A server that compiles plans takes three times as long for scripts whose statements run once.
_SHORT_PATIENCE = b"SET LOCAL lock_timeout = '500ms'; SET LOCAL jit = off;"
_KEYS_FOLLOW = b"SET LOCAL pgflow.keys_follow = 'on'; "

_UPGRADES = read_statements("upgrades")


class _Prepared(NamedTuple):
    """An index that is built beside a table in use.

    Attributes:
        schema: of the table and the index.
        table: the table.
        name: of the index.
        build: the statement that builds it.
    """

    schema: LiteralString
    table: str
    name: str
    build: str

    @property
    def names(self) -> dict[str, str]:
        """What the statements about it are formatted with."""
        return {"schema": self.schema, "table": self.table, "index": self.name}


_TO_TAKE = _Prepared("pgflow", "runs", "runs_to_take", "build_index_to_take")
_FORMER_PENDING = _Prepared("pgflow", "runs", "runs_pending", "")
_DATED = _Prepared("pgflow", "runs", "runs_dated", "build_index_of_dates")
_NESTED = _Prepared("pgflow", "runs", "runs_of_parent", "build_index_of_parents")

_GIVES_WAY = (errors.LockNotAvailable, errors.DeadlockDetected)  # two `init` may wait for each other


async def upgrade(connection: Connection, scripts: tuple[str, ...]) -> None:
    """Install or upgrade with these scripts; change nothing if everything is current.

    Raises:
        PgflowPrefectError: another transaction holds a table for too long. The finished part stays, and the same call
            goes on from there.
        psycopg.Error: a script raised it.
    """
    with translate_errors(), without_bound():
        unkeyed = await _list_unkeyed(connection)
        for table in unkeyed:
            await _prepare_key(connection, table)
        await _look_for_cancelled(connection)
        for script in scripts:
            await _run_script(connection, shipped_path("sql", script).read_bytes())
        if unkeyed:
            await _await_former_statements(connection)
        await _replace_pending_index(connection)
        if "pgflow.sql" in scripts:  # else the runs have no dates
            for index in (_DATED, _NESTED):
                await _build_beside(connection, index)
        # Again, because in an empty database the scripts have made the tables.
        for table in await _list_unkeyed(connection):
            await _give_way(connection, lambda table=table: _exchange_key(connection, table))  # type: ignore[misc]


async def _look_for_cancelled(connection: Connection) -> None:
    """Find the runs that a former version may have cancelled, and store them for the script that notes them."""
    [row] = await _fetch(connection, "find_unnoted_endings")
    if row["found"]:
        with _unless_there():  # of another `init`, or of one that was interrupted
            await connection.execute(_UPGRADES["look_for_cancelled"], {})


async def _list_unkeyed(connection: Connection) -> list[str]:
    return [str(row["name"]) for row in await _fetch(connection, "find_unkeyed_tables")]


async def _prepare_key(connection: Connection, table: str) -> None:
    """Build the index of a table's future key, unless it is there."""
    await _give_way(connection, lambda: _add_task_index(connection, table))
    await _build_beside(connection, _Prepared("pgflow_prefect", table, f"{table}_by_task", "build_prepared_index"))


async def _replace_pending_index(connection: Connection) -> None:
    """Build the index that runs are taken by, in place of that of a former version."""
    if await _find_index(connection, _FORMER_PENDING):
        await _build_beside(connection, _TO_TAKE)
        await _give_way(connection, lambda: _drop_index(connection, _FORMER_PENDING))


async def _build_beside(connection: Connection, index: _Prepared) -> None:
    """Build an index while its table is in use, unless it is there and whole."""
    while not await _is_prepared(connection, index):
        await _give_way(connection, lambda: _drop_unfinished(connection, index))
        with _unless_there():  # another `init` was faster
            await _give_way(connection, lambda: _build(connection, index))


@contextmanager
def _unless_there() -> Iterator[None]:
    """Accept that a relation exists: another session has made it before, or at the same moment."""
    try:
        yield
    except errors.DuplicateTable:
        pass
    except errors.UniqueViolation as error:
        if error.diag.schema_name != "pg_catalog":
            raise


async def _build(connection: Connection, index: _Prepared) -> None:
    with _bounded_build(connection, f"{index.schema}.{index.table}"):
        async with asyncio.timeout(BUILD_PATIENCE):
            await connection.execute(_name(index.build, **index.names))


async def _find_index(connection: Connection, index: _Prepared) -> list[Row]:
    return await _fetch(connection, "find_prepared_index", index=f"{index.schema}.{index.name}")


async def _is_prepared(connection: Connection, index: _Prepared) -> bool:
    found = await _find_index(connection, index)
    return bool(found and found[0]["is_valid"])


async def _drop_unfinished(connection: Connection, index: _Prepared) -> None:
    async with connection.transaction():
        await _fetch(connection, "wait_briefly")
        await connection.execute(_name("keep_builders_out", **index.names))
        if not await _is_prepared(connection, index):  # else another `init` has just built it
            await connection.execute(_name("drop_prepared_index", **index.names))


async def _drop_index(connection: Connection, index: _Prepared) -> None:
    async with connection.transaction():
        await _fetch(connection, "wait_briefly")
        await connection.execute(_name("drop_prepared_index", **index.names))


@contextmanager
def _bounded_build(connection: Connection, table: str) -> Iterator[None]:
    try:
        yield
    except (TimeoutError, errors.LockNotAvailable) as error:
        raise PgflowPrefectError(
            f"an index of the table {table} of database {connection.info.dbname!r} could not be built: "
            "an older transaction is open. Let that transaction end, and run `pgflow-prefect init` again"
        ) from error
    except errors.QueryCanceled as error:
        raise PgflowPrefectError(
            f"an index of the table {table} of database {connection.info.dbname!r} could not be built "
            "in the statement_timeout of this role or database: run `pgflow-prefect init` as a role without one"
        ) from error


async def _add_task_index(connection: Connection, table: str) -> None:
    async with connection.transaction():
        await _fetch(connection, "wait_briefly")
        await connection.execute(_name("add_task_index", table=table))


async def _exchange_key(connection: Connection, table: str) -> None:
    async with connection.transaction():
        await _fetch(connection, "wait_briefly")
        await _fetch(connection, "key_by_task", table=table)


async def _run_script(connection: Connection, script: bytes) -> None:
    assert _SCRIPTS_PATIENCE in script, "a script says how long it waits for a lock"

    async def run() -> None:
        try:
            # In one message, so that a pooler sends it to one server.
            await connection.execute(_KEYS_FOLLOW + script.replace(_SCRIPTS_PATIENCE, _SHORT_PATIENCE))
        except _GIVES_WAY:
            await connection.rollback()
            raise

    await _give_way(connection, run)


async def _give_way(connection: Connection, change: Callable[[], Awaitable[None]]) -> None:
    """Make a change that needs a lock; while another transaction holds it, try again after longer and longer pauses."""
    pauses = make_pauses(LOCK_PATIENCE)
    while True:
        try:
            return await change()
        except _GIVES_WAY as error:
            pause = next(pauses, None)
            if pause is None:
                raise PgflowPrefectError(
                    f"another transaction holds a table of database {connection.info.dbname!r} that has to be changed: "
                    "let that transaction end, and run `pgflow-prefect init` again"
                ) from error
            await asyncio.sleep(pause)


async def _await_former_statements(connection: Connection) -> None:
    """Wait for the end of all current statements, because they may be inside a former function."""
    deadline = monotonic() + FORMER_PATIENCE
    former = await _list_under_way(connection)
    while former and monotonic() < deadline:
        await asyncio.sleep(_INTERVAL)
        former &= await _list_under_way(connection)


async def _list_under_way(connection: Connection) -> set[str]:
    return {str(row["transaction"]) for row in await _fetch(connection, "list_under_way")}


async def _fetch(connection: Connection, statement: str, **parameters: object) -> list[Row]:
    return await (await connection.execute(_UPGRADES[statement], parameters)).fetchall()


def _name(statement: str, **names: LiteralString | str) -> sql.Composed:
    """Return a statement with the names of these objects."""
    return sql.SQL(_UPGRADES[statement]).format(**{key: sql.Identifier(name) for key, name in names.items()})
