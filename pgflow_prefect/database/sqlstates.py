"""Decides what a PostgreSQL error means for a step, by its SQLSTATE and by the statement that met it."""

from enum import StrEnum
from typing import NamedTuple

import psycopg
from psycopg_pool import PoolTimeout


class Whose(StrEnum):
    """The owner of a statement."""

    CLAIM = "claim"
    REPORT = "report"
    EXTENSION = "extension of a lease"
    SWEEP = "sweep"
    LISTEN = "LISTEN"
    HANDLER = "the handler's own"
    FUNCTION = "the function of an SQL step"

    @property
    def is_ours(self) -> bool:
        """Whether pgflow-prefect sent the statement, and not the work of a step."""
        return self not in {Whose.HANDLER, Whose.FUNCTION}


class Verdict(StrEnum):
    """What follows from an error."""

    AGAIN = "try the statement again"
    """Try again: the statement had no effect, or a second try finds the same effect."""

    LOST = "the step's transaction is lost"
    """The transaction is lost with its writes: the step is executed again, and no retry is used."""

    FAILURE = "a failure"
    """The handler failed, and its retries apply; or a statement of ours was refused for good."""


class _Rule(NamedTuple):
    """One line of the table.

    Attributes:
        ours: the verdict for a statement of ours.
        work: the verdict for a statement of the step's work.
        is_link: `work` counts only if the step's own connection broke, because a handler may use other databases.
    """

    ours: Verdict
    work: Verdict
    is_link: bool = False


_AGAIN, _LOST, _FAILURE = Verdict.AGAIN, Verdict.LOST, Verdict.FAILURE

_BROKEN = _Rule(_AGAIN, _LOST, is_link=True)

TABLE: dict[str, _Rule] = {
    "08": _BROKEN,  # connection exceptions
    "25006": _Rule(_AGAIN, _LOST),  # read-only transaction: a standby, or a failover under way
    "25P02": _Rule(_AGAIN, _FAILURE),  # in a failed transaction: of the work, it passed over an error
    "25P03": _BROKEN,  # idle_in_transaction_session_timeout: the server has ended the session
    "25P04": _BROKEN,  # transaction_timeout: likewise
    "40001": _Rule(_AGAIN, _LOST),  # serialization failure
    "40P01": _Rule(_AGAIN, _LOST),  # deadlock
    "53": _Rule(_AGAIN, _LOST),  # out of disk, memory, connections
    "55P03": _Rule(_AGAIN, _LOST),  # lock not available, as after lock_timeout
    "57014": _Rule(_AGAIN, _FAILURE),  # cancelled, as after statement_timeout: of the work, it took too long
    "57P0": _BROKEN,  # the server shuts down, or starts
    "58P01": _Rule(_AGAIN, _FAILURE),  # undefined file: of the work, a COPY that names the wrong one
    "58P02": _Rule(_AGAIN, _FAILURE),  # duplicate file: likewise
    "58": _Rule(_AGAIN, _LOST),  # system errors, as of the disk
    "XX000": _Rule(_AGAIN, _FAILURE),  # internal error, as for a tuple that was updated concurrently
}
"""By SQLSTATE or its beginning; the longest match counts. Any other SQLSTATE is a failure."""

_OTHER = _Rule(_FAILURE, _FAILURE)

_OF_ROWS = {"25P04", "40001", "40P01", "55P03", "57014", "XX000"}
"""Conflicts, locks and time-outs: a statement about other rows may not meet them."""


def judge(error: psycopg.Error, whose: Whose, *, is_cut: bool = True) -> Verdict:
    """Return the verdict on an error.

    Args:
        error: of PostgreSQL or psycopg.
        whose: the owner of the statement.
        is_cut: the step's own connection is broken; for a statement of ours, this does not matter.
    """
    rule = _find_rule(error)
    if whose.is_ours:
        return rule.ours
    return _FAILURE if rule.is_link and not is_cut else rule.work


def is_of_rows(error: psycopg.Error) -> bool:
    """Tell whether a statement failed because of its rows, such as locked ones, and not of the server's state."""
    # A statement that took too long was cancelled: the server's error is the cause of ours.
    found = {each.sqlstate for each in (error, error.__cause__) if isinstance(each, psycopg.Error)}
    return not found.isdisjoint(_OF_ROWS)


def is_link_loss(error: psycopg.Error) -> bool:
    """Tell whether an error says only that the link is lost, and nothing about the statement."""
    return _find_rule(error).is_link


def _find_rule(error: psycopg.Error) -> _Rule:
    if isinstance(error, PoolTimeout):
        return _BROKEN
    if error.sqlstate is None:  # the connection broke, so the server sent no code
        return _BROKEN if isinstance(error, psycopg.OperationalError) else _OTHER
    for length in range(len(error.sqlstate), 1, -1):
        if rule := TABLE.get(error.sqlstate[:length]):
            return rule
    return _OTHER
