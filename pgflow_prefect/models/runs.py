"""Runs: their state, who takes them, and which flow run executes them."""

from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from pgflow_prefect.models.status import EndedAs, Ending, Held, Shown, Status
from pgflow_prefect.raw_json import RawJson


class Run(BaseModel):
    """One execution of a workflow: a row of `pgflow.runs`. Times are the database's."""

    model_config = ConfigDict(frozen=True)

    id: UUID
    workflow_slug: str
    status: Status
    ended_as: EndedAs = Field(default=None, validate_default=True)
    payload: RawJson | None = None
    """None if it was not requested, or is beyond the limits."""
    payload_problem: str | None = None
    """How the payload is beyond the limits, if it was requested."""
    epoch: int
    remaining: int | None
    steps: int | None = None
    """The number of its steps; None until it begins."""
    error_message: Shown | None
    created_at: datetime | None
    finished_at: datetime | None
    flow_run_id: UUID | None = None
    held_by: str | None = None
    held: Held | None = None
    recoveries: int = 0
    stale_writes: int = 0
    set_aside: str | None = None
    """The reason why it could not be taken; None if it can be taken."""
    next_try: datetime | None = None
    """When a worker or a bridge tries again to take it."""
    is_older: bool = False
    """Whether it began before its workflow was enabled. Workers and bridges take such a run only with --adopt."""
    is_unshown: bool = False
    """Whether Prefect was not told of it, because its workflow is recorded later; see `mark_unshown`."""
    logical_date: datetime | None = None
    """The time that it is about: when its schedule was due, or the date of its backfill; None for any other run."""
    interval_start: datetime | None = None
    """The beginning of its data interval, which ends with the logical date; None where that is not known."""
    interval_end: datetime | None = None
    backfill_id: int | None = None
    """The backfill that started or reopened it."""

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel_run` ended it. Otherwise, a failed run failed by itself."""
        return self.ended_as is Ending.CANCELLED


class RunEnd(BaseModel):
    """The state of a run when its owner has finished its work.

    Attributes:
        id: the run.
        status: completed or failed; pending if another process goes on with it.
        ended_as: how it ended.
        epoch: in which it was taken last.
        error_message: why it failed.
        results: the requested results by step slug; empty unless the run is completed.
    """

    model_config = ConfigDict(frozen=True)

    id: UUID
    status: Status
    ended_as: EndedAs = Field(default=None, validate_default=True)
    epoch: int
    error_message: Shown | None
    results: dict[str, JsonValue]

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel_run` ended it. Otherwise, a failed run failed by itself."""
        return self.ended_as is Ending.CANCELLED


class Relative(BaseModel):
    """The parent of a run, or one of its children.

    Attributes:
        is_parent: whether it is the parent.
        run_id: the run.
        workflow_slug: its workflow.
        status: its status.
        ended_as: how it ended, if its status does not say it.
        step_slug: the parent's step.
        item_index: of a map, which item the child is.
        attempt: which attempt of the step, or of the item.
    """

    model_config = ConfigDict(frozen=True)

    is_parent: bool
    run_id: UUID
    workflow_slug: str
    status: Status
    ended_as: Ending | None
    step_slug: str
    item_index: int | None
    attempt: int


class TakenRun(BaseModel):
    """A run that this process has reserved for a new flow run.

    Attributes:
        run_id: the run.
        workflow_slug: its workflow.
        epoch: in which it was taken.
        former_flow_run_id: the flow run whose lease has expired; None if the run was never executed before.
        was_held: its former owner let the lease run out, and did not hand the run back.
        backfill_id: the backfill that started or reopened it; None for a live run.
        parent_flow_run_id: of a child, the flow run in which Prefect shows its parent and the step that waits for it.
        parent_step_slug: that step.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    workflow_slug: str
    epoch: int
    former_flow_run_id: UUID | None
    was_held: bool = False
    backfill_id: int | None = None
    parent_flow_run_id: UUID | None = None
    parent_step_slug: str | None = None

    @property
    def idempotency_key(self) -> str:
        """The key of the new flow run. Prefect creates only one flow run for a key."""
        return f"pgflow/{self.run_id}/{self.epoch}"


class LinkRequest(NamedTuple):
    """A reserved run and its new flow run.

    Attributes:
        run_id: the run.
        epoch: in which it was reserved.
        flow_run_id: its new flow run.
    """

    run_id: UUID
    epoch: int
    flow_run_id: UUID


class LinkedRun(BaseModel):
    """The facts about a run whose flow run was named.

    Attributes:
        run_id: the run.
        linked: false if another process has taken the run meanwhile.
        status: of the run; None if the run was deleted.
        remaining: the number of its steps that are not completed.
        definition_id: the definition that it began with.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    linked: bool
    status: Status | None
    remaining: int | None
    definition_id: int | None
