"""The data that rooms pass to each other: runs, step states, claims, reports. All are frozen."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, NamedTuple, TypeAlias
from uuid import UUID

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
)
from typing_extensions import TypedDict

from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.state_names import WORKING
from pgflow_prefect.wording import clean_lines

Shown = Annotated[str, AfterValidator(clean_lines)]
"""A text of a row that Prefect shows in its pages and in terminals. It is cleaned when it is read."""


class Held(StrEnum):
    """How a run's latest owner holds it."""

    LEASED = "leased"
    """The owner executes the run, or will begin now."""

    QUEUED = "queued"
    """The owner's flow run waits in Prefect."""

    EXPIRED = "expired"
    """The lease has expired, and another owner may take the run."""

    RELEASED = "released"
    """The owner has released the run, or has lost it."""


class Status(StrEnum):
    """The status of a run, and of a step's state."""

    PENDING = "pending"
    FAILED = "failed"
    COMPLETED = "completed"


@dataclass(frozen=True, order=True, slots=True)
class TaskKey:
    """The address of a task within a run. A task is one unit of work of a step.

    Attributes:
        step_slug: the step.
        index: the number of the task within its step; 0 for the only task of a plain step.
    """

    step_slug: str
    index: int = 0

    def __str__(self) -> str:
        """Name it for people. The task of a plain step has the step's name."""
        return repr(self.step_slug) if self.index == 0 else f"{self.step_slug!r}[{self.index}]"

    def as_parameters(self) -> dict[str, object]:
        """Return it as the parameters of a statement."""
        return {"step_slug": self.step_slug, "task_index": self.index}


@dataclass(frozen=True, slots=True)
class ItemKey:
    """The address of an item of a map within a run.

    Attributes:
        step_slug: the map.
        index: the item's place in the array.
    """

    step_slug: str
    index: int

    def __str__(self) -> str:
        """Name it for people."""
        return f"{self.step_slug!r}, item {self.index}"

    def as_parameters(self) -> dict[str, object]:
        """Return it as the parameters of a statement."""
        return {"step_slug": self.step_slug, "item_index": self.index}


class Ending(StrEnum):
    """How a run or a step ended. This tells more than its status."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    """`pgflow.cancel_run` ended it; its status is `failed`."""


NOT_RUN = "dependency_failed"
"""The skip_reason of a failed step that was not executed, because one that it waits for has failed."""

CANCELLED = Ending.CANCELLED.value
"""The reason of a cancellation without a reason."""


def _find_ending(noted: object, info: ValidationInfo) -> Ending | None:
    """Return how it ended. The column `ended_as` counts only if the status is `failed`."""
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
    """Whether workers and bridges take its runs; None if it was never enabled or disabled."""
    bound: dict[str, int] | None = None
    """The number of steps that rows bind, by kind. The file of handlers does the other steps, or they are external."""


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


class TakenRun(BaseModel):
    """A run that this process has reserved for a new flow run.

    Attributes:
        run_id: the run.
        workflow_slug: its workflow.
        epoch: in which it was taken.
        former_flow_run_id: the flow run whose lease has expired; None if the run was never executed before.
        was_held: its former owner let the lease run out, and did not hand the run back.
        backfill_id: the backfill that started or reopened it; None for a live run.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    workflow_slug: str
    epoch: int
    former_flow_run_id: UUID | None
    was_held: bool = False
    backfill_id: int | None = None

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


class Installation(BaseModel):
    """One of the databases that share a Prefect server.

    Attributes:
        id: the tag of its objects in Prefect has this id.
        stamp: identifies the database that was stamped.
        current_stamp: identifies the database that this row is in now.
        former_stamps: identify the databases that it was moved from.
        fits: whether both stamps identify one database; otherwise this database is a copy.
        is_used: whether it has written to Prefect.
    """

    model_config = ConfigDict(frozen=True)

    id: UUID
    stamp: str | None
    current_stamp: str
    former_stamps: tuple[str, ...]
    fits: bool
    is_used: bool


class Enabled(BaseModel):
    """Whether workers and bridges take a workflow's runs, and since when."""

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    enabled: bool
    since: datetime


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


