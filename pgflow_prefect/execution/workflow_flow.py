"""The Prefect flow of a workflow."""

from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from copy import copy
from functools import partial
from inspect import iscoroutine
from typing import Any, TypeAlias

from prefect import Flow

from pgflow_prefect.execution.flow_hooks import HOOKS, Hooks
from pgflow_prefect.execution.flow_names import name_without_values, needs_values
from pgflow_prefect.handlers.run_names import Naming

AsyncFlow: TypeAlias = Flow[..., Coroutine[Any, Any, Any]]


class WorkflowFlow(Flow[..., Coroutine[Any, Any, Any]]):
    """A flow that prepares its function's work while Prefect creates the flow run.

    For a small flow, Prefect spends most of the time on creating the flow run and on storing its end.

    Attributes:
        before: a context that is entered before Prefect creates the flow run, and left after the flow run's end.
        naming: the `flow_run_name` that the user gave it. Prefect's `flow_run_name` is only set if it needs no value:
            Prefect does not have the payload of most flow runs, and would show its secrets.
    """

    naming: Naming | None = None

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
        made.take_naming(options.get("flow_run_name") or self.naming)
        return made

    def take_naming(self, naming: Naming | None) -> None:
        """Name the flow runs of this flow in this way."""
        self.naming = naming
        self.flow_run_name = None
        if naming is not None and not needs_values(naming):
            self.flow_run_name = partial(name_without_values, naming)

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
