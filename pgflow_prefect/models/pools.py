"""Attempts that processes of a work pool make."""

from typing import NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from pgflow_prefect.models.claims import StepInput
from pgflow_prefect.models.keys import TaskKey
from pgflow_prefect.models.status import Shown


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
