"""The wait for a step that a work pool does, beside the wait for its report."""

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar
from uuid import UUID

import anyio

from pgflow_prefect.errors import PgflowPrefectError
from pgflow_prefect.execution.process.pool_watch import PoolOrder, PoolWatch

T = TypeVar("T")


@dataclass
class PoolAttendance:
    """Attends an attempt on a work pool while its report is awaited. Without one, it only waits.

    Attributes:
        pools: the attempts of this process.
        order: the attempt; None if no work pool does the step.
        failure: why the attempt is over without a completion.
    """

    pools: PoolWatch
    order: PoolOrder | None
    failure: PgflowPrefectError | None = field(default=None, init=False)
    _flow_run_id: UUID | None = field(default=None, init=False)

    async def wait_beside(self, report: Awaitable[T]) -> T | None:
        """Return the report; None once the attempt has failed."""
        if self.order is None:
            return await report
        end: T | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(self._attend, self.order, group.cancel_scope)
            end = await report
            group.cancel_scope.cancel()
        return end

    async def _attend(self, order: PoolOrder, scope: anyio.CancelScope) -> None:
        try:
            await self.pools.attend(order, self._note)
        except PgflowPrefectError as error:
            self.failure = error
            scope.cancel()

    def _note(self, flow_run_id: UUID) -> None:
        self._flow_run_id = flow_run_id

    async def take_back(self) -> None:
        """Stop the attempt: no run waits for it any more."""
        if self.order is not None:
            await self.pools.take_back(self.order, self._flow_run_id)
