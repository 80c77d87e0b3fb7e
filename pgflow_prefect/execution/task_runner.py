"""Submits steps to one of Prefect's task runners: threads, processes, or a Dask cluster."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator
from concurrent.futures import BrokenExecutor, CancelledError
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast
from uuid import UUID

from anyio import move_on_after, to_thread
from prefect import Flow
from prefect.client.schemas.objects import RunInput, State, TaskRunResult
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner

from pgflow_prefect.errors import PgflowPrefectError
from pgflow_prefect.execution.flow_options import EventLoopTaskRunner
from pgflow_prefect.execution.remote import RemoteStep
from pgflow_prefect.execution.reporting.task_runs import EDGES

AnyTaskRunner: TypeAlias = TaskRunner[Any]

_GRACE = 10.0  # seconds for which an ended run waits for work that its threads and processes still do


class StepNotSentError(PgflowPrefectError):
    """A task runner could not execute a step because of the step itself."""


class TaskRunnerGoneError(PgflowPrefectError):
    """A task runner could not execute a step because its process or cluster is not there at this moment."""


@asynccontextmanager
async def open_task_runner() -> AsyncIterator[AnyTaskRunner | None]:
    """Start a task runner like the flow run's, until the block ends; None if the event loop executes the steps.

    Prefect stops the flow run's own task runner in the event loop, and waits there for its threads and processes. The
    rest of this process would wait, too. Those threads may even wait for this event loop.
    """
    context = FlowRunContext.get()
    if context is None or isinstance(context.task_runner, EventLoopTaskRunner):
        yield None
        return
    task_runner: AnyTaskRunner = context.task_runner.duplicate()
    await to_thread.run_sync(task_runner.__enter__)
    try:
        yield task_runner
    finally:
        with move_on_after(_GRACE):
            await to_thread.run_sync(task_runner.__exit__, None, None, None, abandon_on_cancel=True)


@dataclass(frozen=True)
class Submission:
    """A step that a task runner has.

    Attributes:
        step_slug: the step.
        future: Prefect's.
    """

    step_slug: str
    future: PrefectFuture[Any]

    @property
    def task_run_id(self) -> UUID:
        """The id of Prefect's task run, which the task runner chooses."""
        return self.future.task_run_id

    async def wait(self) -> State[Any]:
        """Return the task's final state.

        Raises:
            StepNotSentError: the step can't be executed there.
            TaskRunnerGoneError: the process that executed it has died, or the cluster has.
        """
        await _await_future(self.future)
        with _translate_errors(f"step {self.step_slug!r} can't be executed by the task runner"):
            await to_thread.run_sync(partial(self.future.result, raise_on_failure=False), abandon_on_cancel=True)
        return self.future.state


async def submit(task_runner: AnyTaskRunner, step: RemoteStep, edges: Collection[UUID]) -> Submission:
    """Give a step to a task runner.

    Args:
        task_runner: from `open_task_runner`.
        step: the step.
        edges: the task runs from which an edge leads to it.

    Raises:
        StepNotSentError: it can't be pickled, or the task runner does not take it.
        TaskRunnerGoneError: the task runner's processes or its cluster are not there.
    """
    slug = step.handlers.step_slug
    context = FlowRunContext.get()
    assert context is not None
    dependencies: set[RunInput] = {TaskRunResult(id=each) for each in edges}

    def send() -> PrefectFuture[Any]:
        with _leave_flow_behind(context):
            task = step.make_task()
            task.log_prints = context.log_prints
            future = task_runner.submit(task, parameters={EDGES: None}, dependencies={EDGES: dependencies})
            return cast("PrefectFuture[Any]", future)

    with _translate_errors(f"step {slug!r} can't be given to {type(task_runner).__name__}"):
        # It may have to start a cluster first, or connect to one.
        return Submission(slug, await to_thread.run_sync(send))


@contextmanager
def _translate_errors(what: str) -> Iterator[None]:
    """Tell errors of the moment from errors of the step."""
    try:
        yield
    except Exception as error:
        reason = f"{what}: {type(error).__name__}: {error}"
        if _is_of_the_moment(error):
            raise TaskRunnerGoneError(reason) from error
        raise StepNotSentError(
            f"{reason}; a handler that other processes execute has to be picklable, and what its file imports has to "
            "be installed there"
        ) from error


def _leave_flow_behind(context: FlowRunContext) -> AbstractContextManager[Any]:
    """Send the flow without its function, which refers to objects that only this process can use."""
    assert context.flow is not None
    bare = Flow(_do_nothing, name=context.flow.name, persist_result=False, log_prints=context.log_prints)
    return context.model_copy(update={"flow": bare})


def _do_nothing() -> None:
    """Replace a flow's function where only the flow's name is needed."""


async def _await_future(future: PrefectFuture[Any]) -> None:
    """Return when a future is done, without a thread that waits for it."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def wake(_: PrefectFuture[Any]) -> None:
        with suppress(RuntimeError):  # the event loop has ended, and no caller waits
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(wake)
    await done.wait()


def _is_of_the_moment(error: Exception) -> bool:
    """Tell whether a process or a cluster is gone; the step's own errors are states, not exceptions."""
    is_dask = type(error).__module__.startswith("distributed.")
    return is_dask or isinstance(error, BrokenExecutor | CancelledError | OSError | TimeoutError)
