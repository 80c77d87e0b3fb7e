"""How the statements of the store reach the database."""

from contextlib import nullcontext
from typing import NamedTuple
from uuid import UUID

from pgflow_prefect.database.connection import Pool, Row
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.translation import translate_errors


class Tenure(NamedTuple):
    """On which terms this process holds the runs that it takes.

    Attributes:
        held_by: who, for people.
        lease: in seconds.
        max_recoveries: owners in a row that may vanish while no further step completes.
        holder: the identity of this process as JSON, so that its machine can tell whether it is dead; None: unknown.
    """

    held_by: str
    lease: float
    max_recoveries: int
    holder: str | None = None


class Statements:
    """A pool of connections, and the terms on which this process holds runs."""

    def __init__(self, pool: Pool, tenure: Tenure, *, in_blocks: bool = False) -> None:
        self._pool = pool
        self._in_blocks = in_blocks  # role or database have another default than READ COMMITTED
        self.tenure = tenure

    async def _fetch(self, query: str, *, run_id: UUID | None = None, **parameters: object) -> list[Row]:
        with translate_errors(run_id):
            # Without a block of the connection's own: it would end a transaction, and here there never is one.
            connection = await self._pool.getconn()
            try:
                async with connection.transaction() if self._in_blocks else nullcontext():
                    cursor = await connection.execute(QUERIES[query], {"run_id": run_id, **parameters}, binary=True)
                    return await cursor.fetchall()
            finally:
                await self._pool.putconn(connection)

    async def drop_broken_connections(self) -> None:
        """Close the idle connections that no longer answer, so that the next statement does not meet one."""
        await self._pool.check()
