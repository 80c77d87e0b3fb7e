"""The wait for a step that another program does: an external step, or one that was handed over."""

import anyio

from pgflow_prefect.errors import DatabaseUnavailableError, StepTimeoutError
from pgflow_prefect.execution.process.host import Stop
from pgflow_prefect.execution.process.pool_watch import PoolOrder
from pgflow_prefect.execution.steps.pool_attendance import PoolAttendance
from pgflow_prefect.execution.steps.shadow import Shadow
from pgflow_prefect.execution.steps.step_work import StepWork, StoppedError
from pgflow_prefect.handlers.base import RetryPolicy
from pgflow_prefect.handlers.choice import Chosen
from pgflow_prefect.handlers.outcomes import Decided
from pgflow_prefect.handlers.python import PythonHandler
from pgflow_prefect.handlers.work_pool import WorkPoolHandler
from pgflow_prefect.models import AwaitedStep, Claim, Outcome, PoolAttempt, StepEnd


async def await_end(step: StepWork, claim: Claim, chosen: Chosen) -> StepEnd:
    """Wait until another program has ended the step, and let other steps and runs work meanwhile.

    Args:
        step: the step.
        claim: the answer to its claim.
        chosen: who does it, and for how long.

    Raises:
        StepTimeoutError: it takes too long.
        StoppedError: the run is stopped here.
    """
    awaited = AwaitedStep(
        run_id=step.run.run_id,
        task=step.task,
        epoch=step.run.epoch,
        task_run_id=step.task_run_id,
        bound=step.handlers.bound.kind,
        has_function=step.handlers.function is not None,
    )
    end: StepEnd | None = None
    attended = PoolAttendance(step.host.pools, _order_from_pool(step, claim, chosen))
    async with step.run.turns.pause(step.slug):
        with anyio.move_on_after(_find_time_left(claim, chosen.policy)), step.run.wait():
            end = await attended.wait_beside(step.host.watch.wait(awaited))
        if end is None and (step.run.stopped is Stop.ENDED or attended.failure is not None):
            end = await step.writer.look(awaited)  # perhaps by the report that this step waits for
        if end is None and isinstance(attended.failure, DatabaseUnavailableError):
            raise attended.failure
        if end is None and step.run.drained:
            if step.run.stopped is Stop.ENDED:
                await attended.take_back()
            raise StoppedError(step.run.run_id, step.run.stopped or Stop.SHUTDOWN)
        if end is None or end.outcome in (Outcome.ENDED, Outcome.FAILED):
            await attended.take_back()
    if end is None and attended.failure is not None:
        raise attended.failure
    if end is None:
        raise StepTimeoutError(
            f"step {step.slug!r}: no program has reported it within {chosen.policy.timeout_seconds:g} s"
        )
    return end


def _order_from_pool(step: StepWork, claim: Claim, chosen: Chosen) -> PoolOrder | None:
    """Return what a work pool is to do; None if the step is done in another way."""
    if not isinstance(chosen.handler, WorkPoolHandler):
        return None
    attempt = PoolAttempt(step.writer.run_id, step.task, claim.attempt)
    shown = step.task_run_id if step.host.is_shown(step.run.run_id) else None
    return PoolOrder(attempt, step.workflow_slug, chosen.handler.pool, shown, chosen.handler.source)


async def run_shadow(step: StepWork, claim: Claim, handler: PythonHandler) -> Shadow:
    """Run the handler in Python beside an external worker; its writes are rolled back."""
    shadow = Shadow(step.writer.store, step.writer.run_id, step.task, step.task_run_logger)
    with shadow.timed():
        payload, results = await step.writer.read_input(step.task, handler.choose_upstream(step.upstream))
        claim = claim.model_copy(update={"payload": payload, "upstream_results": results})
        async with step.make_transaction() as transaction:
            execution = step.make_execution(claim, transaction, shadow=True)
            worked = await step.work(handler, claim, execution)
            shadow.result = worked.result if isinstance(worked, Decided) else worked
    return shadow


def _find_time_left(claim: Claim, policy: RetryPolicy) -> float | None:
    """Return how many seconds to wait for another program; None for no limit."""
    if policy.timeout_seconds is None or (claim.waits and claim.waited is None):
        return None
    return max(0.0, policy.timeout_seconds - (claim.waited or 0))
