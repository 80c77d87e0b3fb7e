"""Reads the runs that Prefect hears of later, and notes which flow runs show them."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from pgflow_prefect.database.statements import Statements, to_setting
from pgflow_prefect.models import EndedAs, Ending, LinkedRun, LinkRequest, Shown, Status, StepState, TaskKey


class BegunRun(LinkedRun):
    """The facts about a run that begins without a flow run.

    Attributes:
        shown: Prefect shows the run already, so it has not begun here without a flow run.
    """

    shown: bool


class LeftRun(BaseModel):
    """An ended run. No process has decided yet whether to tell Prefect of it.

    Attributes:
        run_id: the run.
        workflow_slug: its workflow.
        epoch: in which it ended.
        status: completed or failed.
        seconds: for how long its last owner held it; None if that is not known.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    workflow_slug: str
    epoch: int
    status: Status
    seconds: float | None


class UnrecordedRun(BaseModel):
    """An ended run that Prefect was never shown. Times are the database's.

    Attributes:
        id: the run.
        workflow_slug: its workflow.
        epoch: in which it ended.
        status: completed or failed; pending while it is executed.
        ended_as: how it ended.
        error_message: why it failed.
        created_at: when it began.
        taken_at: when its last owner took it.
        finished_at: when it ended.
        definition_id: the definition that it began with.
        step_count: the number of its steps; None if the run never began.
    """

    model_config = ConfigDict(frozen=True)

    id: UUID
    workflow_slug: str
    epoch: int
    status: Status
    ended_as: EndedAs = Field(default=None, validate_default=True)
    error_message: Shown | None
    created_at: datetime | None
    taken_at: datetime
    finished_at: datetime | None
    definition_id: int | None
    step_count: int | None

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel_run` ended the run; a failed run failed by itself."""
        return self.ended_as is Ending.CANCELLED


class UnrecordedStep(StepState):
    """A step of such a run, and the task run that claimed it last; None for a step that was decided without a claim."""

    run_id: UUID
    task_run_id: UUID | None
    task_index: int = 0


class _UnrecordedEnd(BaseModel):
    """A run that Prefect was never shown, and when it ended."""

    run_id: UUID
    finished_at: datetime


class RecordLink(NamedTuple):
    """A run that had no flow run, and the flow run that shows it now.

    Attributes:
        run_id: the run.
        epoch: in which it was taken last.
        flow_run_id: the flow run.
    """

    run_id: UUID
    epoch: int
    flow_run_id: UUID


class RecordingStatements(Statements):
    """The part of the store for runs that Prefect hears of later."""

    async def begin_unshown_runs(
        self, links: Sequence[LinkRequest], *, lock_timeout: float | None = None
    ) -> list[BegunRun]:
        """Hold reserved runs without a flow run, all in one statement.

        Args:
            links: one for each run, with its placeholder in place of a flow run.
            lock_timeout: seconds to wait for each lock; None for the database's setting.

        Returns:
            The facts about each run, in the order of `links`.
        """
        rows = await self._fetch(
            "begin_unshown_runs",
            run_ids=[each.run_id for each in links],
            epochs=[each.epoch for each in links],
            placeholders=[each.flow_run_id for each in links],
            held_by=self.lease_terms.held_by,
            lock_timeout=to_setting(lock_timeout),
        )
        found = {each.run_id: each for each in map(BegunRun.model_validate, rows)}
        return [found[each.run_id] for each in links]

    async def link_recorded_runs(self, links: Iterable[RecordLink]) -> frozenset[UUID]:
        """Name the flow runs that now show runs. Return the runs that had none before."""
        given = [*links]
        rows = await self._fetch(
            "link_recorded_runs",
            run_ids=[each.run_id for each in given],
            epochs=[each.epoch for each in given],
            flow_run_ids=[each.flow_run_id for each in given],
        )
        return frozenset(UUID(str(row["run_id"])) for row in rows)

    async def settle_unshown(self, runs: Iterable[tuple[UUID, int]]) -> frozenset[UUID]:
        """Look no further at ended runs, given with their epochs, and return those that this call has settled.

        It skips runs that a process has taken again meanwhile.
        """
        run_ids, epochs = zip(*runs, strict=True)
        rows = await self._fetch("settle_runs", run_ids=[*run_ids], epochs=[*epochs])
        return frozenset(UUID(str(row["run_id"])) for row in rows)

    async def list_unshown(
        self,
        workflow_slugs: Iterable[str],
        *,
        adopt: bool,
        with_ended: bool,
        since: datetime | None,
        besides: Iterable[UUID],
        limit: int,
    ) -> list[UUID]:
        """Return runs that another program executes and that Prefect does not show.

        Of the released pgflow, those that go on come first, and then by age. Of Airflow, `adopt`, `with_ended` and
        `since` do not count: its mirror has written the runs that are to be shown.

        Args:
            workflow_slugs: of these flows, as far as they are enabled.
            adopt: also runs that go on, and began before their flow was enabled.
            with_ended: also runs that have ended; this reads all runs of the flows.
            since: no ended runs that began before that.
            besides: without these.
            limit: the greatest number of each.
        """
        rows = await self._fetch(
            "list_unshown",
            workflow_slugs=[*workflow_slugs],
            adopt=adopt,
            with_ended=with_ended,
            since=since,
            besides=[*besides],
            limit=limit,
        )
        return [UUID(str(row["run_id"])) for row in rows]

    async def list_observed(self, workflow_slugs: Iterable[str], *, after: UUID | None, limit: int) -> list[UUID]:
        """Return runs that another program executes and that Prefect shows, but not yet their end, by id.

        Args:
            workflow_slugs: of these workflows.
            after: only runs behind this id; by default, all.
            limit: the greatest number of runs.
        """
        rows = await self._fetch("list_observed", workflow_slugs=[*workflow_slugs], after=after, limit=limit)
        return [UUID(str(row["run_id"])) for row in rows]

    async def list_map_tasks(self, run_id: UUID, *, at_most: int) -> list[tuple[TaskKey, StepState]]:
        """Return how the tasks of the maps of a run stand that were begun.

        Args:
            run_id: the run.
            at_most: without maps that have more tasks.
        """
        rows = await self._fetch("list_map_tasks", run_id=run_id, limit=at_most)
        return [
            (TaskKey(str(row["step_slug"]), int(str(row["task_index"]))), StepState.model_validate(row)) for row in rows
        ]

    async def forget_deleted_runs(self, *, after: UUID | None, limit: int) -> UUID | None:
        """Delete our rows of runs that pgflow has deleted, and return the last id that this has looked at.

        Args:
            after: only rows behind this id.
            limit: the greatest number of rows to look at.
        """
        [row] = await self._fetch("forget_deleted_runs", after=after, limit=limit)
        return None if row["last"] is None else UUID(str(row["last"]))

    async def list_left_unshown(
        self, workflow_slugs: Iterable[str], *, grace: float, after: UUID | None, limit: int
    ) -> list[LeftRun]:
        """Return ended runs that are neither shown nor left unshown for good, by id.

        Args:
            workflow_slugs: of these workflows.
            grace: seconds since the end of a run. Before that, the process that executed it decides.
            after: only runs behind this id; by default, all.
            limit: the greatest number of runs.
        """
        rows = await self._fetch(
            "list_left_unshown", workflow_slugs=[*workflow_slugs], grace=grace, after=after, limit=limit
        )
        return [LeftRun.model_validate(row) for row in rows]

    async def list_unrecorded(
        self,
        workflow_slug: str,
        status: Status,
        ended_as: Ending | None,
        *,
        since: datetime,
        after: tuple[datetime, UUID] | None,
        limit: int,
    ) -> list[tuple[datetime, UUID]]:
        """Return ended runs of a workflow that Prefect was never shown, in the order of their ends.

        Args:
            workflow_slug: the workflow.
            status: completed or failed.
            ended_as: only runs that ended so.
            since: only runs that ended since then.
            after: only runs behind this one, given with its end.
            limit: the greatest number of runs.

        Returns:
            The end and the id of each.
        """
        finished, run_id = after or (None, None)
        rows = await self._fetch(
            "list_unrecorded",
            workflow_slug=workflow_slug,
            status=status,
            ended_as=ended_as,
            since=since,
            after_finished=finished,
            after=run_id,
            limit=limit,
        )
        found = [_UnrecordedEnd.model_validate(row) for row in rows]
        return [(each.finished_at, each.run_id) for each in found]

    async def read_unrecorded(self, run_ids: Iterable[UUID]) -> list[UnrecordedRun]:
        """Return the current states of these runs, without those that Prefect was shown."""
        return [UnrecordedRun.model_validate(row) for row in await self._fetch("read_unrecorded", run_ids=[*run_ids])]

    async def list_unrecorded_steps(self, run_ids: Iterable[UUID]) -> list[UnrecordedStep]:
        """Return the claimed steps of these runs, each run's in the order of their first claims."""
        rows = await self._fetch("list_unrecorded_steps", run_ids=[*run_ids])
        return [UnrecordedStep.model_validate(row) for row in rows]
