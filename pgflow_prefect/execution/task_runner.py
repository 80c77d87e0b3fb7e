"""Steps that one of Prefect's task runners executes: in threads, in processes, on a Dask cluster."""

import asyncio
from collections.abc import Collection
from concurrent.futures import BrokenExecutor, CancelledError
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast
from uuid import UUID

from anyio import to_thread
from prefect import Flow
from prefect.client.schemas.objects import RunInput, State, TaskRunResult
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.states import Crashed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from pgflow_prefect.errors import PgflowPrefectError
from pgflow_prefect.execution.prefect_engine import EDGES
from pgflow_prefect.execution.remote import RemoteStep

AnyTaskRunner: TypeAlias = TaskRunner[Any]


class EventLoopTaskRunner(ThreadPoolTaskRunner[Any]):
    """Stands for executing steps in the flow run's own event loop, which is what costs least: no task is submitted."""


class StepNotSentError(PgflowPrefectError):
    """A task runner could not execute a step, for a reason that lies in the step."""


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
        """Prefect's task run; which id it has, the task runner says."""
        return self.future.task_run_id

    async def wait(self) -> State[Any]:
        """Return the task's final state, or Crashed where the process that executed it has died.

        Raises:
            StepNotSentError: the step can't be executed there.
        """
        await _await_future(self.future)
        try:
            await to_thread.run_sync(partial(self.future.result, raise_on_failure=False), abandon_on_cancel=True)
        except Exception as error:
            if _is_of_the_moment(error):
                return Crashed(message=f"its process has died: {type(error).__name__}: {error}")
            raise StepNotSentError(
                f"step {self.step_slug!r} can't be executed by the task runner: {type(error).__name__}: {error}"
            ) from error
        return self.future.state


async def submit(step: RemoteStep, edges: Collection[UUID]) -> Submission:
    """Give a step to the task runner of the current flow run.

    Args:
        step: the step.
        edges: the task runs from which an edge leads to it.

    Raises:
        StepNotSentError: it can't be pickled, or the task runner does not take it.
    """
    slug = step.handlers.step_slug
    context = FlowRunContext.get()
    assert context is not None
    dependencies: set[RunInput] = {TaskRunResult(id=each) for each in edges}

    def send() -> PrefectFuture[Any]:
        with _leave_flow_behind(context):
            task = step.make_task()
            future = context.task_runner.submit(task, parameters={EDGES: None}, dependencies={EDGES: dependencies})
            return cast("PrefectFuture[Any]", future)

    try:
        # It may have to start a cluster first, or to connect to one.
        return Submission(slug, await to_thread.run_sync(send))
    except Exception as error:
        raise StepNotSentError(
            f"step {slug!r} can't be given to {type(context.task_runner).__name__}: {type(error).__name__}: {error}; a "
            "handler that other processes execute has to be picklable, with everything that it refers to"
        ) from error


def _leave_flow_behind(context: FlowRunContext) -> AbstractContextManager[Any]:
    """Have nothing of the flow's function sent along: it is reachable from there what this process alone can use."""
    assert context.flow is not None
    bare = Flow(_do_nothing, name=context.flow.name, persist_result=False, log_prints=True)
    return context.model_copy(update={"flow": bare})


def _do_nothing() -> None:
    """Stand for a flow's function where only the flow's name is needed."""


async def _await_future(future: PrefectFuture[Any]) -> None:
    """Return when a future is done, without a thread that waits for it."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def wake(_: PrefectFuture[Any]) -> None:
        with suppress(RuntimeError):  # the event loop has ended, and nobody waits any more
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(wake)
    await done.wait()


def _is_of_the_moment(error: Exception) -> bool:
    """Tell whether another attempt elsewhere may succeed: the process has died, not the step's work failed."""
    return isinstance(error, BrokenExecutor | CancelledError) or type(error).__module__.startswith("distributed.")
