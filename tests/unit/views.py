"""What PostgreSQL and Prefect say of a run, written short."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from prefect.client.schemas.objects import StateType

from pgflow_prefect.database.unsettled import UnsettledRun, UnsettledStep
from pgflow_prefect.deployment.reconciliation.comparison import (
    View,
)
from pgflow_prefect.deployment.reconciliation.disagreements import (
    Disagreement,
    SetFlowRun,
    SetTaskRun,
    ShownFlowRun,
    ShownTaskRun,
)
from pgflow_prefect.models import Ending, Held, Status, TaskKey
from pgflow_prefect.prefect_api.ids import find_task_run_id

NOW = datetime(2026, 1, 1, tzinfo=UTC)
GRACE = timedelta(seconds=10)
LAG = timedelta(minutes=1)
HOUR = timedelta(hours=1)
RUN, FORMER, LATEST = uuid4(), uuid4(), uuid4()

Shown = ShownFlowRun | ShownTaskRun


def a_run(
    status: Status = Status.PENDING,
    held: Held = Held.EXPIRED,
    *,
    error_message: str | None = None,
    ended_as: Ending | None = None,
    is_given_up: bool = False,
    ended: timedelta = HOUR,
    taken: timedelta = 2 * HOUR,
    flow_run_id: UUID | None = LATEST,
    flow_run_ids: tuple[UUID, ...] = (LATEST,),
) -> UnsettledRun:
    """A run that ended, and was taken, so long ago."""
    return UnsettledRun(
        id=RUN,
        workflow_slug="workflow",
        status=status,
        ended_as=ended_as,
        is_given_up=is_given_up,
        error_message=error_message,
        finished_at=None if status is Status.PENDING else NOW - ended,
        held=held,
        epoch=len(flow_run_ids),
        flow_run_id=flow_run_id,
        taken_at=NOW - taken,
        flow_run_ids=flow_run_ids,
        now=NOW,
    )


def a_flow_run(
    type_: StateType,
    name: str | None = None,
    *,
    id_: UUID = LATEST,
    age: timedelta = 2 * HOUR,
    cancelled: bool = False,
    deployed: bool = False,
    run_id: UUID | None = RUN,
) -> ShownFlowRun:
    state = name or type_.value.capitalize()
    return ShownFlowRun(id_, "an-animal", type_, state, NOW - age, cancelled, deployed, run_id, owned=True)


def a_step(
    status: Status,
    slug: str = "step",
    *,
    flow_run_id: UUID = LATEST,
    error: str | None = None,
    ended_as: Ending | None = None,
) -> UnsettledStep:
    return UnsettledStep(
        run_id=RUN,
        step_slug=slug,
        status=status,
        ended_as=ended_as,
        error_message=error,
        task_run_id=find_task_run_id(flow_run_id, TaskKey(slug)),
    )


def a_task_run(type_: StateType, slug: str = "step", *, flow_run_id: UUID = LATEST) -> ShownTaskRun:
    return ShownTaskRun(find_task_run_id(flow_run_id, TaskKey(slug)), flow_run_id, type_)


def view(run: UnsettledRun, *shown: Shown, steps: Iterable[UnsettledStep] = ()) -> View:
    flow_runs = {each.id: each for each in shown if isinstance(each, ShownFlowRun)}
    task_runs = {each.id: each for each in shown if isinstance(each, ShownTaskRun)}
    return View(run, tuple(steps), flow_runs, task_runs, GRACE, LAG)


def only(found: list[Disagreement]) -> Disagreement:
    [disagreement] = found
    return disagreement


def flow_run_targets(disagreement: Disagreement) -> dict[UUID, StateType]:
    return {each.flow_run_id: each.target.type for each in disagreement.actions if isinstance(each, SetFlowRun)}


def task_run_targets(disagreement: Disagreement) -> dict[UUID, StateType]:
    return {each.task_run_id: each.target.type for each in disagreement.actions if isinstance(each, SetTaskRun)}
