"""The part of the store that deletes old runs."""

from collections.abc import Iterable
from datetime import timedelta
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from pgflow_prefect.database.link import without_bound
from pgflow_prefect.database.statements import Statements
from pgflow_prefect.models import Status

GRACE = timedelta(days=1)
"""How much longer a run stays that a process holds, or whose end Prefect was not yet seen to show."""

ANY_AGE = timedelta(microseconds=1)
"""Older than this is every run that has ended. Such runs go at once, whatever Prefect was seen to show."""


class PrunableRuns(BaseModel):
    """Old runs of one workflow that ended in one status.

    Attributes:
        workflow_slug: the workflow.
        status: completed or failed.
        runs: how many are to go.
        kept: how many of that age are left to a later time.
    """

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    status: Status
    runs: int
    kept: int


class PruningStatements(Statements):
    """Counting and deleting runs that ended long ago. A run that never got a `finished_at` is never among them."""

    async def count_prunable(
        self, older_than: timedelta, workflow_slugs: Iterable[str] | None = None, status: Status | None = None
    ) -> list[PrunableRuns]:
        """Return how many runs ended longer ago than that, by workflow and status.

        Args:
            older_than: since their end.
            workflow_slugs: of these workflows; of all where not given.
            status: completed or failed; both where not given.
        """
        with without_bound():
            rows = await self._fetch(
                "count_prunable",
                older_than=older_than,
                grace=_find_grace(older_than),
                workflow_slugs=_to_array(workflow_slugs),
                only_status=status,
            )
        return [PrunableRuns.model_validate(row) for row in rows]

    async def prune_runs(
        self,
        older_than: timedelta,
        *,
        at_most: int,
        workflow_slugs: Iterable[str] | None = None,
        status: Status | None = None,
    ) -> int:
        """Delete so many of them at most, in one transaction, and return how many; fewer: there are no more.

        Raises:
            UsageError: `older_than` or `at_most` is not positive.
            PgflowPrefectError: this user may not delete runs, or another table refers to one.
        """
        with without_bound():
            [row] = await self._fetch(
                "prune_runs",
                older_than=older_than,
                grace=_find_grace(older_than),
                at_most=at_most,
                workflow_slugs=_to_array(workflow_slugs),
                only_status=status,
            )
        return int(str(row["pruned"]))

    async def prune_run(self, run_id: UUID) -> None:
        """Delete one run that has ended, of any age.

        Raises:
            UsageError: there is no such run, or it is pending.
            PgflowPrefectError: this user may not delete runs, or a table of another program refers to it.
        """
        with without_bound():
            await self._fetch("prune_run", run_id=run_id)

    async def prune_definitions(self, workflow_slugs: Iterable[str] | None = None) -> int:
        """Delete the snapshots of former definitions that no run refers to any more, and return how many."""
        with without_bound():
            [row] = await self._fetch("prune_definitions", workflow_slugs=_to_array(workflow_slugs), grace=GRACE)
        return int(str(row["pruned"]))


def _find_grace(older_than: timedelta) -> timedelta:
    return timedelta() if older_than == ANY_AGE else GRACE


def _to_array(slugs: Iterable[str] | None) -> list[str] | None:
    return None if slugs is None else list(slugs)
