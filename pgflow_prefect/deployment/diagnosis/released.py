"""Checks of a database of the released pgflow: its version, its workers, its tasks."""

from datetime import datetime

from pgflow_prefect.database.diagnosis import FlowQueue
from pgflow_prefect.database.implementations.released import RELEASED
from pgflow_prefect.database.moving_statements import LostMessage, StalledTask
from pgflow_prefect.deployment.diagnosis.findings import Check, Outcome, Patient, Verdict

_NAMED = 3  # in the sentence; all of them are in the details
_LISTED = 20  # stalled tasks in the details
_LATE = 60.0  # seconds that a task waits: a live worker looks several times a second


async def _check_version(patient: Patient) -> Verdict:
    found = await patient.reached.read_released()
    said = f"the released pgflow, {found.version} or later"
    if found.unknown:
        named = ", ".join(f"pgflow.{each}" for each in found.unknown)
        return Verdict(
            Outcome.WARNING,
            f"{said}, with columns that this program does not know: {named}",
            "what they change is not shown: look for a later version with `pip install --upgrade pgflow-prefect`",
            details=found.unknown,
        )
    if not found.requeues:
        advice = "upgrade pgflow to 0.13.2 or later, which puts the tasks of a vanished worker back"
        return Verdict(Outcome.WARNING, f"{said}: the task of a worker that vanishes stays begun for ever", advice)
    return Verdict(Outcome.OK, said)


async def _check_workers(patient: Patient) -> Verdict:
    queues = await patient.reached.list_queues()
    live = {each.workflow_slug: each.live_workers for each in queues if each.live_workers}
    idle = [each for each in queues if not each.live_workers and (each.queued or each.started)]
    if idle:
        return Verdict(
            Outcome.WARNING,
            f"no live worker, and tasks that wait: {'; '.join(map(_describe_idle, idle[:_NAMED]))}{_more(idle)}",
            "start the flow's Edge Function by an HTTP request to it, or `pgflow-prefect worker` if the flow was moved",
            details=tuple(map(_describe_idle, idle)),
        )
    if not live:
        return Verdict(Outcome.OK, "no worker is alive, and no task waits for one")
    named = ", ".join(f"{number} of {slug}" for slug, number in live.items())
    return Verdict(Outcome.OK, f"live workers: {named}")


def _describe_idle(queue: FlowQueue) -> str:
    seen = "it has never had one"
    if queue.last_heartbeat_at is not None:
        seen = f"the last sign of life was at {queue.last_heartbeat_at:%Y-%m-%d %H:%M:%S %Z}"
    return f"{queue.workflow_slug} has {queue.queued} queued and {queue.started} begun, {seen}"


async def _check_stalled(patient: Patient) -> Verdict:
    found = await patient.reached.list_stalled_tasks(_LISTED)
    if not found:
        return Verdict(Outcome.OK, "no task has been under way for longer than it may take")
    said = f"{found[0].tasks} task{'s'[: found[0].tasks != 1]} under way for 30 s longer than they may take"
    named = "; ".join(map(_describe_stalled, found[:_NAMED]))
    more = f" and {found[0].tasks - _NAMED} more" if found[0].tasks > _NAMED else ""
    details = tuple(map(_describe_stalled, found))
    if found[0].is_given_up:
        advice = "their runs hang: `pgflow-prefect reconcile --apply` ends them"
        return Verdict(Outcome.FAULT, f"pgflow has given up tasks. {said}: {named}{more}", advice, details)
    advice = "pgflow 0.13.2 or later puts a task back up to three times, each 15 s, by its job of pg_cron"
    return Verdict(Outcome.WARNING, f"{said}: {named}{more}", advice, details)


def _describe_stalled(task: StalledTask) -> str:
    said = f"step {task.step_slug!r}[{task.task_index}] of run {task.run_id} ({task.workflow_slug})"
    notes = [f"put back {task.requeued} times"] if task.requeued else []
    notes += ["given up"] if task.is_given_up else []
    return f"{said}, {', '.join(notes)}" if notes else said


async def _check_queues(patient: Patient) -> Verdict:
    now = (await patient.reached.read_server()).now
    queues = await patient.reached.list_queues()
    late = [each for each in queues if each.live_workers and _wait(each, now) > _LATE]
    if late:
        said = "; ".join(_describe_late(each, now) for each in late[:_NAMED])
        return Verdict(
            Outcome.WARNING,
            f"tasks wait although a worker is alive: {said}{_more(late)}",
            "it may be their next attempt that is not due yet; otherwise the worker is slow, or has too few slots",
            details=tuple(_describe_late(each, now) for each in late),
        )
    queued = sum(each.queued for each in queues)
    flows = f"{len(queues)} flow{'s'[: len(queues) != 1]}"
    return Verdict(Outcome.OK, f"{queued} task{'s'[: queued != 1]} queued in {flows}")


def _wait(queue: FlowQueue, now: datetime) -> float:
    return 0.0 if queue.oldest is None else (now - queue.oldest).total_seconds()


def _describe_late(queue: FlowQueue, now: datetime) -> str:
    return f"{queue.queued} of {queue.workflow_slug}, the oldest for {_wait(queue, now):.0f} s"


async def _check_messages(patient: Patient) -> Verdict:
    steps = await patient.reached.list_moved_steps()
    lost = await patient.reached.list_lost_messages(_LISTED)
    if steps and not steps[0].has_triggers:
        named = ", ".join(f"{each.step_slug!r} of {each.workflow_slug}" for each in steps[:_NAMED])
        return Verdict(
            Outcome.FAULT,
            f"pgflow's workers also do moved steps ({named}): triggers on pgflow.step_tasks are missing",
            "run `pgflow-prefect init`, which creates them again",
        )
    if lost:
        more = " and more" if len(lost) > _NAMED else ""
        return Verdict(
            Outcome.FAULT,
            f"tasks wait without a message in a queue, so no worker does them: "
            f"{'; '.join(map(_describe_lost, lost[:_NAMED]))}{more}",
            "`pgflow-prefect reconcile --apply` or `pgflow-prefect init --remove` puts the messages back",
            details=tuple(map(_describe_lost, lost)),
        )
    if not steps:
        return Verdict(Outcome.OK, "every task has its message, and no single step was moved")
    moved = ", ".join(f"{each.step_slug!r} of {each.workflow_slug} ({each.waiting} waiting)" for each in steps)
    return Verdict(Outcome.OK, f"every task has its message. Moved steps: {moved}")


def _describe_lost(task: LostMessage) -> str:
    return f"step {task.step_slug!r}[{task.task_index}] of run {task.run_id} ({task.workflow_slug})"


def _more(found: list[FlowQueue]) -> str:
    return f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""


RELEASED_CHECKS = (
    Check("pgflow", _check_version, needs=("schema",), schema=RELEASED),
    Check("workers", _check_workers, needs=("schema",), schema=RELEASED),
    Check("stalled tasks", _check_stalled, needs=("schema",), schema=RELEASED),
    Check("queues", _check_queues, needs=("schema",), schema=RELEASED),
    Check("messages", _check_messages, needs=("schema",), schema=RELEASED),
)
