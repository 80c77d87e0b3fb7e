"""The connections that handlers get: plain ones of psycopg's, and one that is opened only when it is used."""

from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.rows import TupleRow

from pgflow_prefect.database.connection import with_timeout

SyncConnection = psycopg.Connection[TupleRow]
AsyncConnection = psycopg.AsyncConnection[TupleRow]


@dataclass(frozen=True)
class Connector:
    """How the connections of steps are opened: one each, and not of the pool, which all steps of a run share.

    Attributes:
        dsn: what `find_dsn` returned.
        timeout: seconds to wait for the server.
    """

    dsn: str = field(repr=False)
    timeout: float

    def open(self) -> SyncConnection:
        """Open a connection that is used in a thread."""
        return psycopg.Connection.connect(with_timeout(self.dsn, self.timeout), autocommit=True, prepare_threshold=None)

    async def open_async(self) -> AsyncConnection:
        """Open a connection that is used on the event loop."""
        return await psycopg.AsyncConnection.connect(
            with_timeout(self.dsn, self.timeout), autocommit=True, prepare_threshold=None
        )


class LazyConnection:
    """Stands for an async connection, which is opened at its first use; awaiting this gives the connection itself."""

    def __init__(self, open_connection: Callable[[], Awaitable[AsyncConnection]]) -> None:
        self._open = open_connection

    def __await__(self) -> Generator[Any, None, AsyncConnection]:
        return self._open().__await__()

    async def execute(self, *arguments: Any, **options: Any) -> psycopg.AsyncCursor[TupleRow]:  # noqa: ANN401
        """Execute a statement, as `psycopg.AsyncConnection.execute` does."""
        return await (await self).execute(*arguments, **options)

    @asynccontextmanager
    async def cursor(self, *arguments: Any, **options: Any) -> AsyncIterator[Any]:  # noqa: ANN401
        """Open a cursor, for `async with`."""
        async with (await self).cursor(*arguments, **options) as cursor:
            yield cursor

    @asynccontextmanager
    async def transaction(self, *arguments: Any, **options: Any) -> AsyncIterator[psycopg.AsyncTransaction]:  # noqa: ANN401
        """Set a savepoint, for `async with`."""
        async with (await self).transaction(*arguments, **options) as transaction:
            yield transaction

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        raise AttributeError(f"for {name!r}, get the connection itself: `connection = await context.connection`")
