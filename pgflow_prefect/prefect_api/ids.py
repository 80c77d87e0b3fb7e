"""The ids of runs and steps in Prefect."""

from dataclasses import dataclass, field
from uuid import UUID, uuid5

from prefect.client.schemas.objects import FlowRun

from pgflow_prefect.errors import UsageError
from pgflow_prefect.models import TaskKey

_PLACEHOLDER_VERSION = 8
"""The version of a UUID that its maker gives a meaning, as RFC 9562 has it. No server of Prefect gives one out."""

_RUN_NAMESPACE = UUID("7f0c6d1e-27e0-5e0f-9f2f-6a3b5f2f6f55")


def find_run_id(flow_run_id: UUID) -> UUID:
    """Return the id of the run that a flow run creates; the same again after a crash."""
    return uuid5(_RUN_NAMESPACE, str(flow_run_id))


def read_run_id(flow_run: FlowRun) -> UUID | None:
    """Return the run that a flow run's parameter names; None if it names none, or is invalid."""
    try:
        return parse_run_id(flow_run.parameters.get("run_id"))
    except UsageError:  # the flow run will fail with it when it starts
        return None


def parse_run_id(given: object) -> UUID | None:
    """Return the id of a run from a flow's parameter, a text or a UUID; None if there is none.

    Raises:
        UsageError: it is no UUID.
    """
    if given is None or isinstance(given, UUID):
        return given
    try:
        return UUID(str(given))
    except ValueError:
        raise UsageError(f"the parameter run_id is {given!r}, and no UUID: leave it out to begin a run") from None


SCHEDULE_ID = "schedule_id"
"""The parameter by which a schedule names the row with its payload."""


def parse_schedule_id(given: object) -> UUID | None:
    """Return the id of a schedule's row from a flow's parameter, a text or a UUID; None if there is none.

    Raises:
        UsageError: it is no UUID.
    """
    if given is None or isinstance(given, UUID):
        return given
    try:
        return UUID(str(given))
    except ValueError:
        raise UsageError(
            f"the parameter {SCHEDULE_ID} is {given!r}, and no UUID: leave it to the schedules of `pgflow-prefect "
            "deploy`"
        ) from None


def make_placeholder(run_id: UUID, epoch: int) -> UUID:
    """Return what stands for the flow run of a run that Prefect is not told of; the same for each call.

    Args:
        run_id: the run.
        epoch: in which it was taken.
    """
    made = uuid5(run_id, str(epoch)).int
    return UUID(int=made & ~(0xF << 76) | _PLACEHOLDER_VERSION << 76)


def is_placeholder(flow_run_id: UUID) -> bool:
    """Tell whether an id stands for a flow run that there is not."""
    return flow_run_id.version == _PLACEHOLDER_VERSION


def find_task_run_id(flow_run_id: UUID, task: TaskKey) -> UUID:
    """Return the id of the Prefect task run of a task; the same for each try of the flow run.

    A slug may have any characters, so an index in the name could be another step's slug. The id of the step's first
    task is a namespace for the others.
    """
    first = uuid5(flow_run_id, task.step_slug)
    return uuid5(first, str(task.index)) if task.index else first


@dataclass
class TaskRunIds:
    """The ids of the task runs of one flow run.

    Attributes:
        flow_run_id: the flow run.
    """

    flow_run_id: UUID
    _ids: dict[str, UUID] = field(default_factory=dict, init=False)  # by step slug

    def find(self, step_slug: str) -> UUID:
        """Return the id of a step's task run: ours, or the one that its task runner gave it."""
        known = self._ids.get(step_slug)
        if known is None:
            known = self._ids[step_slug] = find_task_run_id(self.flow_run_id, TaskKey(step_slug))
        return known

    def replace(self, step_slug: str, task_run_id: UUID) -> None:
        """Keep the id that a task runner gave a step's task run."""
        self._ids[step_slug] = task_run_id
