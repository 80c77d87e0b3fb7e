"""The part of the store that deletes old runs."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from pgflow_prefect.database.link import without_bound
from pgflow_prefect.database.statements import Statements
from pgflow_prefect.models import Status

GRACE = timedelta(days=1)
"""How much longer a run stays if a process holds it, or if no process has yet seen Prefect show its end."""

ANY_AGE = timedelta(microseconds=1)
"""An age that every ended run has. Runs of this age go at once, whether or not Prefect shows their end."""


@dataclass
class Swept:
    """The stored results that were deleted so far.

    Attributes:
        checked: folders of runs that were looked at.
        runs: those of runs that are gone.
        objects: objects in them; 0 in a dry run.
    """

    checked: int = 0
    runs: int = 0
    objects: int = 0


class PrunableRuns(BaseModel):
    """Old runs of one workflow that ended in one status.

    Attributes:
        workflow_slug: the workflow.
        status: completed or failed.
        runs: how many would be deleted.
        kept: how many of that age stay for now.
    """

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    status: Status
    runs: int
    kept: int


class PruningStatements(Statements):
    """Counts and deletes runs that ended long ago, but never a run without a `finished_at`."""

    async def count_prunable(
        self, older_than: timedelta, workflow_slugs: Iterable[str] | None = None, status: Status | None = None
    ) -> list[PrunableRuns]:
        """Return how many runs ended longer ago than that, by workflow and status.

        Args:
            older_than: the time since their end.
            workflow_slugs: of these workflows; by default, of all.
            status: completed or failed; by default, both.
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
        """Delete at most this number of runs in one transaction, and return how many; fewer means that none is left.

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

    async def find_gone_runs(self, run_ids: Iterable[UUID]) -> list[UUID]:
        """Return those of these runs that have no row any more, so that nothing refers to their stored results.

        Raises:
            HiddenRowsError: row-level security hides rows from this role.
        """
        rows = await self._fetch("find_gone_runs", run_ids=[*run_ids])
        return [UUID(str(row["id"])) for row in rows]

    async def prune_definitions(self, workflow_slugs: Iterable[str] | None = None) -> int:
        """Delete the snapshots of former definitions that no run refers to any more, and return how many."""
        with without_bound():
            [row] = await self._fetch("prune_definitions", workflow_slugs=_to_array(workflow_slugs), grace=GRACE)
        return int(str(row["pruned"]))


def _find_grace(older_than: timedelta) -> timedelta:
    return timedelta() if older_than == ANY_AGE else GRACE


def _to_array(slugs: Iterable[str] | None) -> list[str] | None:
    return None if slugs is None else list(slugs)
