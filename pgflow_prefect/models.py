"""What moves between the rooms: definitions, runs, step states, claims. All frozen; none knows where it came from."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, NamedTuple
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
)

from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.state_names import WORKING
from pgflow_prefect.wording import clean_lines

Shown = Annotated[str, AfterValidator(clean_lines)]
"""What a row says and Prefect shows, in its pages and in the terminals of its own workers: it is cleaned when read."""


class Held(StrEnum):
    """How a run's latest owner holds it."""

    LEASED = "leased"
    """It executes the run, or is about to."""

    QUEUED = "queued"
    """Its flow run waits in Prefect."""

    EXPIRED = "expired"
    """It has not been heard of for too long: another one may take the run."""

    RELEASED = "released"
    """It has let go of the run, or has lost it."""


class Status(StrEnum):
    """The status of a run, and of a step's state."""

    PENDING = "pending"
    FAILED = "failed"
    COMPLETED = "completed"


@dataclass(frozen=True, order=True, slots=True)
class TaskKey:
    """What addresses a task within a run: one unit of work of a step.

    Attributes:
        step_slug: the step.
        index: which of the step's tasks; a plain step has one, 0.
    """

    step_slug: str
    index: int = 0

    def __str__(self) -> str:
        """Name it for people: a plain step's task is the step."""
        return repr(self.step_slug) if self.index == 0 else f"{self.step_slug!r}[{self.index}]"

    def as_parameters(self) -> dict[str, object]:
        """Return it as the parameters of a statement."""
        return {"step_slug": self.step_slug, "task_index": self.index}


class Ending(StrEnum):
    """How a run or a step ended: its status, and what the status alone does not say."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    """`pgflow.cancel_run` ended it; its status is `failed`."""


CANCELLED = Ending.CANCELLED.value
"""The reason of a cancellation that names no other one."""


def _find_ending(noted: object, info: ValidationInfo) -> Ending | None:
    """Return how it ended; the column `ended_as` counts only where the status is `failed`."""
    status = info.data.get("status")
    if status not in (Status.COMPLETED, Status.FAILED):
        return None
    return Ending.CANCELLED if status is Status.FAILED and noted == Ending.CANCELLED else Ending(status)


EndedAs = Annotated[Ending | None, BeforeValidator(_find_ending)]
"""How a row ended, None while it is pending. Its model has `status` before it."""


class WorkflowSummary(BaseModel):
    """One line of `pgflow-prefect list`."""

    model_config = ConfigDict(frozen=True)

    slug: str
    steps: int
    deps: int
    pending: int
    completed: int
    failed: int
    enabled: bool | None
    """Whether workers and bridges take its runs; None: neither was said."""
    bound: dict[str, int] | None = None
    """How many steps rows bind to which kind of handler; the others are the file's, or external."""


