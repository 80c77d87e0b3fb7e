"""The handlers of the storm's workflows, for `pgflow-prefect worker tests.faults.handlers`."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from pgflow_prefect import AsyncItemContext, AsyncStepContext, Branch, ItemContext, Skip, StepContext, Workflow
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
    MapPlan,
    StepPlan,
    compute_item_result,
    compute_result,
    have_rules,
    read_workflows,
)

# An error in the handler's own statement is the handler's: none of these is to meet the role's time-out.
_UNHURRIED, _HURRIED = "SET LOCAL statement_timeout = 0", "SET LOCAL statement_timeout TO DEFAULT"
_WRITE = "INSERT INTO faults.written (run_id, step_slug, item_index, attempt) VALUES (%s, %s, %s, %s)"

_ITEM_PART = 3  # of a step's time, for each item
_AT_ONCE = 4  # items that a process executes at a time: fewer than a map has

_AnyContext = StepContext | AsyncStepContext | ItemContext | AsyncItemContext


def _get_place(context: _AnyContext) -> tuple[UUID, str, int | None, int]:
    """Return the run, the step, the item's place if it is one of a map, and the attempt."""
    index = context.item_index if isinstance(context, ItemContext | AsyncItemContext) else None
    return context.run_id, context.step_slug, index, context.attempt


def _note(context: _AnyContext, event: str) -> None:
    """Note what an execution does, past everything that is tested: a line appended is there whatever is killed next.

    In a file, and not in a table: an execution while PostgreSQL is down counts, too.
    """
    run_id, step_slug, index, attempt = _get_place(context)
    line = f"{run_id} {step_slug} {index} {attempt} {time.time()!r} {event}\n"
    file = os.open(os.environ[EXECUTIONS], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)


class _PlannedError(RuntimeError):
    """The attempt fails: the first one, or each."""


@contextmanager
def _noted(context: _AnyContext) -> Iterator[None]:
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
        upstream: dict[str, Any], payload: dict[str, Any], context: StepContext | AsyncStepContext
    ) -> str | Branch[str]:
        if plan.ending == FAIL or plan.raises(context.attempt, None):
            raise _PlannedError
        if plan.ending in (SKIP, CASCADE):
            raise Skip("as planned", cascade=plan.ending == CASCADE)
        result = compute_result(payload["number"], context.step_slug, upstream if depends_on_results else {})
        return Branch([*plan.taken], result=result) if plan.ending == BRANCH else result

    def work(upstream: dict[str, Any], payload: dict[str, Any], context: StepContext) -> str | Branch[str]:
        with _noted(context):
            if plan.writes:
                context.connection.execute(_UNHURRIED)
                context.connection.execute(_WRITE, _get_place(context))
            time.sleep(plan.seconds)
            if plan.writes:
                context.connection.execute(_HURRIED)
            return conclude(upstream, payload, context)

    async def work_async(
        upstream: dict[str, Any], payload: dict[str, Any], context: AsyncStepContext
    ) -> str | Branch[str]:
        with _noted(context):
            if plan.writes:
                await context.connection.execute(_UNHURRIED)
                await context.connection.execute(_WRITE, _get_place(context))
            await asyncio.sleep(plan.seconds)
            if plan.writes:
                await context.connection.execute(_HURRIED)
            return conclude(upstream, payload, context)

    return work_async if plan.is_async else work


def _make_item_handler(plan: StepPlan, said: MapPlan) -> Callable[..., Any]:
    def conclude(item: object, payload: dict[str, Any], context: ItemContext | AsyncItemContext) -> str:
        ending = said.get_ending(context.item_index)
        if ending == FAIL or plan.raises(context.attempt, context.item_index):
            raise _PlannedError
        if ending == SKIP:
            raise Skip("as planned")
        return compute_item_result(payload["number"], context.step_slug, context.item_index, item)

    def work(item: object, payload: dict[str, Any], context: ItemContext) -> str:
        with _noted(context):
            if plan.writes:
                context.connection.execute(_UNHURRIED)
                context.connection.execute(_WRITE, _get_place(context))
            time.sleep(plan.seconds / _ITEM_PART)
            if plan.writes:
                context.connection.execute(_HURRIED)
            return conclude(item, payload, context)

    async def work_async(item: object, payload: dict[str, Any], context: AsyncItemContext) -> str:
        with _noted(context):
            if plan.writes:
                await context.connection.execute(_UNHURRIED)
                await context.connection.execute(_WRITE, _get_place(context))
            await asyncio.sleep(plan.seconds / _ITEM_PART)
            if plan.writes:
                await context.connection.execute(_HURRIED)
            return conclude(item, payload, context)

    return work_async if plan.is_async else work


def _make_workflow(slug: str, steps: dict[str, StepPlan]) -> Workflow:
    workflow = Workflow(slug)
    depends_on_results = not have_rules(steps)
    for step_slug, plan in steps.items():
        # Only what raises by itself is tried again by Prefect; the faults are the product's to survive.
        retries = 2 if plan.is_flaky else 0
        if plan.map is None:
            handler = _make_handler(plan, depends_on_results=depends_on_results)
            workflow.step(step_slug, retries=retries, retry_delay_seconds=0.05)(handler)
            continue
        # What a file says of a map has to be what the database has.
        rules: dict[str, Any] = {
            "when_item_fails": plan.map.when_item_fails,
            "when_empty": plan.map.when_empty,
            "max_items": plan.map.max_items,
            "rule": plan.rule,
            "only_if": plan.pattern,
            "when_exhausted": plan.when_exhausted,
            "fails_run": plan.fails_run,
        }
        over = ".".join([plan.map.source, *plan.map.path])
        mapped = workflow.map(
            step_slug, over=over, at_once=_AT_ONCE, retries=retries, retry_delay_seconds=0.05, **rules
        )
        mapped(_make_item_handler(plan, plan.map))
    return workflow


globals().update(
    {slug: _make_workflow(slug, dict(steps)) for slug, steps in read_workflows(Path(os.environ[WORKFLOWS])).items()}
)
