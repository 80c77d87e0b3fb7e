"""Keeping the leases of the runs that this process executes."""

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
from pgflow_prefect.database.queries import QUERIES

Lost = Callable[[str], None]
"""Called, from the keeper's thread, with why a run needs no owner any more: `lost` to somebody else, `ended`, or
`completed`, by whomever: then its owner still shows that, and keeps the lease for it."""

_logger = logging.getLogger(__name__)


class LeaseKeeper:
    """Extends leases from a thread and a connection of its own.

    So that neither a handler that blocks the event loop nor a pool that is used up costs a process its runs. The
    connection is opened at the first extension: a run that is over by then costs none.
    """

    def __init__(self, dsn: str, lease: float, *, connect_timeout: float) -> None:
        """Prepare to extend leases of so many seconds, three times in each."""
        self._dsn = with_timeout(dsn, connect_timeout)
        self._lease = lease
        self._held: dict[tuple[UUID, int], Lost] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._connection: psycopg.Connection[TupleRow] | None = None
        self._thread = threading.Thread(target=self._keep, name="pgflow-leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._connection is not None:
            # It is a daemon: where the database hangs, nobody waits for it; nor where it has nothing to close.
            self._thread.join(timeout=1)

    def hold(self, run_id: UUID, epoch: int, on_lost: Lost) -> None:
        """Extend the lease of a run that was taken just now, until `drop`, and tell when that has become useless."""
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
            if not held:
                continue
            try:
                self._extend(held)
                wait = self._lease / 3
            except psycopg.Error as error:
                # The epoch is what protects the run; a lease that runs out only lets somebody else take it.
                _logger.warning("the leases of %d runs could not be extended: %s", len(held), str(error).strip())
                self._disconnect()
                wait = self._lease / 10
        self._disconnect()

    def _extend(self, held: dict[tuple[UUID, int], Lost]) -> None:
        if self._connection is None:
            self._connection = psycopg.connect(self._dsn, autocommit=True, prepare_threshold=None)
            if self._closing.is_set():
                return
        run_ids, epochs = zip(*held, strict=True)
        cursor = self._connection.execute(
            QUERIES["extend_leases"], {"run_ids": list(run_ids), "epochs": list(epochs), "lease": self._lease}
        )
        for run_id, epoch, holds in cursor:
            if holds not in {"held", "completed"}:
                self.drop(run_id, epoch)
            if holds != "held":
                held[run_id, epoch](str(holds))

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
            self._connection = None