class Run(BaseModel):
    """One execution of a workflow: a row of `pgflow.runs`. Times are the database's."""

    model_config = ConfigDict(frozen=True)

    id: UUID
    workflow_slug: str
    status: Status
    ended_as: EndedAs = Field(default=None, validate_default=True)
    payload: RawJson | None = None
    """None where it was not asked for, or is beyond the limits."""
    payload_problem: str | None = None
    """In what the payload is beyond the limits, where it was asked for."""
    epoch: int
    remaining: int | None
    steps: int | None = None
    """Those of its definition; None until it begins."""
    error_message: Shown | None
    created_at: datetime | None
    finished_at: datetime | None
    flow_run_id: UUID | None = None
    held_by: str | None = None
    held: Held | None = None
    recoveries: int = 0
    stale_writes: int = 0
    set_aside: str | None = None
    """Why it could not be taken; None for a run that nothing keeps from being taken."""
    next_try: datetime | None = None
    """When a worker or a bridge tries again to take it."""
    is_older: bool = False
    """Whether workers and bridges leave it alone, unless they adopt: begun before its workflow was enabled."""
    is_unshown: bool = False
    """Whether Prefect was not told of it, because its workflow is recorded later; see `mark_unshown`."""

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel_run` ended it, where a failed one has failed by itself."""
        return self.ended_as is Ending.CANCELLED


class RunEnd(BaseModel):
    """How a run stands when its owner has nothing left to do for it.

    Attributes:
        id: the run.
        status: completed or failed; pending where it is left to another process.
        ended_as: how it ended.
        epoch: in which it was taken last.
        error_message: why it has failed.
        results: of the steps that were asked for, by slug; none unless the run is completed.
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
        """Whether `cancel_run` ended it, where a failed one has failed by itself."""
        return self.ended_as is Ending.CANCELLED


class TakenRun(BaseModel):
    """A run that was reserved for a flow run which is yet to be created.

    Attributes:
        run_id: the run.
        workflow_slug: its workflow.
        epoch: in which it was taken.
        former_flow_run_id: whose lease has run out; None for a run that was never executed before.
        was_held: its former owner let the lease run out, and did not hand the run back.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    workflow_slug: str
    epoch: int
    former_flow_run_id: UUID | None
    was_held: bool = False

    @property
    def idempotency_key(self) -> str:
        """Names the flow run to be created: asked for twice, Prefect creates one."""
        return f"pgflow/{self.run_id}/{self.epoch}"


class LinkRequest(NamedTuple):
    """The flow run that a run was reserved for.

    Attributes:
        run_id: the run.
        epoch: in which it was reserved.
        flow_run_id: what was created for it.
    """

    run_id: UUID
    epoch: int
    flow_run_id: UUID


class LinkedRun(BaseModel):
    """What is known of a run whose flow run was named.

    Attributes:
        run_id: the run.
        linked: false: another process has taken it meanwhile.
        status: of the run; None for a run that is gone.
        remaining: how many of its steps are not completed.
        definition_id: the definition that it began with.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    linked: bool
    status: Status | None
    remaining: int | None
    definition_id: int | None


class Installation(BaseModel):
    """A database among those that share a Prefect server.

    Attributes:
        id: what its objects in Prefect are tagged with.
        stamp: of the database that it was stamped in.
        current_stamp: of the database that it is in now.
        former_stamps: of the databases that it was moved from.
        fits: both stamps are of one database; else this one is a copy.
        is_used: it has written to Prefect.
    """

    model_config = ConfigDict(frozen=True)

    id: UUID
    stamp: str | None
    current_stamp: str
    former_stamps: tuple[str, ...]
    fits: bool
    is_used: bool


class Enabled(BaseModel):
    """Whether workers and bridges take a workflow's runs, and those begun since when."""

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    enabled: bool
    since: datetime


class StepState(BaseModel):
    """What is known of one step in one run: a row of `pgflow.step_states`, and the state of its task run."""

    model_config = ConfigDict(frozen=True)

    step_slug: str
    status: Status
    ended_as: EndedAs = Field(default=None, validate_default=True)
    attempts: int
    step_result: RawJson | None
    error_message: Shown | None
    result_problem: str | None = None
    """In what the result is beyond the limits, and so not there."""
    created_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    task_state: str | None = None
    """The state of its task run in Prefect; of a step that has ended, what Prefect shows, or is about to show."""
    handler: str | None = None
    """Who does it, as the latest claim found it."""
    first_claimed_at: datetime | None = None
    """When Prefect's first attempt was claimed; None for steps of runs from before this was noted."""
    tasks: int | None = None
    """How many tasks a map step has; None for a plain step, which has one, and while that is not known."""
    tasks_completed: int | None = None
    """How many of them are completed."""
    skip_reason: Shown | None = None
    """Why it was skipped; its status is then completed, and it has no result."""

    @field_validator("task_state")
    @classmethod
    def _end_task_state(cls, noted: str | None, info: ValidationInfo) -> str | None:
        """Replace what was noted while the step was worked on, if it has ended since: by a cancellation, say."""
        ended_as = info.data.get("ended_as")
        return ended_as.capitalize() if ended_as is not None and noted in WORKING else noted


class Claim(BaseModel):
    """What the process that executes a step gets: which attempt it is, and the step's input.

    Attributes:
        status: pending, or completed already.
        attempt: which execution this is; where an external worker does the step, the latest one there was.
        payload: None where it was not asked for, and where the step is completed or an external worker does it.
        upstream_results: an object, by the upstream step's slug; None likewise.
        kind: of the row that binds the step; None where there is none.
        target: of that row.
        options: of that row.
        waits: an external worker does the step, and nothing was claimed.
        waited: seconds for which that has been so.
        began_at: when the work on a completed step that an external worker did began.
        ended_at: when it ended.
        note: its result, shortened.
    """

    model_config = ConfigDict(frozen=True)

    status: Status
    attempt: int
    payload: RawJson | None = None
    upstream_results: RawJson | None = None
    kind: str | None = None
    target: str | None = None
    options: dict[str, JsonValue] | None = None
    waits: bool = False
    waited: float | None = None
    began_at: datetime | None = None
    ended_at: datetime | None = None
    note: Shown | None = None


class ClaimRequest(NamedTuple):
    """What a task is claimed with.

    Attributes:
        task: of the run.
        task_run_id: Prefect's task run of it.
        upstream: the upstream steps whose results are wanted, None for all.
        with_payload: whether the run's payload is wanted.
        bound: the kind of its handler, where no row says otherwise.
        has_function: whether this process could do it in Python.
        handler: who does it in words, where no row says otherwise, for `status`.
    """

    task: TaskKey
    task_run_id: UUID
    upstream: list[str] | None
    with_payload: bool
    bound: str = "python"
    has_function: bool = True
    handler: str = "python"

    def as_parameters(self) -> dict[str, object]:
        """Return it as the parameters of a statement."""
        return _flatten(self._asdict())


class Completion(NamedTuple):
    """That a task is done.

    Attributes:
        task: of the run.
        result: JSON text.
        attempt: what the claim has returned.
        task_run_id: Prefect's task run of it.
    """

    task: TaskKey
    result: str
    attempt: int
    task_run_id: UUID

    def as_parameters(self) -> dict[str, object]:
        """Return it as the parameters of a statement."""
        return _flatten(self._asdict())


class Failure(NamedTuple):
    """That a task has failed, and its run with it.

    Attributes:
        task: of the run.
        error_message: the reason, for people.
        state_name: what Prefect shows of the task run.
        attempt: what the claim has returned; None for any attempt.
        task_run_id: Prefect's task run of it.
    """

    task: TaskKey
    error_message: str
    state_name: str
    attempt: int | None
    task_run_id: UUID

    def as_parameters(self) -> dict[str, object]:
        """Return it as the parameters of a statement."""
        return _flatten(self._asdict())


class TaskElement(NamedTuple):
    """What is to be done to a task of a run, as one of several in a statement.

    Attributes:
        run_id: the run.
        epoch: in which it was taken.
        asked: what is to be done.
    """

    run_id: UUID
    epoch: int
    asked: Completion | Failure | ClaimRequest


def _flatten(fields: dict[str, object]) -> dict[str, object]:
    task = fields.pop("task")
    assert isinstance(task, TaskKey)
    return task.as_parameters() | fields


class AwaitedStep(NamedTuple):
    """A task that another program does, and what of ours waits for it.

    Attributes:
        run_id: the run.
        task: of the run.
        epoch: in which the run was taken here.
        task_run_id: what waits.
        bound: to what kind of handler the step is bound in Python: in force where no row says otherwise.
        has_function: whether this process could do it in Python.
    """

    run_id: UUID
    task: TaskKey
    epoch: int
    task_run_id: UUID
    bound: str
    has_function: bool


class Outcome(StrEnum):
    """Why there is nothing to wait for any more."""

    COMPLETED = "completed"
    FAILED = "failed"
    LOST = "lost"
    """Another owner has taken the run."""
    ENDED = "ended"
    """The run has, and the step has not: no process will do it."""
    REBOUND = "rebound"
    """From now on the process that waits is to do it."""


class StepEnd(BaseModel):
    """The end of waiting for a step.

    Attributes:
        task_run_id: what has waited.
        outcome: why it need not any more.
        message: the result, shortened, or the reason.
        began_at: when the work began; where the step was never claimed, when it was started.
        ended_at: when it ended.
    """

    model_config = ConfigDict(frozen=True)

    task_run_id: UUID
    outcome: Outcome
    message: Shown | None
    began_at: datetime | None
    ended_at: datetime | None


class StepBinding(BaseModel):
    """A row of `pgflow_prefect.bindings`."""

    model_config = ConfigDict(frozen=True)

    step_slug: str
    kind: str
    target: str | None
    options: dict[str, JsonValue]


class BindingChange(BaseModel):
    """A row of `pgflow_prefect.binding_changes`; `before` and `after` are None where there was no row."""

    model_config = ConfigDict(frozen=True)

    step_slug: str
    before: dict[str, JsonValue] | None
    after: dict[str, JsonValue] | None
    changed_at: datetime
    changed_by: str
    undone_at: datetime | None
    undone_by: str | None


class ShadowSummary(BaseModel):
    """What came of running a step's handler beside an external worker."""

    model_config = ConfigDict(frozen=True)

    step_slug: str
    same: int
    different: int
    failed: int
    seconds: float | None
    """Median of what the handler took."""
    details: list[str]
    """Of the latest one that was not the same."""


class Report(BaseModel):
    """A step's state after a report on it: of this report, or of the one that came first."""

    model_config = ConfigDict(frozen=True)

    status: Status
    ended_as: EndedAs = Field(default=None, validate_default=True)
    error_message: Shown | None
