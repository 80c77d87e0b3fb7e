"""Hearing of runs that start and end, and not relying on it."""

import logging

import anyio
import psycopg

from pgflow_prefect.database.connection import connect
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.errors import PgflowPrefectError
from pgflow_prefect.waiting import Pauses, Wakeup

_SHORTEST_WAIT, _LONGEST_WAIT = 0.5, 15.0  # seconds between two tries to connect

_SILENCE = 10.0  # seconds without a notification after which the server has to show that it still answers, in as many

_logger = logging.getLogger(__name__)


async def listen(dsn: str, wakeup: Wakeup, *, connect_timeout: float) -> None:
    """Ring whenever a run starts, ends or is handed back, for ever; connect again whenever the connection is lost.

    A hint: behind a pooler in transaction mode it stays silent, and what is sent while no session listens is lost. So
    a task that is woken looks at the rows, and also does so now and then without being woken.

    Args:
        dsn: the database.
        wakeup: what to ring.
        connect_timeout: in seconds.
    """
    pauses = Pauses(_SHORTEST_WAIT, _LONGEST_WAIT)
    while True:
        try:
            async with await connect(dsn, timeout=connect_timeout, bound=2 * _SILENCE) as connection:
                await connection.execute(QUERIES["listen"])
                pauses.reset()
                wakeup.wake()  # for what was missed until now
                while True:
                    async for _ in connection.notifies(timeout=_SILENCE):
                        wakeup.wake()
                    await connection.execute(QUERIES["probe"])
        except (psycopg.Error, PgflowPrefectError) as error:
            _logger.warning("not listening to PostgreSQL: %s", str(error).strip())
        await anyio.sleep(pauses.draw())
