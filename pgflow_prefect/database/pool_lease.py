"""Keeping the lease of an attempt that this process of a work pool does."""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow

from pgflow_prefect.database.connection import with_timeout
from pgflow_prefect.database.link import bounded
from pgflow_prefect.database.pool_statements import PoolStatements
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError
from pgflow_prefect.models import PoolAttempt

_logger = logging.getLogger(__name__)


class PoolLease:
    """Extends the lease of one attempt from a thread and a connection of its own, until the block ends.

    So the process keeps its attempt while it imports the handlers, and while a handler blocks the event loop. If the
    server has no room for that connection, the process's other connections extend the lease.
    """

    def __init__(
        self,
        statements: PoolStatements,
        attempt: PoolAttempt,
        holder: UUID,
        lease: float,
        *,
        dsn: str,
        connect_timeout: float,
    ) -> None:
        """Prepare to extend the lease three times in its length. Call it in the event loop of the statements.

        Args:
            statements: of the connections that extend the lease if there is no room for another one.
            attempt: of a step, which this process has claimed.
            holder: this process.
            lease: seconds for which the process may be silent.
            dsn: the database.
            connect_timeout: seconds.
        """
        self._statements = statements
        self._attempt = attempt
        self._holder = holder
        self._lease = lease
        self._dsn = with_timeout(dsn, connect_timeout)
        self._loop = asyncio.get_running_loop()
        self._closing = threading.Event()
        self._is_lost = False
        self._on_lost: Callable[[], None] = lambda: None
        self._connection: psycopg.Connection[TupleRow] | None = None
        self._thread = threading.Thread(target=self._keep, name="pgflow-pool-lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._connection is not None:
            self._thread.join(timeout=1)  # a daemon: no exit waits for it if the database hangs

    def tell(self, on_lost: Callable[[], None]) -> None:
        """Call back, in the event loop, once no run waits for the attempt any more; at once if that is so already."""
        self._on_lost = on_lost
        if self._is_lost:
            on_lost()

    def _keep(self) -> None:
        wait = self._lease / 3
        while not self._closing.wait(wait):
            wait = self._lease / 3
            try:
                if not self._extend():
                    with suppress(RuntimeError):  # the event loop has come to its end
                        self._loop.call_soon_threadsafe(self._lose)
                    break
            except (psycopg.Error, PgflowPrefectError, TimeoutError) as error:
                _logger.warning("%s: the lease is not extended: %s", self._attempt.task.step_slug, str(error).strip())
                wait = self._lease / 10
        self._disconnect()

    def _lose(self) -> None:
        self._is_lost = True
        self._on_lost()

    def _extend(self) -> bool:
        tries = 1 if self._connection is None else 2  # one that was open may have died long ago
        while True:
            tries -= 1
            try:
                return self._extend_alone()
            except psycopg.Error as error:
                self._disconnect()
                if not tries:
                    _logger.info("other connections have to extend the lease: %s", str(error).strip())
                    return self._extend_through_loop()

    def _extend_alone(self) -> bool:
        if self._connection is None:
            self._connection = psycopg.connect(self._dsn, autocommit=True, prepare_threshold=None)
        given = {"run_id": self._attempt.run_id, "holder": self._holder, "lease": self._lease}
        # A third of the lease: there has to be time for another try.
        with bounded(self._connection, self._lease / 3):
            cursor = self._connection.execute(QUERIES["extend_pool_step"], given | self._attempt.as_parameters())
            [[extended]] = cursor.fetchall()
        return bool(extended)

    def _extend_through_loop(self) -> bool:
        async def extend() -> bool:
            try:
                return await self._statements.extend_pool_step(self._attempt, self._holder, self._lease)
            except DatabaseUnavailableError:
                await self._statements.drop_broken_connections()
                raise

        try:
            future = asyncio.run_coroutine_threadsafe(extend(), self._loop)
        except RuntimeError:  # the event loop has come to its end, and the attempt with it
            return True
        try:
            return future.result(self._lease / 3)
        except TimeoutError:
            future.cancel()
            raise TimeoutError("no answer through other connections either") from None

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
            self._connection = None
