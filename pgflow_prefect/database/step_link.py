"""Watches the link of a step's own connection: a handler's statement has no bound, and a dead link never answers."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

import anyio
from psycopg.pq import TransactionStatus

from pgflow_prefect.database.link import cut
from pgflow_prefect.database.statements import Backend, Statements
from pgflow_prefect.database.step_connection import AsyncConnection, Connector, SyncConnection
from pgflow_prefect.errors import PgflowPrefectError, TransientError

_DEAD = {
    Backend.IDLE: "the server is idle there",
    Backend.GONE: "the server has no such session any more",
    None: "no other connection gets an answer either",
}
"""Why a link is dead, by what the server says of its session; None where the server says nothing."""


class StepLink:
    """Cuts the link if its handler waits for an answer that can't come.

    The server may work on a handler's statement for any time. So the watch asks the server, on a connection of the
    pool. A link is dead if the handler waits, and the session has been idle for as long or is gone. Behind a pooler,
    the server knows nothing of a single client.
    """

    def __init__(
        self,
        connection: SyncConnection | AsyncConnection,
        connector: Connector,
        statements: Statements,
        tell: Callable[[str, float], None],
    ) -> None:
        """Prepare to watch a connection that was opened just now.

        Args:
            connection: of the step.
            connector: has the bounds for a silent link and for a silent server.
            statements: the pool that asks the server.
            tell: called with the reason for the cut, and with the seconds that the handler had waited.
        """
        self._connection = connection
        self._connector = connector
        self._statements = statements
        self._tell = tell
        self._pid = connection.info.backend_pid
        self._opened_at = monotonic()

    async def keep_watch(self) -> None:
        """Return when the link is cut; until then, go on for ever."""
        bound = pause = self._connector.bound
        while True:
            await asyncio.sleep(pause)
            since, looked_at = self._find_wait(), monotonic()
            pause = bound if since is None else max(0, since + bound - looked_at)
            if since is None or pause > 0:
                continue
            reason = await self._find_death(since)
            if reason is not None and self._find_wait() == since:
                cut(self._connection)
                self._tell(reason, monotonic() - since)
                return
            pause = max(0, looked_at + bound - monotonic())  # a server that gave no answer has taken this time already

    async def _find_death(self, since: float) -> str | None:
        """Return why the link is dead; None if it may be alive."""
        try:
            return _DEAD.get(await self._statements.look_at_backend(self._pid, self._connector.bound))
        except TransientError:
            quiet = monotonic() - max(since, self._statements.answered_at)
            # No lease was extended for this time, so the transaction is as good as lost.
            return _DEAD[None] if quiet > self._connector.patience else None

    def _find_wait(self) -> float | None:
        """Return since when the handler waits for the server; None while it does not."""
        if self._connection.info.transaction_status is not TransactionStatus.ACTIVE:
            return None
        waits_since: float | None = getattr(self._connection, "_waits_since", None)
        return waits_since

    async def end_session(self) -> None:
        """End the session after its link broke: the server may not have noticed, and would keep its locks."""
        with suppress(PgflowPrefectError), anyio.move_on_after(self._connector.timeout):
            await self._statements.end_backend(self._pid, monotonic() - self._opened_at)
