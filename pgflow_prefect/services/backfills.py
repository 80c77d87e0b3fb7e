"""Background task of worker and bridge: goes on with backfills, and with children that their parents have left."""

import logging

import anyio

from pgflow_prefect.database.backfill_statements import PORTION, AdvancedBackfill
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError

_logger = logging.getLogger(__name__)


async def keep_backfilling(store: Store, interval: float) -> None:
    """Move children and advance the backfills now and at each interval, and at once where there is more to do.

    Args:
        store: the database.
        interval: in seconds.
    """
    if not store.implementation.executes:
        return  # pgflow has no backfills
    said: str | None = None
    while True:
        try:
            moved = await store.move_children(PORTION)
            advanced = await store.advance_backfills()
        except PgflowPrefectError as error:
            if str(error) != said:  # such as a right that is missing: once is enough
                _logger.warning("backfills and children do not go on: %s", error)
            said = str(error)
            if isinstance(error, DatabaseUnavailableError):
                await store.drop_broken_connections()
        else:
            said = None
            for each in advanced:
                _tell(each)
            if moved == PORTION or any(each.decided == PORTION for each in advanced):
                continue
        await anyio.sleep(interval)


def _tell(advanced: AdvancedBackfill) -> None:
    if advanced.is_paused:
        _logger.error(
            "backfill %d is paused, a run could not be started: %s. `pgflow-prefect backfill resume %d` goes on",
            advanced.backfill_id,
            advanced.problem,
            advanced.backfill_id,
        )
    elif advanced.problem is not None:
        _logger.warning("backfill %d is tried again: %s", advanced.backfill_id, advanced.problem)
    elif advanced.decided:
        _logger.info("backfill %d: %d dates decided", advanced.backfill_id, advanced.decided)
