"""Rules that compare a run in PostgreSQL and in Prefect, and return the disagreements.

PostgreSQL is the truth. Cancel and Retry in Prefect are the exception, because they are users' requests.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from prefect.client.schemas.objects import StateType

from pgflow_prefect.database.unsettled import UnsettledRun, UnsettledStep
from pgflow_prefect.deployment.reconciliation.disagreements import (
    Action,
    CancelRun,
    CreateTaskRun,
    Disagreement,
    Kind,
    ReleaseRun,
    SetFlowRun,
    SetTaskRun,
    ShownFlowRun,
    ShownTaskRun,
    Target,
    describe,
)
from pgflow_prefect.models import CANCELLED, Ending, Held, Status
from pgflow_prefect.prefect_api.ids import find_task_run_id, make_placeholder

START = 6
"""A flow run may take this many graces from its start until it takes its run: it may have to fetch a container."""

_EPOCHS = 20  # the latest ones, in which a step may have been claimed before its run was shown

_VANISHED = Target(StateType.CRASHED, "no process executes it any more, according to PostgreSQL")
_IN_PREFECT = f"{CANCELLED} in Prefect"
_NOT_BEGUN = frozenset({StateType.SCHEDULED, StateType.PENDING})


@dataclass(frozen=True)
class View:
    """One run on both sides.

    Attributes:
        run: the run.
        steps: those of its steps that a task run has claimed.
        flow_runs: those of its flow runs that Prefect knows, by id.
        task_runs: by id. For an ended run, the task runs of its steps. For a flow run without a process, the task runs
            that have not ended.
        grace: for how long the two may differ.
        lag: for how long task runs may be behind, because Prefect stores their events one by one.
    """

    run: UnsettledRun
    steps: tuple[UnsettledStep, ...]
    flow_runs: Mapping[UUID, ShownFlowRun]
    task_runs: Mapping[UUID, ShownTaskRun]
    grace: timedelta
    lag: timedelta

    @property
    def current(self) -> ShownFlowRun | None:
        """The flow run of the run's last epoch; all others are former ones."""
        return None if self.run.flow_run_id is None else self.flow_runs.get(self.run.flow_run_id)

    def may_change(self, flow_run_id: UUID | None) -> bool:
        """Tell whether a flow run belongs to this installation and to this run."""
        shown = None if flow_run_id is None else self.flow_runs.get(flow_run_id)
        return shown is not None and shown.is_of(self.run.id)


def is_over(run: UnsettledRun, grace: timedelta) -> bool:
    """Tell whether a run has ended for long enough that Prefect should show it, with no process at work on it."""
    if run.status is Status.PENDING or run.held is Held.LEASED:  # a failed run's claimed steps may still finish
        return False
    return run.finished_at is None or run.now - run.finished_at >= grace


def list_dead(run: UnsettledRun, grace: timedelta) -> list[UUID]:
    """Return the run's flow runs that no process should be executing, to ask Prefect for them."""
    if run.status is not Status.PENDING and not is_over(run, grace):
        return []
    alive = run.flow_run_id if run.held is Held.LEASED else None
    return [each for each in run.flow_run_ids if each != alive]


def compare(view: View) -> list[Disagreement]:
    """Return what PostgreSQL and Prefect disagree about; flow runs of another installation are left alone."""
    found: list[Disagreement] = []
    if view.run.status is Status.PENDING:
        found = [*_compare_pending(view), *_compare_former(view)]
    elif is_over(view.run, view.grace):
        found = [*_compare_ended(view), *_compare_former(view)]
    return [kept for each in found if (kept := _keep_own(view, each)) is not None]


def _keep_own(view: View, found: Disagreement) -> Disagreement | None:
    """Return a disagreement without repairs of other installations' objects; None if no repair is left."""
    own = tuple(each for each in found.actions if _is_own(view, each))
    if own == found.actions:
        return found
    return found.model_copy(update={"actions": own, "repair": describe(own)}) if own else None


def _is_own(view: View, action: Action) -> bool:
    if isinstance(action, SetFlowRun | CreateTaskRun):
        return view.may_change(action.flow_run_id)
    if isinstance(action, SetTaskRun):
        return view.may_change(view.task_runs[action.task_run_id].flow_run_id)
    return True


def is_settled(view: View) -> bool:
    """Tell whether a run without disagreements has also ended in Prefect."""
    return (
        is_over(view.run, view.lag)
        and all(each.is_final for each in view.flow_runs.values() if view.may_change(each.id))
        and all(each.is_final for each in view.task_runs.values() if view.may_change(each.flow_run_id))
    )


