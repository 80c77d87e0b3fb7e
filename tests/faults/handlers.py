"""The handlers of the storm's workflows, for `pgflow-prefect worker tests.faults.handlers`."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pgflow_prefect import AsyncStepContext, Branch, Skip, StepContext, Workflow
from tests.faults.workflows import (
    BEGAN,
    BRANCH,
    CASCADE,
    EXECUTIONS,
    FAIL,
    FAILED,
    RETURNED,
    SKIP,
    STOPPED,
    WORKFLOWS,
    StepPlan,
    compute_result,
    have_rules,
    read_workflows,
)

# An error in the handler's own statement is the handler's: none of these is to meet the role's time-out.
_UNHURRIED, _HURRIED = "SET LOCAL statement_timeout = 0", "SET LOCAL statement_timeout TO DEFAULT"
_WRITE = "INSERT INTO faults.written (run_id, step_slug, attempt) VALUES (%s, %s, %s)"


def _note(context: StepContext | AsyncStepContext, event: str) -> None:
    """Note what an execution does, past everything that is tested: a line appended is there whatever is killed next.

    In a file, and not in a table: an execution while PostgreSQL is down counts, too.
    """
    line = f"{context.run_id} {context.step_slug} {context.attempt} {time.time()!r} {event}\n"
    file = os.open(os.environ[EXECUTIONS], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)


class _PlannedError(RuntimeError):
    """The attempt fails: the first one, or each."""


@contextmanager
def _noted(context: StepContext | AsyncStepContext) -> Iterator[None]:
    """Note an execution's begin, and its end if it comes to one."""
    _note(context, BEGAN)
    end = STOPPED
    try:
        yield
        end = RETURNED
    except Skip:
        end = RETURNED
        raise
    except _PlannedError:
        end = FAILED
        raise
    finally:
        _note(context, end)


def _make_handler(plan: StepPlan, *, depends_on_results: bool) -> Callable[..., Any]:
    def conclude(
        upstream: dict[str, str], payload: dict[str, int], context: StepContext | AsyncStepContext
    ) -> str | Branch[str]:
        if plan.ending == FAIL or (plan.is_flaky and context.attempt == 1):
            raise _PlannedError
        if plan.ending in (SKIP, CASCADE):
            raise Skip("as planned", cascade=plan.ending == CASCADE)
        result = compute_result(payload["number"], context.step_slug, upstream if depends_on_results else {})
        return Branch([*plan.taken], result=result) if plan.ending == BRANCH else result

    def work(upstream: dict[str, str], payload: dict[str, int], context: StepContext) -> str | Branch[str]:
        with _noted(context):
            if plan.writes:
                context.connection.execute(_UNHURRIED)
                context.connection.execute(_WRITE, [context.run_id, context.step_slug, context.attempt])
            time.sleep(plan.seconds)
            if plan.writes:
                context.connection.execute(_HURRIED)
            return conclude(upstream, payload, context)

    async def work_async(
        upstream: dict[str, str], payload: dict[str, int], context: AsyncStepContext
    ) -> str | Branch[str]:
        with _noted(context):
            if plan.writes:
                await context.connection.execute(_UNHURRIED)
                await context.connection.execute(_WRITE, [context.run_id, context.step_slug, context.attempt])
            await asyncio.sleep(plan.seconds)
            if plan.writes:
                await context.connection.execute(_HURRIED)
            return conclude(upstream, payload, context)

    return work_async if plan.is_async else work


def _make_workflow(slug: str, steps: dict[str, StepPlan]) -> Workflow:
    workflow = Workflow(slug)
    for step_slug, plan in steps.items():
        # Only what raises by itself is tried again by Prefect; the faults are the product's to survive.
        handler = _make_handler(plan, depends_on_results=not have_rules(steps))
        workflow.step(step_slug, retries=2 if plan.is_flaky else 0, retry_delay_seconds=0.05)(handler)
    return workflow


globals().update(
    {slug: _make_workflow(slug, dict(steps)) for slug, steps in read_workflows(Path(os.environ[WORKFLOWS])).items()}
)
