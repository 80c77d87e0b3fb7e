"""Prefect's concurrency limits of tags: which there are, and the slots that task runs hold.

Prefect's own engine asks for a slot of each tag of each task run. A request costs more than the whole rest of a small
step. So this asks once which tags are limited, and then only task runs with such a tag ask for slots.
"""

import logging
from collections.abc import AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from time import monotonic
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

import anyio
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.concurrency.asyncio import concurrency
from prefect.exceptions import ObjectNotFound

from pgflow_prefect.prefect_api.redaction import describe_error

PATIENCE = 5.0
"""Seconds for which a run waits to hear which tags are limited."""

FRESH = 1.0
"""Seconds for which an answer is used again, by the other runs of a worker."""

_LEASE = 60.0  # seconds for which Prefect keeps a slot of a process that is gone; Prefect's own engine has the same

_AT_ONCE = 10  # requests, for the tags of one run

_logger = logging.getLogger(__name__)

_answers: "WeakKeyDictionary[PrefectClient, dict[str, tuple[bool, float]]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class TagLimits:
    """The limits that count for the task runs of a flow run.

    Attributes:
        of_all: the limits of the flow run's tags.
        limited: the tags of steps that are limited.
    """

    of_all: tuple[str, ...] = ()
    limited: frozenset[str] = field(default=frozenset())

    def __bool__(self) -> bool:
        return bool(self.of_all or self.limited)

    def find(self, tags: Collection[str]) -> list[str]:
        """Return the limits of a task run: those of its flow run, and those of its own tags."""
        return sorted({*self.of_all, *(_name_limit(tag) for tag in tags if tag in self.limited)})


def hold_slots(
    limits: list[str], task_run_id: UUID, waiting: AbstractAsyncContextManager[None]
) -> AbstractAsyncContextManager[None]:
    """Hold a slot of each limit until the block ends; go on without slots if Prefect does not answer.

    A lease holds the slots. Prefect's client renews it while the block is executed. If the process dies, the slots are
    free again a minute later.

    Args:
        limits: from `TagLimits.find`.
        task_run_id: the task run that holds the slots.
        waiting: entered while the step waits for the slots.
    """
    return _hold_slots(limits, task_run_id, waiting) if limits else nullcontext()


@asynccontextmanager
async def _hold_slots(
    limits: list[str], task_run_id: UUID, waiting: AbstractAsyncContextManager[None]
) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        async with waiting:
            await _take_slots(stack, limits, task_run_id)
        yield


async def _take_slots(stack: AsyncExitStack, limits: list[str], task_run_id: UUID) -> None:
    holder = ConcurrencyLeaseHolder(type="task_run", id=task_run_id)
    slots = concurrency(limits, lease_duration=_LEASE, strict=False, holder=holder)
    try:
        await slots.__aenter__()
    except Exception as error:  # noqa: BLE001  whatever it is, the run goes on
        _logger.warning("a task goes on without a slot of %s: %s", limits, describe_error(error))
        return

    async def give_back(*raised: Any) -> bool | None:  # noqa: ANN401  as of any context manager
        try:
            return await slots.__aexit__(*raised)
        except Exception as error:
            if error is raised[1]:
                raise
            _logger.warning("a slot of %s is free once its lease ends: %s", limits, describe_error(error))
            return None

    stack.push_async_exit(give_back)


async def find_tag_limits(client: PrefectClient, of_flow_run: Collection[str], of_steps: Collection[str]) -> TagLimits:
    """Return the limits for the task runs of a flow run.

    Args:
        client: of Prefect's API.
        of_flow_run: the flow run's tags, which all its task runs have.
        of_steps: the tags of its steps.
    """
    limited = await _find_limited(client, {*of_flow_run, *of_steps})
    of_all = tuple(sorted(_name_limit(tag) for tag in of_flow_run if tag in limited))
    return TagLimits(of_all, frozenset(limited & {*of_steps}))


async def _find_limited(client: PrefectClient, tags: Collection[str]) -> set[str]:
    """Return those of these tags whose number of running task runs Prefect limits."""
    known = _answers.setdefault(client, {})
    now = monotonic()
    for tag in [tag for tag, (_, until) in known.items() if until < now]:
        del known[tag]
    limiter = anyio.CapacityLimiter(_AT_ONCE)

    async def look(tag: str) -> None:
        try:
            async with limiter:
                is_limited = await _is_limited(client, tag)
        except Exception as error:  # noqa: BLE001  the run does not wait for Prefect
            _logger.warning("whether tasks are limited by %s is not known: %s", tag, describe_error(error))
        else:
            known[tag] = (is_limited, monotonic() + FRESH)

    with anyio.move_on_after(PATIENCE) as scope:
        async with anyio.create_task_group() as group:
            for tag in {*tags} - {*known}:
                group.start_soon(look, tag)
    if scope.cancelled_caught:
        unknown = ", ".join(sorted({*tags} - {*known}))
        _logger.warning("whether tasks are limited by %s is not known: Prefect does not answer", unknown)
    return {tag for tag in tags if known.get(tag, (False, 0.0))[0]}


async def _is_limited(client: PrefectClient, tag: str) -> bool:
    try:
        await client.read_global_concurrency_limit_by_name(_name_limit(tag))
    except ObjectNotFound:
        return False
    return True


def _name_limit(tag: str) -> str:
    """Return the name of the limit that `prefect concurrency-limit create TAG` makes."""
    return f"tag:{tag}"
