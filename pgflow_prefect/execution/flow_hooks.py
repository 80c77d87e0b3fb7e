"""The hooks of the user's flow: each ends on its own, blocks no event loop, and may use Prefect's functions."""

import asyncio
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy
from functools import partial, wraps
from typing import Any

from anyio import CancelScope, current_time
from prefect import Flow, get_run_logger
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectHTTPStatusError

from pgflow_prefect.handlers.containment import contain
from pgflow_prefect.handlers.threads import run_in_thread
from pgflow_prefect.prefect_api.redaction import describe_error

Hook = Callable[..., Any]

AnyLogger = logging.Logger | logging.LoggerAdapter[Any]

HOOKS = ("on_running_hooks", "on_completion_hooks", "on_failure_hooks", "on_cancellation_hooks", "on_crashed_hooks")

HOOK_GRACE = 10.0
"""Seconds that a hook gets to end once its process drains."""

_CONTAINED = "__pgflow_contained__"
_RUNNER_OWNS = ("PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS", "false")


_drained: ContextVar[asyncio.Event | None] = ContextVar("pgflow_drained", default=None)


@contextmanager
def leave_hooks_after(drained: asyncio.Event | None) -> Iterator[None]:
    """Let no hook in this block hold up a process that drains for longer than `HOOK_GRACE`.

    Args:
        drained: set when the process drains; None where it never does.
    """
    token = _drained.set(drained)
    try:
        yield
    finally:
        _drained.reset(token)


class Hooks(list[Hook]):
    """The hooks that the user has written for one kind of state; Prefect's engine gets each one contained.

    The list wraps hooks when it is read, because `@flow.on_failure` may append to it at any time.
    """

    def __iter__(self) -> Iterator[Hook]:
        """Yield the hooks that Prefect calls."""
        return map(contain_hook, super().__iter__())


def contain_hook(hook: Hook) -> Hook:
    """Return a hook that Prefect awaits.

    A sync hook runs in a thread, where Prefect's functions return results and not coroutines. An error of a hook
    becomes an ordinary exception: Prefect logs it, and calls the next hook.
    """
    if hasattr(hook, _CONTAINED):
        return hook

    @wraps(hook, updated=())
    async def call(*args: object, **kwargs: object) -> None:
        with _bound() as scope:
            await contain(_call(hook, partial(hook, *args, **kwargs)))
        if scope.cancelled_caught:
            raise TimeoutError(f"it was left: the process ends, and the hook was not done {HOOK_GRACE:g} s later")

    call.__name__ = find_hook_name(hook)
    setattr(call, _CONTAINED, True)
    return call


def find_hook_name(hook: Hook) -> str:
    """Return the name of a hook in logs: of a function, a partial function, or a callable object."""
    named = hook.func if isinstance(hook, partial) else hook
    return str(getattr(named, "__name__", type(named).__name__))


async def call_hooks(
    hooks: Iterable[Hook],
    flow: Flow[..., Any],
    flow_run: FlowRun,
    state: State[Any],
    logger: AnyLogger,
) -> None:
    """Call hooks one after the other, as Prefect's engine does; what one raises keeps no other from being called."""
    for hook in map(contain_hook, hooks):
        name = find_hook_name(hook)
        logger.info("Running hook %r in response to entering state %r", name, state.name)
        try:
            await hook(flow, flow_run, state)
        except Exception:
            logger.exception("An error was encountered while running hook %r", name)
        else:
            logger.info("Hook %r finished running successfully", name)


@contextmanager
def _bound() -> Iterator[CancelScope]:
    """Cancel the block some time after the process has begun to drain."""
    drained = _drained.get()
    with CancelScope() as scope:
        if drained is None:
            yield scope
            return

        def end_soon(waiting: "asyncio.Task[Any]") -> None:
            if not waiting.cancelled():
                scope.deadline = min(scope.deadline, current_time() + HOOK_GRACE)

        waiting = asyncio.ensure_future(drained.wait())
        waiting.add_done_callback(end_soon)
        try:
            yield scope
        finally:
            waiting.cancel()


async def _call(hook: Hook, call: Callable[[], Any]) -> None:
    is_async = inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(getattr(hook, "__call__", None))  # noqa: B004
    result = call() if is_async else await run_in_thread(partial(_call_in_thread, call))
    if inspect.isawaitable(result):
        await result


def _call_in_thread(call: Callable[[], Any]) -> Any:  # noqa: ANN401  what a hook returns
    with _say_it_is_sync():
        return call()


def _say_it_is_sync() -> AbstractContextManager[Any]:
    """Make Prefect's functions return results; they return coroutines if the flow in the context is async."""
    context = FlowRunContext.get()
    if context is None or context.flow is None:
        return nullcontext()
    flow = copy(context.flow)
    flow.isasync = False
    return context.model_copy(update={"flow": flow})


async def run_cancellation_hooks(state: State[Any]) -> None:
    """Run the hooks for a cancelled run, in the process that executed it and writes this state.

    Prefect's engine runs them if a user cancels the flow run in Prefect, but not if the run ends in PostgreSQL.
    """
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow is not None
    assert context.flow_run is not None
    hooks = context.flow.on_cancellation_hooks
    if not hooks or await _is_for_runner(context):
        return
    await call_hooks(hooks, context.flow, context.flow_run, state, get_run_logger())


async def _is_for_runner(context: FlowRunContext) -> bool:
    """Tell whether Prefect's runner, this process's parent, runs the hooks: it does if Prefect cancelled the run."""
    name, value = _RUNNER_OWNS
    if os.environ.get(name, "").lower() != value:
        return False
    assert context.flow_run is not None
    assert isinstance(context.client, PrefectClient)
    try:
        flow_run: FlowRun = await context.client.read_flow_run(context.flow_run.id)
    except PrefectHTTPStatusError as error:
        get_run_logger().warning("hooks for the cancellation are left to Prefect: %s", describe_error(error))
        return True
    return flow_run.state_type in (StateType.CANCELLING, StateType.CANCELLED)
