"""The part of the store for children: runs that are steps of other runs."""

from collections.abc import Iterable
from uuid import UUID

from pgflow_prefect.database.statements import Statements
from pgflow_prefect.models import Relative, TakenRun


class ChildStatements(Statements):
    """Children, and what they and their parents want of each other."""

    async def take_children(
        self, parents: Iterable[UUID], workflow_slugs: Iterable[str], wanted: int, *, besides: Iterable[UUID] = ()
    ) -> list[TakenRun]:
        """Reserve pending children of runs that this process executes.

        Args:
            parents: those runs.
            workflow_slugs: only runs of these workflows.
            wanted: the greatest number of runs.
            besides: leaves out these runs, which this process executes.
        """
        rows = await self._fetch(
            "take_children",
            parents=list(parents),
            workflow_slugs=list(workflow_slugs),
            wanted=wanted,
            besides=list(besides),
            **self.lease_terms._asdict(),
        )
        return [TakenRun.model_validate(row) for row in rows]

    async def move_children(self, at_most: int) -> int:
        """Cancel children that their parents have left, and reopen those that they wait for again; return how many.

        Each is moved in a transaction of its own.

        Args:
            at_most: the greatest number of runs.
        """
        for moved in range(at_most):
            [row] = await self._fetch("move_children")
            if not row["moved"]:
                return moved
        return at_most

    async def list_relatives(self, run_id: UUID, at_most: int) -> list[Relative]:
        """Return the parent of a run, if it is a child, and then the latest of its own children.

        Args:
            run_id: the run.
            at_most: the greatest number of children.
        """
        rows = await self._fetch("list_relatives", run_id=run_id, at_most=at_most)
        return [Relative.model_validate(row) for row in rows]
