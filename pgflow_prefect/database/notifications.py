"""Listens for runs that start and end, as a hint only."""

import logging

import anyio
import psycopg

from pgflow_prefect.database.connection import connect
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.errors import PgflowPrefectError
from pgflow_prefect.waiting import Pauses, Wakeup

_SHORTEST_WAIT, _LONGEST_WAIT = 0.5, 15.0  # seconds between two tries to connect

_SILENCE = 10.0  # seconds without a notification after which the server has to answer a probe, within the same time

_logger = logging.getLogger(__name__)


async def listen(dsn: str, wakeup: Wakeup, *, connect_timeout: float) -> None:
    """Wake a task when a run starts, ends or is handed back, for ever; connect again after a lost connection.

    This is a hint only: behind a pooler in transaction mode it stays silent, and a notification without a listening
    session is lost. So the task reads the rows when it wakes, and also reads them regularly.

    Args:
        dsn: the database.
        wakeup: wakes the task.
        connect_timeout: in seconds.
    """
    pauses = Pauses(_SHORTEST_WAIT, _LONGEST_WAIT)
    while True:
        try:
            async with await connect(dsn, timeout=connect_timeout, bound=2 * _SILENCE) as connection:
                await connection.execute(QUERIES["listen"])
                pauses.reset()
                wakeup.wake()  # for notifications that were missed until now
                while True:
                    async for _ in connection.notifies(timeout=_SILENCE):
                        wakeup.wake()
                    await connection.execute(QUERIES["probe"])
        except (psycopg.Error, PgflowPrefectError) as error:
            _logger.warning("not listening to PostgreSQL: %s", str(error).strip())
        await anyio.sleep(pauses.draw())
