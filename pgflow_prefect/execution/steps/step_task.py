"""Makes a step's Prefect task, and its claim request."""

import inspect
from collections.abc import Awaitable, Callable, Collection
from copy import copy
from functools import partial
from typing import Any
from uuid import UUID

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.states import Failed

from pgflow_prefect.database.step_transaction import Logger
from pgflow_prefect.errors import HandlerRaisedError, NotRetriableError
from pgflow_prefect.execution.reporting.task_runs import StepTask
from pgflow_prefect.handlers.base import RetryPolicy
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.handlers.raised import describe
from pgflow_prefect.handlers.threads import run_in_thread
from pgflow_prefect.models import ClaimRequest, TaskKey
from pgflow_prefect.wording import clean


def make_task(handlers: StepHandlers, perform: Callable[[None], Awaitable[State[None] | None]]) -> StepTask:
    """Return the task of a step; `perform` makes one attempt and returns its state, None for Completed."""
    task = copy(_TASK)
    name = clean(handlers.step_slug)
    task.fn, task.name, task.task_key = perform, name, name
    task.description = handlers.description
    task.task_run_name = lambda: name  # a text would be a template. The step's own name is known after its claim
    task.tags = {*handlers.task_options.tags}
    set_policy(task, handlers.policy)
    return task


def make_item_task(handlers: StepHandlers, index: int) -> StepTask:
    """Return the task of an item of a map, which only shows it: no engine of Prefect's calls its function."""
    task = copy(_TASK)
    name = f"{clean(handlers.step_slug)}[{index}]"
    task.name, task.task_key = name, clean(handlers.step_slug)
    task.description = handlers.description
    task.task_run_name = lambda: name
    set_policy(task, RetryPolicy(handlers.policy.retries))
    return task


def make_request(handlers: StepHandlers, upstream: Collection[str], task_run_id: UUID) -> ClaimRequest:
    """Return the request that claims a step."""
    return ClaimRequest(
        task=TaskKey(handlers.step_slug),
        task_run_id=task_run_id,
        upstream=handlers.choose_upstream(upstream),
        with_payload=handlers.wants_payload,
        bound=handlers.bound.kind,
        has_function=handlers.function is not None,
        handler=str(handlers.bound),
    )


def set_policy(task: StepTask, policy: RetryPolicy) -> None:
    """Give a task the retries of a policy."""
    delay = policy.retry_delay_seconds
    task.retries = policy.retries
    task.retry_delay_seconds = delay if isinstance(delay, list) else [delay] if delay else []
    task.retry_jitter_factor = policy.retry_jitter_factor


async def may_retry(condition: Callable[..., Any], task: StepTask, error: Exception, logger: Logger) -> bool:
    """Ask the user's condition whether to try a step again after an error, in the way of Prefect's engine.

    A sync condition is called in a thread. One that raises is logged, and ends the step.
    """
    context = TaskRunContext.get()
    assert context is not None
    raised = error.__cause__ if isinstance(error, HandlerRaisedError) and error.__cause__ is not None else error
    state: State[Any] = Failed(data=raised, message=f"Task run encountered an exception {describe(error)}")
    ask = partial(condition, task, context.task_run, state)
    try:
        answer = ask() if inspect.iscoroutinefunction(condition) else await run_in_thread(ask)
        return bool(await answer if inspect.isawaitable(answer) else answer)
    except Exception:  # the user's code
        logger.exception("retry_condition_fn of step %r failed: the step is not tried again", task.name)
        return False


async def _may_retry(task: Task[..., object], task_run: TaskRun, state: State[object]) -> bool:
    error = await state.aresult(raise_on_failure=False)
    return not isinstance(error, NotRetriableError)


async def _do_nothing(upstream: None = None) -> None:
    """Be the function of the template task."""


_TASK = StepTask(
    _do_nothing,
    retry_condition_fn=_may_retry,
    log_prints=True,
    cache_policy=NO_CACHE,
    persist_result=False,
)
"""The template of all steps' tasks: a task without it costs as much as one of its events."""
