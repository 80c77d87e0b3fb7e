"""Reports on tasks, and their answers."""

from typing import Annotated, NamedTuple
from uuid import UUID

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from pgflow_prefect.models.claims import ClaimRequest
from pgflow_prefect.models.keys import TaskKey, flatten
from pgflow_prefect.models.outcomes import AnyOutcome
from pgflow_prefect.models.status import EndedAs, Shown, Status


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
        return flatten(self._asdict())


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
        return flatten(self._asdict())


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


class Report(BaseModel):
    """A step's state after a report on it: of this report, or of the one that came first."""

    model_config = ConfigDict(frozen=True)

    status: Status
    ended_as: EndedAs = Field(default=None, validate_default=True)
    error_message: Shown | None
    skip_reason: str | None = None
    skip_message: Annotated[Shown | None, Field(validation_alias=AliasChoices("skip_message", "note"))] = None
    """Why the step was skipped, for people."""
    retry_after: float | None = None
    """The database tries the task again in so many seconds; None where it does not, or leaves that to the code."""
