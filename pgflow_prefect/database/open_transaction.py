"""An open transaction on a handler's own connection: it begins, writes the step's completion, and commits."""

import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack, suppress
from typing import LiteralString

import psycopg
from psycopg.rows import dict_row

from pgflow_prefect.database.connection import Row
from pgflow_prefect.database.link import bounded, cut
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.step_connection import AsyncConnection, SyncConnection

HELD_UP = frozenset({"57014", "55P03"})
"""SQLSTATEs after which the same completion may go through in the same transaction: it was cancelled, or has waited for
a lock for too long."""

_CANCEL_TIMEOUT = 5.0  # seconds
_TRANSACTION_TIMEOUT_SINCE = 170000  # the server's version

# One message, so one round trip. The handler's writes survive if the wait for the run's lock is cut short. The
# completion itself is not in the savepoint: it has the same transaction id as the handler's writes.
_COMPLETE: LiteralString = f"{QUERIES['lock_run_first']}; {QUERIES['complete_pending_step']}"
_COMPLETE_ITEMS: LiteralString = f"{QUERIES['lock_run_first']}; {QUERIES['complete_pending_items']}"
_GO_BACK: LiteralString = "ROLLBACK TO SAVEPOINT pgflow_report"


class ThreadTransaction:
    """An open transaction of a sync handler: every call blocks, in a thread."""

    def __init__(self, connection: SyncConnection, bound: float) -> None:
        self.connection = connection
        self._transaction = ExitStack()
        try:
            with bounded(connection, bound):
                self._transaction.enter_context(connection.transaction())
                connection.execute(_find_stay_open(connection))
        except BaseException:
            connection.close()
            raise

    def complete(self, parameters: Mapping[str, object]) -> Row | None:
        """Store the result of a step or of items, commit if that is accepted, and return what their statement does."""
        # A cursor that puts the parameters into the text, because only then may a message have two statements.
        with psycopg.ClientCursor(self.connection, row_factory=dict_row) as cursor:
            cursor.execute(_find_completion(parameters), parameters)
            while cursor.nextset():
                pass
            row = cursor.fetchone()
        if row is not None and row["accepted"]:
            self._transaction.close()  # COMMIT
        return row

    def go_back(self) -> None:
        """Make the transaction what it was before a completion that was held up."""
        self.connection.execute(_GO_BACK)

    def cut(self) -> None:
        """Let the server roll back while the handler's thread may be in the middle of a statement.

        A close would free libpq's memory under that thread. Instead, this stops all sending and cancels the running
        statement, and the server sees the end of the link.
        """
        with (
            suppress(psycopg.Error, OSError),  # broken or closed already: just as good
            socket.fromfd(self.connection.fileno(), -1, -1) as link,
        ):
            link.shutdown(socket.SHUT_WR)
            self.connection.cancel_safe(timeout=_CANCEL_TIMEOUT)
        cut(self.connection)  # the thread would wait for a silent server for ever


class LoopTransaction:
    """An open transaction of an async handler."""

    def __init__(self, connection: AsyncConnection) -> None:
        self.connection = connection
        self._transaction = AsyncExitStack()

    async def begin(self) -> None:
        """Begin it."""
        await self._transaction.enter_async_context(self.connection.transaction())
        await self.connection.execute(_find_stay_open(self.connection))

    async def complete(self, parameters: Mapping[str, object]) -> Row | None:
        """Store the result of a step or of items, commit if that is accepted, and return what their statement does."""
        async with psycopg.AsyncClientCursor(self.connection, row_factory=dict_row) as cursor:
            await cursor.execute(_find_completion(parameters), parameters)
            while cursor.nextset():
                pass
            row = await cursor.fetchone()
        if row is not None and row["accepted"]:
            await self._transaction.aclose()  # COMMIT
        return row

    async def go_back(self) -> None:
        """Make the transaction what it was before a completion that was held up."""
        await self.connection.execute(_GO_BACK)

    async def commit(self, query: str, parameters: Mapping[str, object]) -> None:
        """Execute a statement of ours, and commit."""
        await self.connection.execute(QUERIES[query], parameters)
        await self._transaction.aclose()


def _find_completion(parameters: Mapping[str, object]) -> LiteralString:
    return _COMPLETE_ITEMS if "item_indexes" in parameters else _COMPLETE


def _find_stay_open(connection: SyncConnection | AsyncConnection) -> LiteralString:
    return QUERIES["stay_open_17" if connection.info.server_version >= _TRANSACTION_TIMEOUT_SINCE else "stay_open"]
