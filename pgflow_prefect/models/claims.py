"""Claims of tasks, and their answers."""

from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict, JsonValue

from pgflow_prefect.models.keys import TaskKey, flatten
from pgflow_prefect.models.status import Shown, Status
from pgflow_prefect.raw_json import RawJson


class StepInput(BaseModel):
    """What a step's input is made of, read without a claim; its members are as those of a `Claim`."""

    model_config = ConfigDict(frozen=True)

    payload: RawJson
    upstream_results: RawJson
    logical_date: datetime | None
    interval_start: datetime | None
    interval_end: datetime | None


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
        return flatten(self._asdict())
