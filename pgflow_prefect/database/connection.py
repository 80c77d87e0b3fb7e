"""Finds the database of the settings and opens it, with errors that say what to do."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlencode

import psycopg
from psycopg import pq, sql
from psycopg.abc import Buffer
from psycopg.adapt import AdaptersMap, Loader
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row
from psycopg.types.json import set_json_loads
from psycopg_pool import AsyncConnectionPool

from pgflow_prefect.database.dsn import check_dsn
from pgflow_prefect.database.embedded import default_directory, start_embedded
from pgflow_prefect.database.json_loader import load_json
from pgflow_prefect.database.link import BOUND, BoundedConnection
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError
from pgflow_prefect.settings import Settings

Row = dict[str, object]
Connection = psycopg.AsyncConnection[Row]
Pool = AsyncConnectionPool[Connection]

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)  # of PostgreSQL's timestamps
_EARLIEST, _LATEST = datetime(1, 1, 3, tzinfo=UTC), datetime(9999, 12, 29, tzinfo=UTC)  # and in any time zone


class _UtcLoader(Loader):
    """Reads a binary timestamptz, which no DateStyle and no TimeZone changes."""

    format = pq.Format.BINARY

    def load(self, data: Buffer) -> datetime:
        microseconds = int.from_bytes(data, "big", signed=True)
        # An infinite time, or one beyond Python's years, becomes Python's last time, so that an odd row hides no other.
        try:
            return min(max(_EPOCH + timedelta(microseconds=microseconds), _EARLIEST), _LATEST)
        except OverflowError:
            return _LATEST if microseconds > 0 else _EARLIEST


ADAPTERS = AdaptersMap(psycopg.adapters)
"""Reads the values of our own statements. Their results are binary, so that DateStyle, IntervalStyle,
extra_float_digits and bytea_output of a role or a database don't matter."""

ADAPTERS.register_loader("timestamptz", _UtcLoader)
set_json_loads(load_json, ADAPTERS)

_KEEPALIVES = {
    "keepalives_idle": "30",  # seconds
    "keepalives_interval": "10",  # seconds
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",  # milliseconds
}

LIBPQ_VARIABLES = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE", "PGSERVICEFILE")


def find_dsn(settings: Settings) -> str:
    """Return the connection string of the database; start the embedded server if the settings name none.

    The setting `dsn` (`--dsn`, `PGFLOW_DSN`) comes first, then libpq's own variables (an empty string lets libpq
    read them), then the embedded server in the user's data directory.

    Raises:
        UsageError: the setting is not a connection string, or has a password that takes its place apart.
        DatabaseUnavailableError: nothing is named, and there is no embedded server, or it does not start.
    """
    if settings.dsn is not None and (dsn := settings.dsn.get_secret_value()):
        check_dsn(dsn)
        return dsn
    if any(os.environ.get(name) for name in LIBPQ_VARIABLES):
        return ""
    return start_embedded(default_directory()).get_uri()


def complete_dsn(dsn: str) -> str:
    """Add the values of libpq's variables to a connection string, so that it means the same in another environment."""
    if dsn:
        return dsn
    said = [each for each in pq.Conninfo.get_defaults() if each.val and each.val != each.compiled]
    return make_conninfo(**{each.keyword.decode(): each.val.decode() for each in said if each.val})


async def connect(dsn: str, *, timeout: float, bound: float | None = BOUND) -> Connection:  # noqa: ASYNC109  libpq's
    """Open one autocommit connection.

    Args:
        dsn: from `find_dsn`.
        timeout: seconds to wait for the server; libpq takes whole ones.
        bound: seconds that a statement may take; None for no limit.

    Raises:
        DatabaseUnavailableError: with libpq's reason, which names host, user and database and no password.
        PgflowPrefectError: the database has no encoding.
    """
    try:
        connection = await BoundedConnection.connect(
            with_timeout(dsn, timeout), autocommit=True, prepare_threshold=None, row_factory=dict_row, context=ADAPTERS
        )
    except psycopg.OperationalError as error:
        raise DatabaseUnavailableError(
            f"can't connect to PostgreSQL: {error}\n"
            "check that it runs and that --dsn, PGFLOW_DSN or the PG* variables name it"
        ) from error
    connection.bound = bound
    if connection.info.parameter_status("server_encoding") == "SQL_ASCII":  # all text would arrive as bytes
        name = connection.info.dbname
        await connection.close()
        raise PgflowPrefectError(
            f"database {name!r} has the encoding SQL_ASCII, which says nothing of what a text means: "
            "use one that was created with ENCODING 'UTF8'"
        )
    return connection