def compare_without_prefect(run: UnsettledRun) -> list[Disagreement]:
    """Return what the run's row alone shows: vanished owners, whose flow runs Prefect may show as alive."""
    if run.status is Status.PENDING and run.held is Held.EXPIRED:
        found = "its owner's lease has expired"
    elif run.status is Status.FAILED and run.is_given_up:
        found = run.error_message or ""
    else:
        return []
    return [_make(run, Kind.ZOMBIE, run.flow_run_id, found)]


# Pending runs


def _compare_pending(view: View) -> Iterator[Disagreement]:
    run, shown = view.run, view.current
    if run.held is Held.LEASED or run.flow_run_id is None:
        return
    if shown is None:
        if run.held is Held.QUEUED:
            yield _make(run, Kind.ORPHANED_RUN, None, "its flow run was deleted in Prefect", ReleaseRun(run.epoch))
    elif shown.is_cancelled:
        yield _cancel(view, shown)
    elif run.held is Held.QUEUED:
        yield from _compare_queued(view, shown)
    else:
        yield from _find_zombie(view, shown, "its owner has vanished")


def _cancel(view: View, shown: ShownFlowRun) -> Disagreement:
    target = Target(StateType.CANCELLED, _IN_PREFECT)
    actions: list[Action] = [CancelRun(_IN_PREFECT)]
    if not shown.is_final:
        actions.append(SetFlowRun(shown.id, target))
    actions += _close_tasks(view, shown.id, target)
    found = f"its flow run {shown.name!r} is {shown.state}, and it is pending"
    return _make(view.run, Kind.CANCELLED_IN_PREFECT, shown.id, found, *actions)


def _compare_queued(view: View, shown: ShownFlowRun) -> Iterator[Disagreement]:
    """Compare a run whose flow run was submitted, and has not taken it yet."""
    run = view.run
    found = f"it waits for flow run {shown.name!r}, which is {shown.state}"
    if shown.is_final:
        yield _make(run, Kind.ORPHANED_RUN, shown.id, found, ReleaseRun(run.epoch))
    elif shown.type not in _NOT_BEGUN and run.now - shown.since >= START * view.grace:
        yield _make(run, Kind.ZOMBIE, shown.id, found, SetFlowRun(shown.id, _VANISHED), ReleaseRun(run.epoch))


# Flow runs that no process executes


def _compare_former(view: View) -> Iterator[Disagreement]:
    run = view.run
    if run.now - run.taken_at < view.grace:
        return  # a former owner needs a moment to notice its loss
    for shown in view.flow_runs.values():
        if shown.id != run.flow_run_id:
            yield from _find_zombie(view, shown, "another one has taken the run")


def _find_zombie(view: View, shown: ShownFlowRun, why: str) -> Iterator[Disagreement]:
    actions: list[Action] = []
    patience = view.lag if shown.is_final else START * view.grace if shown.type is StateType.PENDING else view.grace
    if _waits(shown) or view.run.now - shown.since < patience:
        return
    if not shown.is_final:
        actions.append(SetFlowRun(shown.id, _VANISHED))
    if actions := [*actions, *_close_tasks(view, shown.id, _VANISHED)]:
        tasks = " with task runs that have not ended" if shown.is_final else ""
        found = f"flow run {shown.name!r} is {shown.state}{tasks}, and {why}"
        yield _make(view.run, Kind.ZOMBIE, shown.id, found, *actions)


def _waits(shown: ShownFlowRun) -> bool:
    """Tell whether something will start the flow run: without a deployment, only its own process can."""
    return shown.type is StateType.SCHEDULED and shown.deployed


def _close_tasks(view: View, flow_run_id: UUID, otherwise: Target) -> Iterator[SetTaskRun]:
    """Return the actions that end a flow run's task runs, with the states of their steps' rows if these have ended.

    It leaves out the steps of an ended run: see `_correct_tasks`.
    """
    steps = {step.task_run_id: step for step in view.steps}
    for task in view.task_runs.values():
        if task.flow_run_id != flow_run_id or task.is_final:
            continue
        if (step := steps.get(task.id)) is None:
            yield SetTaskRun(task.id, otherwise)
        elif view.run.status is Status.PENDING:
            yield SetTaskRun(task.id, _find_target(step, otherwise))


# Runs that have ended


