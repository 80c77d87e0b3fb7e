"""The connections that handlers get: psycopg's own, and one that is opened only when it is used."""

from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, overload

import psycopg
from psycopg.abc import Params, PQGen
from psycopg.rows import AsyncRowFactory, TupleRow

from pgflow_prefect.database.connection import with_timeout
from pgflow_prefect.database.link import BOUND

if TYPE_CHECKING:
    from psycopg.abc import QueryNoTemplate  # since psycopg 3.3

T = TypeVar("T")
R = TypeVar("R")

SyncConnection = psycopg.Connection[TupleRow]
AsyncConnection = psycopg.AsyncConnection[TupleRow]

_READ_ONLY = "the database is read-only: a standby, or default_transaction_read_only is on"


class _WatchedConnection(psycopg.Connection[TupleRow]):
    """psycopg's connection, which also tells since when it waits for the server, by the monotonic clock."""

    _waits_since: float | None = None

    def wait(self, gen: PQGen[T], *arguments: Any, **options: Any) -> T:  # noqa: ANN401  as psycopg has it
        self._waits_since = monotonic()
        try:
            return super().wait(gen, *arguments, **options)
        finally:
            self._waits_since = None


class _WatchedAsyncConnection(psycopg.AsyncConnection[TupleRow]):
    """Likewise."""

    _waits_since: float | None = None

    async def wait(self, gen: PQGen[T], *arguments: Any, **options: Any) -> T:  # noqa: ANN401  as psycopg has it
        self._waits_since = monotonic()
        try:
            return await super().wait(gen, *arguments, **options)
        finally:
            self._waits_since = None


@dataclass(frozen=True)
class Connector:
    """Opens the connections of steps: one for each step, outside of the pool that all steps of a run share.

    Attributes:
        dsn: from `find_dsn`.
        timeout: seconds to wait for the server.
        patience: seconds for which it tries again while the server has no free connection.
        bound: seconds that a statement of ours may take on it. Also the seconds for which a handler may wait for an
            answer while the server is idle.
    """

    dsn: str = field(repr=False)
    timeout: float
    patience: float = 0
    bound: float = BOUND

    def open(self) -> SyncConnection:
        """Open a connection for a thread.

        Raises:
            psycopg.OperationalError: the server has none at this moment.
        """
        connection: SyncConnection = _WatchedConnection.connect(
            with_timeout(self.dsn, self.timeout), autocommit=True, prepare_threshold=None
        )
        if _is_read_only(connection):
            connection.close()
            raise psycopg.OperationalError(_READ_ONLY)
        return connection

    async def open_async(self) -> AsyncConnection:
        """Open a connection for the event loop.

        Raises:
            psycopg.OperationalError: the server has none at this moment.
        """
        connection: AsyncConnection = await _WatchedAsyncConnection.connect(
            with_timeout(self.dsn, self.timeout), autocommit=True, prepare_threshold=None
        )
        if _is_read_only(connection):
            await connection.close()
            raise psycopg.OperationalError(_READ_ONLY)
        return connection


def _is_read_only(connection: SyncConnection | AsyncConnection) -> bool:
    """Tell whether the step's completion could not be written; PostgreSQL before 14 does not say so by itself."""
    reported = (connection.info.parameter_status(name) for name in ("in_hot_standby", "default_transaction_read_only"))
    return "on" in reported


class LazyConnection:
    """An async connection that opens at its first use; `await` returns the connection itself."""

    def __init__(self, open_connection: Callable[[], Awaitable[AsyncConnection]]) -> None:
        self._open = open_connection

    def __await__(self) -> Generator[Any, None, AsyncConnection]:
        return self._open().__await__()

    async def execute(
        self,
        query: "QueryNoTemplate",
        params: Params | None = None,
        *,
        prepare: bool | None = None,
        binary: bool = False,
    ) -> psycopg.AsyncCursor[TupleRow]:
        """Execute a statement, as `psycopg.AsyncConnection.execute` does."""
        return await (await self).execute(query, params, prepare=prepare, binary=binary)

    @overload
    def cursor(self, *, binary: bool = False) -> AbstractAsyncContextManager[psycopg.AsyncCursor[TupleRow]]: ...

    @overload
    def cursor(
        self, *, binary: bool = False, row_factory: AsyncRowFactory[R]
    ) -> AbstractAsyncContextManager[psycopg.AsyncCursor[R]]: ...

    @overload
    def cursor(
        self, name: str, *, binary: bool = False, scrollable: bool | None = None, withhold: bool = False
    ) -> AbstractAsyncContextManager[psycopg.AsyncServerCursor[TupleRow]]: ...

    @overload
    def cursor(
        self,
        name: str,
        *,
        binary: bool = False,
        row_factory: AsyncRowFactory[R],
        scrollable: bool | None = None,
        withhold: bool = False,
    ) -> AbstractAsyncContextManager[psycopg.AsyncServerCursor[R]]: ...

    def cursor(self, *arguments: Any, **options: Any) -> AbstractAsyncContextManager[Any]:
        """Open a cursor, for `async with`; the arguments are those of `psycopg.AsyncConnection.cursor`."""
        return self._open_cursor(*arguments, **options)

    @asynccontextmanager
    async def _open_cursor(self, *arguments: Any, **options: Any) -> AsyncIterator[Any]:  # noqa: ANN401
        async with (await self).cursor(*arguments, **options) as cursor:
            yield cursor

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[psycopg.AsyncTransaction]:
        """Set a savepoint, for `async with`, as `psycopg.AsyncConnection.transaction` does."""
        async with (await self).transaction(savepoint_name, force_rollback) as transaction:
            yield transaction

    if not TYPE_CHECKING:  # a type checker says what is missing

        def __getattr__(self, name: str) -> Any:  # noqa: ANN401
            raise AttributeError(f"for {name!r}, get the connection itself: `connection = await context.connection`")
