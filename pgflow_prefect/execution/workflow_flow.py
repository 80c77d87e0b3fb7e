"""The Prefect flow of a workflow."""

from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from copy import copy
from inspect import iscoroutine
from typing import Any, TypeAlias

from prefect import Flow

from pgflow_prefect.execution.flow_hooks import HOOKS, Hooks

AsyncFlow: TypeAlias = Flow[..., Coroutine[Any, Any, Any]]


class WorkflowFlow(Flow[..., Coroutine[Any, Any, Any]]):
    """A flow that prepares its function's work while Prefect creates the flow run.

    For a small flow, Prefect spends most of the time on creating the flow run and on storing its end.

    Attributes:
        before: a context that is entered before Prefect creates the flow run, and left after the flow run's end.
    """

    before: Callable[[], AbstractAsyncContextManager[None]] = nullcontext

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401
        """Make the flow; see `prefect.Flow`."""
        super().__init__(*args, **options)
        self._contain_hooks()

    def with_options(self, **options: Any) -> Flow[..., Coroutine[Any, Any, Any]]:  # noqa: ANN401
        """Return a flow of this class, not one of Prefect's own, whose hooks would block the event loop."""
        made = copy(self)
        vars(made).update(vars(super().with_options(**options)))
        made._contain_hooks()
        return made

    def _contain_hooks(self) -> None:
        for name in HOOKS:
            setattr(self, name, Hooks(getattr(self, name)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  a coroutine, or a drawing of Prefect's
        """Create a flow run and execute it; see `prefect.Flow.__call__`."""
        call = super().__call__(*args, **kwargs)
        return self._call(call) if iscoroutine(call) else call

    async def _call(self, call: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401  what the function returns
        async with self.before():
            return await call