@asynccontextmanager
async def open_pool(
    dsn: str,
    *,
    size: int,
    timeout: float,  # noqa: ASYNC109
    bound: float | None = BOUND,
) -> AsyncIterator[Pool]:
    """Open a pool of at most `size` connections that works behind a pooler in transaction mode, too.

    With autocommit, each statement is a transaction. Nothing is prepared, because the next statement may meet another
    session.

    Args:
        dsn: from `find_dsn`.
        size: connections at most.
        timeout: seconds to wait for the server, and for a free connection.
        bound: seconds that a statement may take; None for no limit.
    """
    # The pool would wait, and then hide libpq's reason.
    opened = [await connect(dsn, timeout=timeout, bound=bound)]

    class Pooled(BoundedConnection):
        @classmethod
        async def connect(cls, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401  as psycopg has it
            return opened.pop() if opened else await super().connect(*arguments, **options)

    pool: Pool = AsyncConnectionPool(
        with_timeout(dsn, timeout),
        connection_class=Pooled,
        kwargs={"autocommit": True, "prepare_threshold": None, "row_factory": dict_row, "context": ADAPTERS},
        min_size=1,
        max_size=size,
        timeout=timeout,
        # Its pauses double without a limit: a new series of tries finds a returning server sooner.
        reconnect_timeout=timeout,
        configure=_configure,
        open=False,
    )
    Pooled.bound = bound
    try:
        async with pool:
            await pool.wait()  # the pool would open another one for a caller that asks before it has got this one
            yield pool
    finally:
        for connection in opened:  # the pool was closed before it took it
            await connection.close()


async def _configure(connection: Connection) -> None:
    # A pooler may deliver notifications to a connection that never listened; psycopg would keep them.
    connection.add_notify_handler(lambda notification: None)
    # For transaction blocks: the engine waits for a lock and then reads, and must not read from an older snapshot.
    await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)


def create_database(dsn: str, name: str) -> str:
    """Create a database beside the one that is named, and return its connection string."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return make_conninfo(dsn, dbname=name)


def run_script(dsn: str, script: str) -> list[Row]:
    """Run SQL as a script, and return the rows of its last statement, if it has any."""
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        cursor = connection.execute(script.encode())
        return cursor.fetchall() if cursor.description else []


def to_sqlalchemy_url(dsn: str) -> str:
    """Return a connection string in SQLAlchemy's form for asyncpg."""
    parts: dict[str, str] = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    login = quote(parts.get("user", ""), safe="")
    if "password" in parts:
        login += f":{quote(parts['password'], safe='')}"
    # As a query, which also takes a socket's directory in place of a host's name.
    place = urlencode([(name, parts[name]) for name in ("host", "port") if name in parts])
    return f"postgresql+asyncpg://{login}@/{quote(parts.get('dbname', ''), safe='')}?{place}"


def with_timeout(dsn: str, timeout: float) -> str:
    """Add time-outs that the user has not set, and our name for `pg_stat_activity`.

    The kernel's time-outs find a machine that has vanished from the network. They don't find a proxy that stops
    forwarding but still acknowledges everything. For that case, statements have a bound of their own.
    """
    given = conninfo_to_dict(dsn)
    defaults = {"connect_timeout": str(max(2, round(timeout))), "application_name": "pgflow-prefect", **_KEEPALIVES}
    wanted = {name: value for name, value in defaults.items() if name not in given}
    # Independent of the database's encoding. It is a start-up parameter, which poolers keep for each client.
    return make_conninfo(dsn, **wanted, client_encoding="utf8")
