"""The handlers of the storm's workflows, for `pgflow-prefect worker tests.faults.handlers`."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgflow_prefect import StepContext, Workflow
from tests.faults.workflows import EXECUTIONS, WORKFLOWS, StepPlan, compute_result, read_workflows

_WRITE = "INSERT INTO faults.written (run_id, step_slug, attempt) VALUES (%s, %s, %s)"


def _note(context: StepContext) -> None:
    """Note an execution, past everything that is tested: a line appended is there whoever is killed next.

    In a file, and not in a table: an execution while PostgreSQL is down counts, too.
    """
    line = f"{context.run_id} {context.step_slug} {context.attempt} {time.time()!r}\n"
    file = os.open(os.environ[EXECUTIONS], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)


def _make_handler(plan: StepPlan) -> Callable[..., Any]:
    def conclude(upstream: dict[str, str], payload: dict[str, int], context: StepContext) -> str:
        if plan.is_flaky and context.attempt == 1:
            raise RuntimeError("the first attempt fails")
        return compute_result(payload["number"], context.step_slug, upstream)

    def work(upstream: dict[str, str], payload: dict[str, int], context: StepContext) -> str:
        _note(context)
        if plan.writes:
            context.connection.execute(_WRITE, [context.run_id, context.step_slug, context.attempt])
        time.sleep(plan.seconds)
        return conclude(upstream, payload, context)

    async def work_async(upstream: dict[str, str], payload: dict[str, int], context: StepContext) -> str:
        _note(context)
        if plan.writes:
            await context.connection.execute(_WRITE, [context.run_id, context.step_slug, context.attempt])
        await asyncio.sleep(plan.seconds)
        return conclude(upstream, payload, context)

    return work_async if plan.is_async else work


def _make_workflow(slug: str, steps: dict[str, StepPlan]) -> Workflow:
    workflow = Workflow(slug)
    for step_slug, plan in steps.items():
        # Only what raises by itself is tried again by Prefect; the faults are the product's to survive.
        workflow.step(step_slug, retries=2 if plan.is_flaky else 0, retry_delay_seconds=0.05)(_make_handler(plan))
    return workflow


globals().update(
    {slug: _make_workflow(slug, dict(steps)) for slug, steps in read_workflows(Path(os.environ[WORKFLOWS])).items()}
)
