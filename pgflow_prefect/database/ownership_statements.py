"""The part of the store for owners: starting, taking, linking and releasing runs."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from uuid import UUID

from pgflow_prefect.database.connection import Row
from pgflow_prefect.database.statements import Statements, to_setting
from pgflow_prefect.models import LinkedRun, LinkRequest, TakenRun


class OwnershipStatements(Statements):
    """The flow runs that may write for runs, and the runs that wait for one."""

    async def create_run(
        self,
        workflow_slug: str,
        payload: str,
        run_id: UUID,
        flow_run_id: UUID | None = None,
        *,
        logical_date: datetime | None = None,
        interval_start: datetime | None = None,
    ) -> int | None:
        """Start a run and its root steps, and take it at once; with the same id again, take the existing run.

        Args:
            workflow_slug: the workflow.
            payload: JSON text.
            run_id: the run's id.
            flow_run_id: its owner; without one, the run is reserved for a flow run that is about to be created.
            logical_date: when its schedule was due.
            interval_start: when its schedule was due before.

        Returns:
            The epoch, or None if the run has ended.

        Raises:
            UsageError: unknown workflow, no steps, a cycle.
            RunHeldError: it exists, and another process holds it.
        """
        rows = await self._fetch(
            "create_run",
            run_id=run_id,
            workflow_slug=workflow_slug,
            payload=payload,
            flow_run_id=flow_run_id,
            logical_date=logical_date,
            interval_start=interval_start,
            **self.lease_terms._asdict(),
        )
        return _find_epoch(rows)

    async def take_run(self, run_id: UUID, flow_run_id: UUID | None = None, *, force: bool = False) -> int | None:
        """Make a flow run the owner of a pending run and return the new epoch; None if the run has ended.

        Args:
            run_id: the run.
            flow_run_id: the owner; without one, the run is reserved for a flow run that is about to be created.
            force: take it from the process that holds it.

        Raises:
            RunHeldError: another process holds it.
            UsageError: there is no such run.
        """
        rows = await self._fetch(
            "take_run", run_id=run_id, flow_run_id=flow_run_id, force=force, **self.lease_terms._asdict()
        )
        return _find_epoch(rows)

    async def take_runs(
        self,
        workflow_slugs: Iterable[str],
        wanted: int,
        *,
        adopt: bool = False,
        besides: Iterable[UUID] = (),
        expired: bool = True,
    ) -> list[TakenRun]:
        """Reserve pending runs that no process holds, the oldest of each workflow first.

        Args:
            workflow_slugs: of these workflows, if they are enabled.
            wanted: the greatest number of runs.
            adopt: also runs that began before their workflow was enabled.
            besides: leaves out these runs, which this process executes, even if it could not extend their leases.
            expired: also runs whose owner let its lease run out, and these first. To find them, PostgreSQL reads
                every run that is held.
        """
        rows = await self._fetch(
            "take_runs",
            workflow_slugs=list(workflow_slugs),
            wanted=wanted,
            adopt=adopt,
            besides=list(besides),
            expired=expired,
            **self.lease_terms._asdict(),
        )
        return [TakenRun.model_validate(row) for row in rows]

    async def link_flow_run(self, run_id: UUID, epoch: int, flow_run_id: UUID, *, queued: bool) -> bool:
        """Name the flow run of a reserved run; return False if another process has taken the run meanwhile.

        Args:
            run_id: the run.
            epoch: in which it was reserved.
            flow_run_id: the flow run that was created for it.
            queued: Prefect decides when it starts, and there is no lease until then.
        """
        rows = await self._fetch(
            "link_flow_run",
            run_id=run_id,
            epoch=epoch,
            flow_run_id=flow_run_id,
            held_by=self.lease_terms.held_by,
            queued=queued,
        )
        return bool(rows[0]["linked"])

    async def link_flow_runs(
        self, links: Sequence[LinkRequest], *, lock_timeout: float | None = None
    ) -> list[LinkedRun]:
        """Name the flow runs of reserved runs, all in one statement.

        Args:
            links: one for each run.
            lock_timeout: seconds to wait for each lock; None for the database's setting.

        Returns:
            The facts about each run, in the order of `links`.
        """
        rows = await self._fetch(
            "link_flow_runs",
            run_ids=[each.run_id for each in links],
            epochs=[each.epoch for each in links],
            flow_run_ids=[each.flow_run_id for each in links],
            held_by=self.lease_terms.held_by,
            lock_timeout=to_setting(lock_timeout),
        )
        found = {each.run_id: each for each in map(LinkedRun.model_validate, rows)}
        return [found[each.run_id] for each in links]

    async def is_made_for(self, run_id: UUID, flow_run_id: UUID) -> bool:
        """Tell whether a flow run that Prefect started may take a run.

        It may if it was made for the run, or if the run was never taken and its workflow is enabled.
        """
        [row] = await self._fetch("is_made_for", run_id=run_id, flow_run_id=flow_run_id)
        return bool(row["made"])

    async def release_run(self, run_id: UUID, epoch: int) -> None:
        """Hand a run back, for its next owner."""
        await self._fetch("release_run", run_id=run_id, epoch=epoch)

    async def release_reservation(self, run_id: UUID, epoch: int) -> None:
        """Hand a run back that this process has reserved, and linked to no flow run.

        The next process that reserves the run does so in the same epoch: what that one has, stays as it is.
        """
        await self._fetch("release_reservation", run_id=run_id, epoch=epoch, held_by=self.lease_terms.held_by)

    async def put_off_run(self, run_id: UUID, epoch: int, reason: str) -> bool:
        """Hand a run back that this process has reserved and could not begin, to be taken again after a while.

        The while grows with each time. The answer is False where `release_reservation` would hand nothing back.
        """
        given = {"epoch": epoch, "held_by": self.lease_terms.held_by}
        [row] = await self._fetch_telling("put_off_run", {"reason": reason}, run_id=run_id, **given)
        return bool(row["put_off"])

    async def put_off_held_run(self, run_id: UUID, epoch: int, step_slug: str | None, reason: str) -> bool:
        """Hand a run back of which PostgreSQL refuses to note something, to be taken again after a while.

        The while grows with each time. Before a service takes the run again, it rehearses the claim and the completion
        of the step in a transaction that is rolled back: while they are refused, no handler is executed.

        Args:
            run_id: the run.
            epoch: in which this process has taken it.
            step_slug: the step; None if it is about the run.
            reason: for people.

        Returns:
            False if another process has the run.
        """
        given = {"epoch": epoch, "step_slug": step_slug}
        [row] = await self._fetch_telling("put_off_held_run", {"reason": reason}, run_id=run_id, **given)
        return bool(row["put_off"])

    async def list_older_runs(self, workflow_slugs: Iterable[str]) -> list[tuple[str, UUID]]:
        """Return workflow and id of the pending runs that only `adopt` takes, older than the enabling."""
        rows = await self._fetch("list_older_runs", workflow_slugs=list(workflow_slugs), lease=self.lease_terms.lease)
        return [(str(row["workflow_slug"]), UUID(str(row["id"]))) for row in rows]

    async def list_waiting_runs(self) -> dict[str, tuple[int, UUID]]:
        """Return the number of pending runs that no process has ever taken, and the oldest, by enabled workflow."""
        rows = await self._fetch("list_waiting_runs")
        return {str(row["workflow_slug"]): (int(str(row["runs"])), UUID(str(row["first"]))) for row in rows}


def _find_epoch(rows: list[Row]) -> int | None:
    epoch = rows[0]["epoch"]
    return None if epoch is None else int(str(epoch))
