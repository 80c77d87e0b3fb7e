"""The states of steps, and the wait for steps that other programs do."""

from datetime import datetime
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from pgflow_prefect.models.keys import TaskKey
from pgflow_prefect.models.status import NOT_RUN, EndedAs, Shown, Status
from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.state_names import WORKING


class StepState(BaseModel):
    """The state of one step of a run: a row of `pgflow.step_states`, and the state of its task run."""

    model_config = ConfigDict(frozen=True)

    step_slug: str
    status: Status
    ended_as: EndedAs = Field(default=None, validate_default=True)
    attempts: int
    step_result: RawJson | None
    error_message: Shown | None
    result_problem: str | None = None
    """How the result is beyond the limits, so that it was not read."""
    created_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    task_state: str | None = None
    """The state of its task run in Prefect. If the step has ended, Prefect may show it a moment later."""
    handler: str | None = None
    """Its handler, according to the latest claim."""
    first_claimed_at: datetime | None = None
    """When Prefect's first attempt was claimed; None for steps of runs from before this was noted."""
    tasks: int | None = None
    """How many tasks a map step has; None for a plain step, which has one, and while that is not known."""
    tasks_completed: int | None = None
    """How many of them are completed."""
    skip_reason: Shown | None = None
    """Why it was skipped, in one word; its status is then completed, and it has no result. Of a failed step: why it was
    not executed."""
    skip_message: Shown | None = None
    """The same for people; None where the reason says it all."""

    @property
    def is_skipped(self) -> bool:
        """Whether it was skipped."""
        return self.status is Status.COMPLETED and self.skip_reason is not None

    @property
    def is_not_run(self) -> bool:
        """Whether a step that it waits for has failed, so that it is not executed."""
        return self.status is Status.FAILED and self.skip_reason == NOT_RUN

    @property
    def has_failed(self) -> bool:
        """Whether it has failed by itself, and not because of a step that it waits for."""
        return self.status is Status.FAILED and not self.is_not_run

    @property
    def is_decided(self) -> bool:
        """Whether it has ended without a claim that could tell how."""
        return self.status is Status.FAILED or self.is_skipped

    @field_validator("task_state")
    @classmethod
    def _end_task_state(cls, noted: str | None, info: ValidationInfo) -> str | None:
        """Replace a noted state if the step has ended since, for example by a cancellation."""
        ended_as = info.data.get("ended_as")
        return ended_as.capitalize() if ended_as is not None and noted in WORKING else noted


class StepFailure(BaseModel):
    """A step that has failed by itself, and its error."""

    model_config = ConfigDict(frozen=True)

    step_slug: str
    error_message: Shown | None


class AwaitedStep(NamedTuple):
    """A task that an external worker does, and the task run that waits for it.

    Attributes:
        run_id: the run.
        task: of the run.
        epoch: in which the run was taken here.
        task_run_id: the task run that waits.
        bound: the kind of its handler if no row binds it.
        has_function: whether this process has a function for it.
    """

    run_id: UUID
    task: TaskKey
    epoch: int
    task_run_id: UUID
    bound: str
    has_function: bool


class Outcome(StrEnum):
    """Why the wait for a step is over."""

    COMPLETED = "completed"
    SKIPPED = "skipped"
    FAILED = "failed"
    LOST = "lost"
    """Another owner has taken the run."""
    ENDED = "ended"
    """The run has ended without the step, and no process will do it."""
    REBOUND = "rebound"
    """A binding has changed: the waiting process must do the step now."""


class StepEnd(BaseModel):
    """The end of the wait for a step.

    Attributes:
        task_run_id: the task run that has waited.
        outcome: why the wait is over.
        message: the result, shortened, or the reason.
        began_at: the start of the work; if the step was never claimed, the start of the step.
        ended_at: the end of the work.
    """

    model_config = ConfigDict(frozen=True)

    task_run_id: UUID
    outcome: Outcome
    message: Shown | None
    began_at: datetime | None
    ended_at: datetime | None