class Claim(BaseModel):
    """The answer to a claim: the attempt, and the step's input.

    Attributes:
        status: pending, or completed already.
        attempt: the number of this attempt; if an external worker does the step, of the latest attempt.
        payload: None if it was not requested, if the step is completed, or if an external worker does it.
        upstream_results: an object, by the upstream step's slug; None in the same cases.
        kind: of the row that binds the step; None without a row.
        target: of that row.
        options: of that row.
        waits: an external worker does the step, and nothing was claimed.
        waited: seconds for which that has been so.
        began_at: when the work on a completed step that an external worker did began.
        ended_at: when it ended.
        note: its result, shortened; of a step that was skipped, why, for people.
        skip_reason: why the completed step was skipped; None for any other.
        logical_date: the time that the run is about; None if it is about none.
        interval_start: the beginning of the run's data interval.
        interval_end: its end.
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
    skip_reason: str | None = None
    logical_date: datetime | None = None
    interval_start: datetime | None = None
    interval_end: datetime | None = None


class StepInput(BaseModel):
    """What a step's input is made of, read without a claim; its members are as those of a `Claim`."""

    model_config = ConfigDict(frozen=True)

    payload: RawJson
    upstream_results: RawJson
    logical_date: datetime | None
    interval_start: datetime | None
    interval_end: datetime | None


class ClaimRequest(NamedTuple):
    """The request to claim a task.

    Attributes:
        task: of the run.
        task_run_id: Prefect's task run of it.
        upstream: the upstream steps whose results are requested; None for all.
        with_payload: whether the run's payload is requested.
        bound: the kind of its handler if no row binds it.
        has_function: whether this process has a function for it.
        handler: its handler in words if no row binds it, for `status`.
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


class SkipOutcome(TypedDict):
    """That a step is skipped.

    Attributes:
        skip: true.
        note: why, for people.
        cascade: whether what is below it is skipped, too, unless its rule says otherwise.
    """

    skip: bool
    note: str | None
    cascade: bool


class BranchOutcome(TypedDict):
    """That a step is completed, and that some of the steps that wait for it are skipped.

    Attributes:
        taken: the slugs of those that are not.
        whole: whether what is below the others is skipped, too, whatever its rules say.
    """

    taken: list[str]
    whole: bool


class CacheOutcome(TypedDict):
    """That a step is completed, and that steps of later runs may take over its result.

    Attributes:
        cache_key: a hash: a later step with the same one takes the result over.
        expires_in: seconds after the step's end until that is over; None for never.
    """

    cache_key: str
    expires_in: float | None


class CachedOutcome(TypedDict):
    """That a step is completed by the result of an earlier run.

    Attributes:
        cached_from: that run.
    """

    cached_from: str


AnyOutcome: TypeAlias = SkipOutcome | BranchOutcome | CacheOutcome | CachedOutcome


def is_skipping(outcome: AnyOutcome | None) -> bool:
    """Tell whether some of the next steps are skipped."""
    return outcome is not None and ("skip" in outcome or "taken" in outcome)


def find_source(outcome: AnyOutcome | None) -> str | None:
    """Return the run whose result a step takes over, if it takes one over."""
    found: dict[str, object] = {**outcome} if outcome is not None else {}
    return str(found["cached_from"]) if "cached_from" in found else None


class Completion(NamedTuple):
    """The report that a task is done.

    Attributes:
        task: of the run.
        result: JSON text.
        attempt: from the claim.
        task_run_id: Prefect's task run of it.
        outcome: that it is skipped, which branches it takes, or what it has to do with caching: see `AnyOutcome`.
    """

    task: TaskKey
    result: str
    attempt: int
    task_run_id: UUID
    outcome: AnyOutcome | None = None

    def as_parameters(self) -> dict[str, object]:
        """Return it as the parameters of a statement."""
        return _flatten(self._asdict())


class CachedResult(BaseModel):
    """The result of an earlier run that a step takes over.

    Attributes:
        run_id: that run.
        result: what its row has.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    result: RawJson


