"""Sends the store's statements to the database."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from enum import StrEnum
from time import monotonic
from typing import NamedTuple
from uuid import UUID

from psycopg.errors import IdleSessionTimeout, ReadOnlySqlTransaction

from pgflow_prefect.database.connection import Pool, Row
from pgflow_prefect.database.implementations import CLASSIC, Implementation
from pgflow_prefect.database.link import UnansweredError
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.translation import ReadOnlyError, translate_errors
from pgflow_prefect.errors import TransientError, UnstorableTextError


class LeaseTerms(NamedTuple):
    """The terms on which this process holds its runs.

    Attributes:
        held_by: the process's name for people.
        lease: in seconds.
        max_recoveries: owners in a row that may vanish while no further step completes.
        holder: the identity of this process as JSON, so that its machine can tell whether it is dead; None if unknown.
    """

    held_by: str
    lease: float
    max_recoveries: int
    holder: str | None = None


class Backend(StrEnum):
    """The server's activity in a session."""

    BUSY = "busy"
    """The server works, or has not been idle for long."""

    IDLE = "idle"
    """The server has waited for the client."""

    GONE = "gone"
    """There is no such session."""

    UNKNOWN = "unknown"
    """A pooler stands between, so the client does not know its session on the server."""


def describe_read_only(row: Row) -> str | None:
    """Return why a database is read-only, from the row of `read_writability`; None if it is not."""
    name = row["database"]
    if row["in_recovery"]:
        return f"database {name!r} is read-only: its server is a standby. Connect to the primary"
    if row["read_only"]:
        return f"database {name!r} is read-only: default_transaction_read_only is on"
    return None


class Statements:
    """A pool of connections, and the terms on which this process holds runs.

    Attributes:
        lease_terms: the terms.
        implementation: the database's implementation of the contract.
        answered_at: when a statement succeeded last, by the monotonic clock.
    """

    def __init__(
        self, pool: Pool, lease_terms: LeaseTerms, *, in_blocks: bool = False, implementation: Implementation = CLASSIC
    ) -> None:
        self._pool = pool
        self.implementation = implementation
        self._in_blocks = in_blocks  # role or database have another default than READ COMMITTED
        self._is_suspect = False  # the pool's other connections lead to the same server, which is silent or read-only
        self.lease_terms = lease_terms
        self.answered_at = monotonic()

    @property
    def connections(self) -> int:
        """The greatest number of connections that the pool opens."""
        return self._pool.max_size

    async def _fetch(self, query: str, *, run_id: UUID | None = None, **parameters: object) -> list[Row]:
        for _ in range(self.connections):  # all of them may have been idle for as long
            try:
                return await self._fetch_once(query, run_id=run_id, **parameters)
            except TransientError as error:
                # The server had ended the session before the statement arrived, so nothing of it was executed.
                if not isinstance(error.__cause__, IdleSessionTimeout):
                    raise
        return await self._fetch_once(query, run_id=run_id, **parameters)

    async def _fetch_once(self, query: str, *, run_id: UUID | None = None, **parameters: object) -> list[Row]:
        with translate_errors(run_id):
            # Without the connection's own block, which would end a transaction: here there never is one.
            connection = await self._pool.getconn()
            try:
                async with connection.transaction() if self._in_blocks else nullcontext():
                    cursor = await connection.execute(QUERIES[query], {"run_id": run_id, **parameters}, binary=True)
                    rows = await cursor.fetchall()
            except (UnansweredError, ReadOnlySqlTransaction):
                self._is_suspect = True
                raise
            finally:
                await self._pool.putconn(connection)
        self.answered_at = monotonic()
        return rows

    async def probe(self) -> None:
        """Ask the server for any answer.

        Raises:
            TransientError: it does not answer.
        """
        await self._fetch("probe")

    async def look_at_backend(self, pid: int, seconds: float) -> Backend:
        """Return the server's activity in a session of this role.

        Args:
            pid: the session's process, as its client knows it.
            seconds: how long a session must have been idle to count as idle.

        Raises:
            TransientError: it does not answer.
        """
        with translate_errors():
            async with self._pool.connection() as connection:
                own = connection.info.backend_pid
                parameters = {"pid": pid, "own": own, "seconds": seconds}
                row = await (await connection.execute(QUERIES["look_at_backend"], parameters, binary=True)).fetchone()
        assert row is not None
        self.answered_at = monotonic()
        return Backend(str(row["found"]))

    async def end_backend(self, pid: int, age: float) -> None:
        """End a session of this role that is idle in a transaction.

        Args:
            pid: the session's process, as its client knew it.
            age: the least age of the session in seconds: a younger session belongs to another client.

        Raises:
            PgflowPrefectError: the role may not, or the server does not answer.
        """
        async with self._pool.connection() as connection:
            parameters = {"pid": pid, "own": connection.info.backend_pid, "age": age}
            with translate_errors():
                await connection.execute(QUERIES["end_backend"], parameters)

    async def check_writable(self) -> None:
        """Check that the database can be written.

        Raises:
            ReadOnlyError: with the reason.
            TransientError: it does not answer.
        """
        [row] = await self._fetch("read_writability")
        if reason := describe_read_only(row):
            self._is_suspect = True  # a new connection may lead to the primary
            raise ReadOnlyError(reason)

    async def extend_leases(self, held: Iterable[tuple[UUID, int]]) -> list[tuple[UUID, int, str]]:
        """Extend the leases of runs, given with the epochs in which they were taken.

        Returns:
            Run, epoch, and how it is held: `held`, `lost`, `completed` or `ended`.
        """
        run_ids, epochs = zip(*held, strict=True)
        rows = await self._fetch(
            "extend_leases", run_ids=list(run_ids), epochs=list(epochs), lease=self.lease_terms.lease
        )
        return [(UUID(str(row["run_id"])), int(str(row["epoch"])), str(row["holds"])) for row in rows]

    async def _fetch_telling(
        self, query: str, texts: Mapping[str, str | list[str]], *, run_id: UUID | None = None, **parameters: object
    ) -> list[Row]:
        """Execute a statement with texts for people, and escape characters that the database's encoding lacks."""
        try:
            return await self._fetch(query, run_id=run_id, **parameters, **texts)
        except UnstorableTextError:
            escaped = {
                name: escape(text) if isinstance(text, str) else [*map(escape, text)] for name, text in texts.items()
            }
            return await self._fetch(query, run_id=run_id, **parameters, **escaped)

    async def drop_broken_connections(self) -> None:
        """Close the idle connections that no longer answer, so that the next statement does not meet one.

        After a silent link, or on a read-only server, it replaces all of them: to ask each one would take as long
        again, and a new connection may lead to another server.
        """
        if self._is_suspect:
            self._is_suspect = False
            await self._pool.drain()
        else:
            await self._pool.check()


def escape(text: str) -> str:
    """Return a text that fits every encoding: a euro sign as \\u20ac."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


def to_setting(seconds: float | None) -> str | None:
    """Return a time-out in the server's form; None for the database's setting."""
    return None if seconds is None else f"{seconds * 1000:.0f}ms"
