"""Finds the result of an earlier run that a step takes over, and copies it where it is in a storage."""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from prefect.context import TaskRunContext

from pgflow_prefect.database.step_transaction import Logger
from pgflow_prefect.errors import StorageError, StoredResultError
from pgflow_prefect.handlers.caching import CacheOptions
from pgflow_prefect.handlers.outcomes import Decided
from pgflow_prefect.handlers.references import parse_reference
from pgflow_prefect.handlers.stored import StepResults
from pgflow_prefect.handlers.threads import run_in_thread
from pgflow_prefect.models import CachedOutcome, CachedResult


@dataclass(frozen=True)
class RunCache:
    """Finds what one execution of a step takes over.

    Attributes:
        workflow_slug: the run's workflow.
        step_slug: the step.
        function: its handler, which the user's key function finds in its context.
        results: reads the storage of the earlier run, and writes to this run's.
        look_up: asks the database for the result of a key.
        logger: of the task run.
    """

    workflow_slug: str
    step_slug: str
    function: Callable[..., Any]
    results: StepResults
    look_up: Callable[[str], Awaitable[CachedResult | None]]
    logger: Logger

    async def find_key(self, options: CacheOptions, arguments: Mapping[str, Any]) -> str | None:
        """Return the hash of this execution's key. If the user's function fails, there is no cache, as in Prefect."""
        ask = partial(options.key_fn, _make_context(self.function, arguments), dict(arguments))
        try:
            key = ask() if inspect.iscoroutinefunction(options.key_fn) else await run_in_thread(ask)
            key = await key if inspect.isawaitable(key) else key
        except Exception:  # the user's code
            self.logger.exception(
                "cache_key_fn of step %r failed: the step is executed without a cache", self.step_slug
            )
            return None
        if key is not None and not isinstance(key, str):
            self.logger.warning(
                "cache_key_fn of step %r returned a %s and no text: the step is executed without a cache",
                self.step_slug,
                type(key).__name__,
            )
            return None
        return None if key is None else options.hash_key(self.workflow_slug, self.step_slug, key)

    async def find(self, key: str) -> Decided | None:
        """Return the result that the step takes over; None if there is none."""
        found = await self.look_up(key)
        if found is None:
            return None
        try:
            text = await self._copy(found)
        except (StorageError, StoredResultError) as error:
            self.logger.warning("step %r is executed, because its cached result is gone: %s", self.step_slug, error)
            return None
        return Decided(text, CachedOutcome(cached_from=str(found.run_id)))

    async def _copy(self, found: CachedResult) -> str:
        """Return the result for this run's row. A run refers to objects of its own only."""
        reference, own = parse_reference(found.result), self.results.own
        source = replace(self.results, address=replace(self.results.address, run_id=found.run_id))
        if reference is None or (own is None and not source.is_of(self.step_slug, reference)):
            return found.result.text
        if own is None or own.codec.name != reference.serializer:
            raise StoredResultError("this process names no storage for it, or another serializer")
        return await self.results.save(await source.read(self.step_slug, reference, own))


def _make_context(function: Callable[..., Any], arguments: Mapping[str, Any]) -> TaskRunContext:
    """Return the context of the task run, with the task that a user of Prefect expects there."""
    context = TaskRunContext.get()
    assert context is not None
    task = copy(context.task)
    task.fn = function
    return context.model_copy(update={"task": task, "parameters": dict(arguments)})
