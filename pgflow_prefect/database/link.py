"""Bounds how long a statement waits: a link that dies silently brings neither an answer nor an error."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.rows import TupleRow

T = TypeVar("T")

BOUND = 20.0
"""Seconds that a statement of ours may take by default."""

_CANCEL_TIMEOUT = 2.0  # seconds to reach the server with a cancel request, and again to hear its answer

_is_lifted: ContextVar[bool] = ContextVar("pgflow_bound_is_lifted", default=False)


class UnansweredError(psycopg.OperationalError):
    """A statement got no answer in time, and its connection was cut."""


@contextmanager
def without_bound() -> Iterator[None]:
    """Remove the bound of the block's statements, which delete many rows or install a schema."""
    token = _is_lifted.set(True)
    try:
        yield
    finally:
        _is_lifted.reset(token)


class BoundedConnection(psycopg.AsyncConnection[dict[str, object]]):
    """A connection on which no statement waits for ever.

    If the server still answers, it cancels the statement, and the connection stays. Otherwise the link is cut, which
    ends the statement with an error even if the network is silent.

    Attributes:
        bound: seconds that a statement may take; None for no limit.
    """

    bound: float | None = BOUND
    _giving_up: "asyncio.Task[None] | None" = None

    async def wait(self, gen: PQGen[T], *arguments: Any, **options: Any) -> T:  # noqa: ANN401  as psycopg has it
        """Wait for the server, as every statement of the connection does."""
        if self.bound is None or _is_lifted.get():
            return await super().wait(gen, *arguments, **options)
        timer = asyncio.get_running_loop().call_later(self.bound, self._give_up)
        try:
            return await super().wait(gen, *arguments, **options)
        except psycopg.Error as error:
            if self._giving_up is None:
                raise
            kind = UnansweredError if self.closed else psycopg.OperationalError
            raise kind(_describe(self.bound)) from error
        finally:
            timer.cancel()
            if self._giving_up is not None:
                self._giving_up.cancel()
                self._giving_up = None

    def _give_up(self) -> None:
        self._giving_up = asyncio.get_running_loop().create_task(self._interrupt())

    async def _interrupt(self) -> None:
        with suppress(psycopg.Error, OSError, TimeoutError):
            async with asyncio.timeout(_CANCEL_TIMEOUT):  # an older libpq has no time-out of its own
                await self.cancel_safe(timeout=_CANCEL_TIMEOUT)
        await asyncio.sleep(_CANCEL_TIMEOUT)
        cut(self)


@contextmanager
def bounded(connection: psycopg.Connection[TupleRow], seconds: float) -> Iterator[None]:
    """Cut a connection of a thread if the block takes longer.

    Raises:
        UnansweredError: it did.
    """
    late = threading.Event()

    def give_up() -> None:
        late.set()
        cut(connection)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except psycopg.Error as error:
        if late.is_set():
            raise UnansweredError(_describe(seconds)) from error
        raise
    finally:
        timer.cancel()


def cut(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """End the wait for an answer on a connection with an error.

    A close would free libpq's memory while a thread may use it.
    """
    with (
        suppress(psycopg.Error, OSError),  # broken or closed already: just as good
        socket.fromfd(connection.fileno(), -1, -1) as link,
    ):
        link.shutdown(socket.SHUT_RDWR)


def _describe(seconds: float) -> str:
    return f"no answer within {seconds:g} s"
