"""What PostgreSQL and Prefect can disagree about, and the repairs."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias
from uuid import UUID

from prefect.client.schemas.objects import TERMINAL_STATES, StateType
from pydantic import BaseModel, ConfigDict, Field

from pgflow_prefect.prefect_api.ids import find_run_id


class Kind(StrEnum):
    """The classes of disagreement."""

    ZOMBIE = "zombie"
    """Prefect shows a flow run, or task runs of one, as alive, and its process is gone."""

    ORPHANED_RUN = "orphaned_run"
    """A run waits for a flow run that will not execute it."""

    ORPHANED_FLOW_RUN = "orphaned_flow_run"
    """A flow run is there for a run that is not."""

    CRASHED_THEN_COMPLETED = "crashed_then_completed"
    """The run is completed, and its flow run shows that it failed."""

    CANCELLED_IN_PREFECT = "cancelled_in_prefect"
    """A user has cancelled the flow run, and the run is pending."""

    CANCELLED_IN_POSTGRES = "cancelled_in_postgres"
    """A user has cancelled the run, and its flow run has not ended."""

    LAGGING = "lagging"
    """The run has ended, and Prefect shows an earlier or another state of it or its steps."""


@dataclass(frozen=True)
class ShownFlowRun:
    """A flow run as Prefect shows it.

    Attributes:
        id: the flow run.
        name: the name that Prefect gave it.
        type: the type of its state.
        state: the name of its state.
        since: when it entered that state.
        is_cancelled: a user has cancelled it, or is doing so.
        deployed: it has a deployment, so that something starts it when its time has come.
        run_id: its parameter of that name.
        owned: it is this installation's: its tags say so, or those of its deployment.
    """

    id: UUID
    name: str
    type: StateType
    state: str
    since: datetime
    is_cancelled: bool = False
    deployed: bool = False
    run_id: UUID | None = None
    owned: bool = False

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.type in TERMINAL_STATES

    def is_of(self, run_id: UUID) -> bool:
        """Tell whether it is this installation's flow run of a run, and may be changed.

        Neither rows nor its parameter are a proof of that: anyone who uses the Prefect server may name a run.
        """
        return self.owned and self.named_run_id == run_id

    @property
    def named_run_id(self) -> UUID:
        """The run that it executes: the one that its parameter names, or the one that it creates."""
        return self.run_id or find_run_id(self.id)


@dataclass(frozen=True)
class ShownTaskRun:
    """A task run as Prefect shows it.

    Attributes:
        id: the task run.
        flow_run_id: its flow run.
        type: the type of its state.
    """

    id: UUID
    flow_run_id: UUID | None
    type: StateType

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.type in TERMINAL_STATES


@dataclass(frozen=True)
class Target:
    """The state that Prefect is to show: its type, and why."""

    type: StateType
    message: str


@dataclass(frozen=True)
class SetFlowRun:
    """Give a flow run another state."""

    flow_run_id: UUID
    target: Target


@dataclass(frozen=True)
class SetTaskRun:
    """Give a task run another state."""

    task_run_id: UUID
    target: Target


@dataclass(frozen=True)
class CreateTaskRun:
    """Create the task run of a step, of which Prefect has never heard."""

    task_run_id: UUID
    flow_run_id: UUID
    step_slug: str
    target: Target


@dataclass(frozen=True)
class CancelRun:
    """Cancel the run."""

    reason: str


@dataclass(frozen=True)
class ReleaseRun:
    """Hand the run back, for its next owner."""

    epoch: int


Action: TypeAlias = SetFlowRun | SetTaskRun | CreateTaskRun | CancelRun | ReleaseRun


class Disagreement(BaseModel):
    """One run, or flow run, that PostgreSQL and Prefect do not agree about.

    Attributes:
        kind: its class.
        run_id: the run; None where Prefect alone has something.
        workflow_slug: its workflow.
        flow_run_id: the flow run; None where Prefect has none, or was not asked.
        found: what is, in words.
        repair: what would make it right, or did, in words.
        repaired: whether that was done.
        error: why it could not be done.
        actions: the repair, to be done in this order.
    """

    model_config = ConfigDict(frozen=True)

    kind: Kind
    run_id: UUID | None
    workflow_slug: str
    flow_run_id: UUID | None
    found: str
    repair: str
    repaired: bool = False
    error: str | None = None
    actions: tuple[Action, ...] = Field(default=(), exclude=True)

    def __str__(self) -> str:
        about = f"run {self.run_id}" if self.run_id else f"flow run {self.flow_run_id}"
        outcome = f"{self.repair}; failed: {self.error}" if self.error else self.repair
        return f"{self.kind}: {about} of {self.workflow_slug!r}: {self.found}; {outcome}"


def describe(actions: Iterable[Action]) -> str:
    """Return a repair in words."""
    counted = Counter(_describe(action) for action in actions)
    return ", ".join(text if count == 1 else f"{text} ({count})" for text, count in counted.items())


def _describe(action: Action) -> str:
    match action:
        case SetFlowRun():
            return f"flow run to {action.target.type.value.capitalize()}"
        case SetTaskRun():
            return f"task run to {action.target.type.value.capitalize()}"
        case CreateTaskRun():
            return f"task run created as {action.target.type.value.capitalize()}"
        case CancelRun():
            return "run cancelled"
        case ReleaseRun():
            return "run handed back"
