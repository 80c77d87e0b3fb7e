"""`python -m tests.faults.broken …` is `pgflow-prefect …` with a broken fence, for the check to have something to find.

FAULTS_BROKEN names the storm whose fence it is. The fences in PostgreSQL are in `breaking`.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import psycopg

BROKEN = "FAULTS_BROKEN"


def _forget_own_runs() -> None:
    """Let a process take its own runs, and open a connection for each extension of its leases."""
    from pgflow_prefect.database.leases import LeaseKeeper  # noqa: PLC0415  the whole product is
    from pgflow_prefect.services.worker import Worker  # noqa: PLC0415

    def send(self: Any, held: Any) -> Any:
        self._disconnect()
        return self._send_alone(held)

    setattr(LeaseKeeper, "_send", send)  # noqa: B010
    setattr(Worker, "_list_executing", lambda self: set())  # noqa: B010


def _wait_for_ever() -> None:
    """Let every statement wait for its answer, however long that takes."""
    from pgflow_prefect.database import leases, link, open_transaction  # noqa: PLC0415
    from pgflow_prefect.database.step_transaction import StepTransaction  # noqa: PLC0415

    setattr(link.BoundedConnection, "wait", psycopg.AsyncConnection.wait)  # noqa: B010
    for module in (leases, open_transaction):
        setattr(module, "bounded", lambda connection, seconds: nullcontext())  # noqa: B010
    setattr(StepTransaction, "_bounded", lambda self, connection: nullcontext())  # noqa: B010


def _fail(sqlstate: str) -> None:
    """Take an error of the moment for a failure, whichever statement met it."""
    from pgflow_prefect.database import sqlstates  # noqa: PLC0415

    sqlstates.TABLE[sqlstate] = sqlstates._Rule(sqlstates.Verdict.FAILURE, sqlstates.Verdict.FAILURE)


def _fail_when_read_only() -> None:
    """Take a read-only database for a refusal."""
    from pgflow_prefect.database import translation  # noqa: PLC0415
    from pgflow_prefect.errors import PgflowPrefectError  # noqa: PLC0415

    _fail("25006")
    setattr(translation, "ReadOnlyError", PgflowPrefectError)  # noqa: B010


def _ignore_the_registration() -> None:
    """Let a database use an installation's id that Prefect has for another one; see `copies` for its stamp."""
    from pgflow_prefect.services.heartbeat import Heartbeat  # noqa: PLC0415

    async def check(self: Any, *others: Any) -> None:
        """Find nothing wrong."""

    setattr(Heartbeat, "_check", check)  # noqa: B010


FENCES: dict[str, Callable[[], None]] = {
    "connection-limits": _forget_own_runs,
    "statement-timeout": partial(_fail, "57014"),
    "silence": _wait_for_ever,
    "read-only": _fail_when_read_only,
    "second-installation": _ignore_the_registration,
}

if __name__ == "__main__":
    from pgflow_prefect.cli import main

    FENCES[os.environ[BROKEN]]()
    main()