class Failure(NamedTuple):
    """The report that a task has failed, and its run with it.

    Attributes:
        task: of the run.
        error_message: the reason, for people.
        state_name: the state of the task run in Prefect.
        attempt: from the claim; None for any attempt.
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


@dataclass(frozen=True, slots=True)
class ClaimedItem:
    """An item of a map that this process has claimed.

    Attributes:
        index: its place in the array.
        attempt: which execution of it this is.
        item: its value.
    """

    index: int
    attempt: int
    item: RawJson


class Doing(StrEnum):
    """What is reported of an item of a map."""

    COMPLETE = "complete"
    SKIP = "skip"
    """It is left out of the map's result."""
    FAIL = "fail"
    RETRY = "retry"
    """It is to be claimed again, after a pause."""
    DEFER = "defer"
    """Another program reports it; it is to be claimed again after the pause, if there is one."""


class ItemReport(NamedTuple):
    """The report on one item of a map.

    Attributes:
        item_index: its place in the array.
        attempt: from the claim.
        doing: what is reported.
        result: JSON text, of a completed item.
        message: why it failed, or is left out, for people.
        pause: in seconds.
    """

    item_index: int
    attempt: int
    doing: Doing
    result: str | None = None
    message: str | None = None
    pause: float | None = None


class TaskElement(NamedTuple):
    """One of several requests for tasks in a statement.

    Attributes:
        run_id: the run.
        epoch: in which it was taken.
        asked: the request.
    """

    run_id: UUID
    epoch: int
    asked: Completion | Failure | ClaimRequest


def _flatten(fields: dict[str, object]) -> dict[str, object]:
    task = fields.pop("task")
    assert isinstance(task, TaskKey)
    return task.as_parameters() | fields


class MapState(BaseModel):
    """How a map stands, after reports on items of it.

    Attributes:
        report: the state of its step.
        run_status: of the run.
        total: how many items it has; None for a map that has ended without items.
        remaining: how many have not ended.
        failed: how many have failed.
        next_due: in how many seconds an item can be claimed again; None where none has such a time, or was asked for.
        items: what was claimed.
    """

    model_config = ConfigDict(frozen=True)

    report: "Report"
    run_status: Status
    total: int | None
    remaining: int | None
    failed: int | None
    next_due: float | None
    items: tuple[ClaimedItem, ...]


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


class PoolAttempt(NamedTuple):
    """An attempt of a step that a process of a work pool does.

    Attributes:
        run_id: the run.
        task: of the run.
        attempt: its number.
    """

    run_id: UUID
    task: TaskKey
    attempt: int

    def as_parameters(self) -> dict[str, object]:
        """Return task and attempt as the parameters of a statement."""
        return {"attempt": self.attempt, **self.task.as_parameters()}


class PoolInput(StepInput):
    """What a process of a work pool gets with its attempt.

    Attributes:
        workflow_slug: of the run.
    """

    workflow_slug: str


class PoolProgress(BaseModel):
    """What PostgreSQL knows of an attempt on a work pool.

    Attributes:
        is_awaited: a report of it is awaited from a work pool.
        has_begun: a process has claimed it.
        is_live: the lease of that process holds.
        failure: why the process says that the attempt has failed.
        is_final: another attempt would only repeat the failure.
    """

    model_config = ConfigDict(frozen=True)

    is_awaited: bool
    has_begun: bool
    is_live: bool
    failure: Shown | None
    is_final: bool


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
    """Comparisons of a step's handler with an external worker."""

    model_config = ConfigDict(frozen=True)

    step_slug: str
    same: int
    different: int
    failed: int
    seconds: float | None
    """The median time of the handler."""
    details: list[str]
    """The differences of the latest comparison that was not the same."""


class Report(BaseModel):
    """A step's state after a report on it: of this report, or of the one that came first."""

    model_config = ConfigDict(frozen=True)

    status: Status
    ended_as: EndedAs = Field(default=None, validate_default=True)
    error_message: Shown | None
    skip_reason: str | None = None
    skip_message: Annotated[Shown | None, Field(validation_alias=AliasChoices("skip_message", "note"))] = None
    """Why the step was skipped, for people."""


MapState.model_rebuild()
