"""Background tasks of worker and bridge: reconcile, and name the runs that they leave alone."""

import logging
from collections import Counter
from collections.abc import Callable, Collection
from uuid import UUID

from prefect.client.orchestration import PrefectClient

from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.reconciliation.failures import Tell, tell_none
from pgflow_prefect.deployment.reconciliation.reconcile import reconcile
from pgflow_prefect.errors import PgflowPrefectError
from pgflow_prefect.waiting import Wakeup

_logger = logging.getLogger(__name__)


async def keep_reconciled(
    store: Store,
    client: PrefectClient,
    wakeup: Wakeup,
    interval: float,
    *,
    executing: Callable[[], Collection[UUID]] = tuple,
    tell: Tell = tell_none,
) -> None:
    """Repair disagreements between PostgreSQL and Prefect: now, after each wake-up, and at each interval.

    Args:
        store: the database.
        client: Prefect's API.
        wakeup: ends the wait early.
        interval: in seconds.
        executing: returns the runs that this process executes.
        tell: called for each run that has failed while no process executed it.
    """
    while True:
        try:
            for found in await reconcile(store, client, apply=True, executing=executing, tell=tell):
                if found.error is None:
                    _logger.info("reconciled: %s", found)
                else:
                    _logger.warning("not reconciled: %s", found)
        except PgflowPrefectError as error:
            _logger.warning("not reconciled: %s", error)
        await wakeup.wait(interval)


async def name_older_runs(store: Store, workflow_slugs: Collection[str]) -> None:
    """Warn of pending runs that are not taken because they began before their workflow was enabled."""
    older = await store.list_older_runs(workflow_slugs)
    for slug, count in Counter(slug for slug, _ in older).items():
        first = next(run_id for workflow_slug, run_id in older if workflow_slug == slug)
        _logger.warning(
            "workflow %r has %d pending runs from before it was enabled (%s, …): --adopt takes them, too",
            slug,
            count,
            first,
        )
