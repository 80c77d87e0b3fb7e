"""Executes the handler of a map for items: one by one, or in batches where its binding says so."""

import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pgflow_prefect.bindings import HttpEndpoint, SqlFunction
from pgflow_prefect.errors import NotRetriableError, ResultInvalidError
from pgflow_prefect.handlers.base import Deferred, Handler, StepExecution
from pgflow_prefect.handlers.http_endpoint import HttpHandler
from pgflow_prefect.handlers.outcomes import Decided
from pgflow_prefect.handlers.python import PythonHandler
from pgflow_prefect.handlers.sql_function import SqlHandler
from pgflow_prefect.handlers.stored import StepResults
from pgflow_prefect.handlers.work_pool import WorkPoolHandler
from pgflow_prefect.models import Claim, ClaimedItem
from pgflow_prefect.raw_json import RawJson, UnreadableJsonError, split_array, write_object

_NONE = RawJson("{}")

AnyEnd: TypeAlias = str | Decided | Deferred


@dataclass(frozen=True)
class ItemWork:
    """Does the work of items of one map.

    Attributes:
        batch: how many items one call takes; None: one, and its result is no array.
        perform: makes a call.
        is_async: it is an async function's.
    """

    batch: int | None
    perform: Callable[[Sequence[ClaimedItem], StepExecution], Awaitable[AnyEnd]]
    is_async: bool = False


async def make_item_work(
    handler: Handler, claim: Claim, upstream: Collection[str], stored: StepResults | None
) -> ItemWork:
    """Return what does the work of a map's items, with what they have in common.

    Args:
        handler: of the map.
        claim: with the payload and the results that all items get.
        upstream: the slugs of the steps that the map waits for.
        stored: reads the results that are in a storage.

    Raises:
        ArgumentInvalidError: what they have in common does not fit the handler's annotations.
        NotRetriableError: the map is bound to a work pool.
    """
    if isinstance(handler, WorkPoolHandler):
        raise NotRetriableError(
            f"step {handler.step_slug!r} is a map, and its items can't be done on a work pool: bind it otherwise"
        )
    if isinstance(handler, PythonHandler):
        shared = await handler.bind_shared(claim, upstream, stored)
        return ItemWork(None, _call_function(handler, shared), handler.is_async)
    batch = _find_batch(handler)
    return ItemWork(batch, _call_handler(handler, claim, upstream, batch))


def _find_batch(handler: Handler) -> int | None:
    if isinstance(handler, SqlHandler | HttpHandler):
        binding: SqlFunction | HttpEndpoint = handler.binding
        return binding.batch
    return None


def _call_function(
    handler: PythonHandler, shared: Mapping[str, Any]
) -> Callable[[Sequence[ClaimedItem], StepExecution], Awaitable[AnyEnd]]:
    async def perform(items: Sequence[ClaimedItem], execution: StepExecution) -> AnyEnd:
        [only] = items
        return await handler.execute_item(shared, only.item, execution)

    return perform


def _call_handler(
    handler: Handler, claim: Claim, upstream: Collection[str], batch: int | None
) -> Callable[[Sequence[ClaimedItem], StepExecution], Awaitable[AnyEnd]]:
    key = "item" if batch is None else "items"
    results = (claim.upstream_results or _NONE).split()
    others = {f"{slug}_" if slug == key else slug: result for slug, result in results.items()}

    async def perform(items: Sequence[ClaimedItem], execution: StepExecution) -> AnyEnd:
        given = items[0].item if batch is None else RawJson(f"[{','.join(each.item.text for each in items)}]")
        its_own = claim.model_copy(update={"upstream_results": write_object({**others, key: given})})
        return await handler.execute(its_own, upstream, execution)

    return perform


def split_results(step_slug: str, result: str, count: int) -> list[str]:
    """Return the results of a batch, as JSON text of each.

    Raises:
        ResultInvalidError: it is no array of so many.
    """
    try:
        results = split_array(RawJson(result))
    except UnreadableJsonError as error:
        raise ResultInvalidError(f"step {step_slug!r}: the result of a batch can't be read: {error}") from None
    if results is None or len(results) != count:
        found = f"{len(results)} results" if results is not None else f"{json.dumps(result[:20])} …"
        raise ResultInvalidError(
            f"step {step_slug!r}: a batch of {count} items has to return an array of {count} results, and it returned "
            f"{found}"
        )
    return [each.text for each in results]
