"""Reads the runs that reconciliation compares with Prefect."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from pgflow_prefect.database.statements import Statements
from pgflow_prefect.models import EndedAs, Ending, Held, Status, TaskKey


class UnsettledRun(BaseModel):
    """A run that a process has taken at least once. Times are the database's.

    Attributes:
        id: the run.
        workflow_slug: its workflow.
        status: its status.
        ended_as: how it ended; None while it is pending.
        is_given_up: it failed because its owners vanished, one after the other.
        error_message: why it failed.
        finished_at: when it ended.
        held: how its latest owner holds it.
        epoch: in which its latest owner took it.
        flow_run_id: the flow run that executes it, or that executed it to its end; None while that flow run is being
            created, and after the run was reopened.
        taken_at: when its latest owner took it.
        flow_run_ids: all flow runs that have ever taken it.
        now: the time of these values.
    """

    model_config = ConfigDict(frozen=True)

    id: UUID
    workflow_slug: str
    status: Status
    ended_as: EndedAs = Field(default=None, validate_default=True)
    is_given_up: bool = False
    error_message: str | None
    finished_at: datetime | None
    held: Held
    epoch: int
    flow_run_id: UUID | None
    taken_at: datetime
    flow_run_ids: tuple[UUID, ...]
    now: datetime

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel_run` ended the run; a failed run failed by itself."""
        return self.ended_as is Ending.CANCELLED


class UnsettledStep(BaseModel):
    """A step of such a run that has, or had, a task run.

    Attributes:
        run_id: the run.
        step_slug: the step.
        status: its status.
        ended_as: how it ended; None while it is pending.
        error_message: why it failed.
        task_run_id: the latest task run that claimed it.
        task_index: which of the step's tasks that is.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    step_slug: str
    status: Status
    ended_as: EndedAs = Field(default=None, validate_default=True)
    error_message: str | None
    task_run_id: UUID
    task_index: int = 0

    @property
    def task(self) -> TaskKey:
        """The task of the run."""
        return TaskKey(self.step_slug, self.task_index)


class UnsettledStatements(Statements):
    """The part of the store for reconciliation."""

    async def list_unsettled(self, *, after: UUID | None, limit: int, everything: bool = False) -> list[UUID]:
        """Return runs that a process has taken and that no process has yet seen to agree with Prefect, by id.

        Args:
            after: begins behind this id; by default, with the first one.
            limit: the greatest number of runs.
            everything: also returns settled runs.
        """
        rows = await self._fetch("list_unsettled", after=after, limit=limit, everything=everything)
        return [UUID(str(row["run_id"])) for row in rows]

    async def read_unsettled(self, run_ids: Iterable[UUID]) -> list[UnsettledRun]:
        """Return the current state of those of these runs that a process has taken."""
        rows = await self._fetch("read_unsettled", run_ids=list(run_ids), lease=self.lease_terms.lease)
        return [UnsettledRun.model_validate(row) for row in rows]

    async def list_unsettled_steps(self, run_ids: Iterable[UUID]) -> list[UnsettledStep]:
        """Return the steps of these runs that a task run has claimed."""
        rows = await self._fetch("list_unsettled_steps", run_ids=list(run_ids))
        return [UnsettledStep.model_validate(row) for row in rows]

    async def settle_runs(self, runs: Iterable[UnsettledRun]) -> None:
        """Mark ended runs as settled, but not one that a process has taken again meanwhile."""
        seen = list(runs)
        await self._fetch("settle_runs", run_ids=[run.id for run in seen], epochs=[run.epoch for run in seen])

    async def find_known(
        self, run_ids: Iterable[UUID], flow_run_ids: Iterable[UUID]
    ) -> tuple[frozenset[UUID], frozenset[UUID]]:
        """Return which of these runs exist, and which of these flow runs have ever taken one."""
        [row] = await self._fetch("find_known", run_ids=list(run_ids), flow_run_ids=list(flow_run_ids))
        known: Any = row
        return frozenset(known["known_runs"]), frozenset(known["known_flow_runs"])
