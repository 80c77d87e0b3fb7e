"""Keeping the leases of the runs that this process executes."""

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import NamedTuple, Self
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow

from pgflow_prefect.database.connection import with_timeout
from pgflow_prefect.database.link import bounded
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.statements import Statements
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError

Lost = Callable[[str], None]
"""Called from the keeper's thread when a run needs no owner any more, with the reason: `lost` to another owner,
`ended` or `completed`. After `completed`, the owner keeps the lease until it has shown that in Prefect."""

_Holding = tuple[UUID, int, str]

_logger = logging.getLogger(__name__)


class Pool(NamedTuple):
    """The connections on which a process's leases depend.

    Attributes:
        statements: the pool.
        loop: the event loop of the pool.
        patience: seconds without an answer on any connection, after which the process lets its leases run out.
    """

    statements: Statements
    loop: asyncio.AbstractEventLoop
    patience: float


class LeaseKeeper:
    """Extends leases from a thread and a connection of its own.

    So a process keeps its runs even if a handler blocks the event loop or the pool has no free connection. If the
    server has no room for that connection, the pool extends the leases.

    A process that can only extend its leases would keep its runs from every other process. So the keeper stops if no
    statement of the pool has succeeded for too long.
    """

    def __init__(self, dsn: str, lease: float, *, connect_timeout: float, pool: Pool | None = None) -> None:
        """Prepare to extend leases of this length, three times in each.

        The connection opens at the first extension, unless `open` is called. A run that ends before costs none.
        """
        self._dsn = with_timeout(dsn, connect_timeout)
        self._lease = lease
        self._pool = pool
        self._held: dict[tuple[UUID, int], Lost] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._connection: psycopg.Connection[TupleRow] | None = None
        self._silent_since: float | None = None
        self._probing: Future[None] | None = None
        self._thread = threading.Thread(target=self._keep, name="pgflow-leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._connection is not None:
            # It is a daemon, so that no exit waits for it if the database hangs, or if it has nothing to close.
            self._thread.join(timeout=1)

    @property
    def held(self) -> list[UUID]:
        """The runs whose leases are extended."""
        with self._lock:
            return [run_id for run_id, _ in self._held]

    async def open(self) -> None:
        """Open the connection now, so that a service has it before its first run and before the server is full.

        Raises:
            DatabaseUnavailableError: there is no room for it, or the server can't be reached.
        """
        try:
            await asyncio.to_thread(self._connect)
        except psycopg.OperationalError as error:
            raise DatabaseUnavailableError(
                f"no connection for the leases of runs: {str(error).strip()}\n"
                "a service has one beside its pool and the one that listens: give the role or the server more"
            ) from error

    def hold(self, run_id: UUID, epoch: int, on_lost: Lost) -> None:
        """Extend the lease of a run that was just taken, until `drop`; call back when it needs no owner any more."""
        with self._lock:
            self._held[run_id, epoch] = on_lost

    def drop(self, run_id: UUID, epoch: int) -> None:
        """Let a lease run out."""
        with self._lock:
            self._held.pop((run_id, epoch), None)

    def _keep(self) -> None:
        wait = self._lease / 3
        while not self._closing.wait(wait):
            with self._lock:
                held = dict(self._held)
            wait = self._lease / 3
            if not held or not self._is_heard():
                continue
            try:
                self._extend(held)
            except (psycopg.Error, PgflowPrefectError, TimeoutError) as error:
                # The epoch protects the run. A lease that runs out only lets another process take it.
                _logger.warning("the leases of %d runs could not be extended: %s", len(held), str(error).strip())
                wait = self._lease / 10
        self._disconnect()

    def _extend(self, held: dict[tuple[UUID, int], Lost]) -> None:
        for run_id, epoch, holds in self._send([*held]):
            if holds not in {"held", "completed"}:
                self.drop(run_id, epoch)
            if holds != "held":
                held[run_id, epoch](holds)

    def _send(self, held: Collection[tuple[UUID, int]]) -> Iterable[_Holding]:
        tries = 1 if self._connection is None else 2  # one that was open may have died long ago
        while True:
            tries -= 1
            try:
                return self._send_alone(held)
            except psycopg.Error as error:
                self._disconnect()
                if tries:
                    continue
                if self._pool is None:
                    raise
                _logger.warning("the pool has to extend the leases: %s", str(error).strip())
                return self._send_through(self._pool)

    def _send_alone(self, held: Collection[tuple[UUID, int]]) -> list[_Holding]:
        connection = self._connect()
        if self._closing.is_set():
            return []
        run_ids, epochs = zip(*held, strict=True)
        # A third of the lease: there has to be time for another try, on another connection.
        with bounded(connection, self._lease / 3):
            cursor = connection.execute(
                QUERIES["extend_leases"], {"run_ids": list(run_ids), "epochs": list(epochs), "lease": self._lease}
            )
            return [(run_id, epoch, str(holds)) for run_id, epoch, holds in cursor]

    def _send_through(self, pool: Pool) -> list[_Holding]:
        async def extend() -> list[_Holding]:
            with self._lock:
                held = [*self._held]  # the current ones: a run that was handed back meanwhile must not be held again
            return await pool.statements.extend_leases(held) if held else []

        try:
            future = asyncio.run_coroutine_threadsafe(extend(), pool.loop)
        except RuntimeError:  # the event loop has come to its end, and all runs with it
            return []
        try:
            return future.result(self._lease / 3)
        except TimeoutError:
            future.cancel()
            raise TimeoutError("no answer through the pool either") from None

    def _is_heard(self) -> bool:
        """Tell whether the process can still work on its runs; ask the server if there was no statement lately."""
        if self._pool is None:
            return True
        quiet = monotonic() - self._pool.statements.answered_at
        if quiet > self._lease / 3 and (self._probing is None or self._probing.done()):
            with suppress(RuntimeError):  # the event loop has come to its end
                self._probing = asyncio.run_coroutine_threadsafe(self._probe(self._pool.statements), self._pool.loop)
        since, answered_at = self._silent_since, self._pool.statements.answered_at
        if since is None or answered_at > since or monotonic() - since <= self._pool.patience:
            return True
        _logger.warning("no lease is extended: for %.0f s, no statement of this process has succeeded", quiet)
        return False

    async def _probe(self, statements: Statements) -> None:
        """Note since when the pool gets no answer. A blocked event loop is only late, and notes nothing."""
        asked_at = monotonic()
        try:
            await statements.probe()
        except PgflowPrefectError:
            if self._silent_since is None and statements.answered_at < asked_at:
                self._silent_since = asked_at
            with suppress(Exception):  # it is asked again in any case
                await statements.drop_broken_connections()
        else:
            self._silent_since = None

    def _connect(self) -> psycopg.Connection[TupleRow]:
        if self._connection is None:
            self._connection = psycopg.connect(self._dsn, autocommit=True, prepare_threshold=None)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
            self._connection = None