def _compare_ended(view: View) -> Iterator[Disagreement]:
    run, shown = view.run, view.current
    if shown is not None and _is_tried_again(view, shown):
        return
    tasks = tuple(_correct_tasks(view)) if is_over(run, view.lag) else ()
    if shown is not None and (kind := _judge(run, shown)) is not None:
        found = f"it is {_describe_status(run)}, and flow run {shown.name!r} is {shown.state}"
        yield _make(run, kind, shown.id, found, SetFlowRun(shown.id, _find_run_target(run)), *tasks)
    elif tasks:
        found = f"it is {_describe_status(run)}, but {len(tasks)} of its task runs differ from its steps"
        yield _make(run, Kind.LAGGING, shown.id if shown else None, found, *tasks)


def _is_tried_again(view: View, shown: ShownFlowRun) -> bool:
    """Tell whether a user has pressed Retry and the flow run has not yet reopened its run."""
    run = view.run
    if run.status is not Status.FAILED or run.finished_at is None or shown.since < run.finished_at:
        return False
    if shown.type is StateType.SCHEDULED:
        return True
    starting = {StateType.PENDING: START * view.grace, StateType.RUNNING: view.grace}
    return shown.type in starting and run.now - shown.since < starting[shown.type]


def _judge(run: UnsettledRun, shown: ShownFlowRun) -> Kind | None:
    if run.is_cancelled:  # a worker of a former version showed it as failed
        return None if shown.type is StateType.CANCELLED else Kind.CANCELLED_IN_POSTGRES
    if not shown.is_final:
        return Kind.LAGGING
    if run.status is Status.COMPLETED:
        return None if shown.type is StateType.COMPLETED else Kind.CRASHED_THEN_COMPLETED
    # Failed, Crashed, Cancelled: each is an end without success.
    return Kind.LAGGING if shown.type is StateType.COMPLETED else None


def _correct_tasks(view: View) -> Iterator[Action]:
    otherwise = _find_run_target(view.run) if view.run.is_cancelled else _VANISHED
    for step in view.steps:
        target = _find_target(step, otherwise)
        task = view.task_runs.get(step.task_run_id)
        if task is None:
            yield from _create_task(view, step, target)
        elif not _is_right(task, step):
            yield SetTaskRun(task.id, target)
    if view.current is not None:
        yield from _close_tasks(view, view.current.id, otherwise)


def _create_task(view: View, step: UnsettledStep, target: Target) -> Iterator[CreateTaskRun]:
    if step.status is Status.PENDING:
        return
    for flow_run_id in view.flow_runs:  # a deleted one can show nothing
        if _is_of(view.run, step, flow_run_id):
            yield CreateTaskRun(step.task_run_id, flow_run_id, step.step_slug, target)


def _is_of(run: UnsettledRun, step: UnsettledStep, flow_run_id: UUID) -> bool:
    """Tell whether a step's task run belongs to a flow run: it was claimed there, or before that showed the run."""
    if find_task_run_id(flow_run_id, step.task) == step.task_run_id:
        return True
    if flow_run_id != run.flow_run_id:
        return False
    epochs = range(run.epoch, max(0, run.epoch - _EPOCHS), -1)
    return any(find_task_run_id(make_placeholder(run.id, each), step.task) == step.task_run_id for each in epochs)


def _is_right(task: ShownTaskRun, step: UnsettledStep) -> bool:
    if step.status is Status.COMPLETED:
        return task.type is StateType.COMPLETED
    if step.ended_as is Ending.CANCELLED and task.type is StateType.FAILED:
        return False
    return task.is_final and (step.status is Status.PENDING or task.type is not StateType.COMPLETED)


def _find_target(step: UnsettledStep, otherwise: Target) -> Target:
    """Return the state that a step's task run should show; `otherwise` if the step has not ended."""
    if step.status is Status.COMPLETED:
        return Target(StateType.COMPLETED, "completed, according to PostgreSQL")
    if step.status is Status.PENDING:
        return otherwise
    reason = step.error_message or "failed, according to PostgreSQL"
    return Target(StateType.CANCELLED if step.ended_as is Ending.CANCELLED else StateType.FAILED, reason)


def _find_run_target(run: UnsettledRun) -> Target:
    if run.status is Status.COMPLETED:
        return Target(StateType.COMPLETED, "completed, according to PostgreSQL")
    reason = run.error_message or "failed, according to PostgreSQL"
    return Target(StateType.CANCELLED if run.is_cancelled else StateType.FAILED, reason)


def _describe_status(run: UnsettledRun) -> str:
    return run.ended_as or run.status


def _make(run: UnsettledRun, kind: Kind, flow_run_id: UUID | None, found: str, *actions: Action) -> Disagreement:
    return Disagreement(
        kind=kind,
        run_id=run.id,
        workflow_slug=run.workflow_slug,
        flow_run_id=flow_run_id,
        found=found,
        repair=describe(actions) or "left to the next owner of the run",
        actions=actions,
    )
