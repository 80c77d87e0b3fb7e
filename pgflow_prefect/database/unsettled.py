"""What PostgreSQL says of runs that are compared with Prefect."""

from datetime import datetime
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from pgflow_prefect.models import CANCELLED, Held, Status


class UnsettledRun(BaseModel):
    """A run that somebody has taken at least once. Times are the database's.

    Attributes:
        id: the run.
        workflow_slug: its workflow.
        status: its status.
        error_message: why it failed.
        finished_at: when it ended.
        held: how its latest owner holds it.
        epoch: in which its latest owner took it.
        flow_run_id: the flow run that executes it, or did to its end; None where that one is being created, and where
            the run was reopened since.
        taken_at: when its latest owner took it.
        flow_run_ids: all flow runs that have ever taken it.
        now: when all this was so.
    """

    model_config = ConfigDict(frozen=True)

    id: UUID
    workflow_slug: str
    status: Status
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
        """Whether somebody ended it, where a failed one has failed by itself."""
        return self.status is Status.FAILED and (self.error_message or "").startswith(CANCELLED)


class UnsettledStep(BaseModel):
    """A step of such a run that has, or had, a task run.

    Attributes:
        run_id: the run.
        step_slug: the step.
        status: its status.
        error_message: why it failed.
        task_run_id: the latest task run that claimed it.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    step_slug: str
    status: Status
    error_message: str | None
    task_run_id: UUID
