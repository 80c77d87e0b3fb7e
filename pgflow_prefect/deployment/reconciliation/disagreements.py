"""The disagreements between PostgreSQL and Prefect, or Airflow, and their repairs."""

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
from pgflow_prefect.state_names import StateName


class Kind(StrEnum):
    """The classes of disagreement."""

    ZOMBIE = "zombie"
    """Prefect shows a flow run or its task runs as alive, but the process is gone."""

    ORPHANED_RUN = "orphaned_run"
    """A run waits for a flow run that will not execute it."""

    ORPHANED_FLOW_RUN = "orphaned_flow_run"
    """A flow run exists for a run that does not exist."""

    CRASHED_THEN_COMPLETED = "crashed_then_completed"
    """The run is completed, but its flow run shows a failure."""

    CANCELLED_IN_PREFECT = "cancelled_in_prefect"
    """A user has cancelled the flow run, but the run is pending."""

    CANCELLED_IN_POSTGRES = "cancelled_in_postgres"
    """A user has cancelled the run, but its flow run has not ended."""

    GIVEN_UP = "given_up"
    """The released pgflow has given a task up, so its run would never end."""

    LOST_MESSAGE = "lost_message"
    """A task of the released pgflow waits, and its message is in no queue. So no worker does it."""

    LAGGING = "lagging"
    """The run has ended, but Prefect shows an earlier or another state of it or its steps."""

    UNLIKE_AIRFLOW = "unlike_airflow"
    """Airflow executes the run, and its rows here are not as in Airflow."""


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
        owned: it belongs to this installation, by its own tags or by its deployment's tags.
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

        Neither rows nor its parameter prove that, because each user of the Prefect server may name a run.
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
        state: the name of its state, where it matters.
    """

    id: UUID
    flow_run_id: UUID | None
    type: StateType
    state: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether nothing follows: it has ended, or its step is not run."""
        return self.type in TERMINAL_STATES or self.state == StateName.NOT_RUN


@dataclass(frozen=True)
class Target:
    """The state that Prefect should show: its type, and the reason."""

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
    """Create the task run of a step that Prefect does not know."""

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
    """A disagreement about one run or flow run.

    Attributes:
        kind: its class.
        run_id: the run; None if only Prefect has an object.
        workflow_slug: its workflow.
        flow_run_id: the flow run; None if Prefect has none, or was not asked.
        found: the finding, in words.
        repair: the repair, in words.
        repaired: whether the repair was made.
        error: why the repair failed.
        actions: the actions of the repair, in this order.
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
