"""What happens to the steps of a run, written to PostgreSQL before Prefect hears of it."""

import logging
from asyncio import Future
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import TransientError
from pgflow_prefect.execution.batch import RunBatch
from pgflow_prefect.models import (
    AwaitedStep,
    Claim,
    ClaimRequest,
    Completion,
    Failure,
    Report,
    Status,
    StepEnd,
    TaskKey,
)
from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.waiting import Backoff

T = TypeVar("T")

MESSAGE_LIMIT = 10_000
"""Characters of an error message that are kept: enough to understand it, and a row stays a row."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepWriter:
    """The one writer for a run: everything it writes carries the epoch in which its flow run took the run.

    A statement that fails for a reason of the moment is tried again. That is safe: a claim that was counted twice only
    skips a number, and a report that had arrived is found and returned as it was stored.

    Attributes:
        store: the database.
        run_id: the run.
        epoch: what taking the run returned.
        patience: seconds for which a statement is tried again.
        batch: what claims and completions travel with, where there are several at the same time.
    """

    store: Store
    run_id: UUID
    epoch: int
    patience: float
    batch: RunBatch | None = None

    async def claim(self, request: ClaimRequest) -> Claim:
        """Count an attempt and return the step's input; see `Store.claim_step`."""
        batch = self.batch
        if batch is not None:
            return await self._persist(lambda: batch.claim(request))
        return await self._persist(lambda: self.store.claim_step(self.run_id, self.epoch, request))

    def claim_later(self, request: ClaimRequest) -> "Future[Claim] | None":
        """Claim a step with the next statement, which is not tried again; None where statements are sent one by one."""
        return self.batch.claim_later(request) if self.batch is not None else None

    async def complete(self, task: TaskKey, result: str, *, task_run_id: UUID, attempt: int) -> Report:
        """Store a step's result; see `Store.complete_step`."""
        completion = Completion(task, result, attempt, task_run_id)
        batch = self.batch
        if batch is not None:
            return await self._persist(lambda: batch.complete(completion))
        return await self._persist(lambda: self.store.complete_step(self.run_id, self.epoch, completion))

    async def fail(
        self, task: TaskKey, message: str, *, state_name: str, task_run_id: UUID, attempt: int | None
    ) -> Report:
        """Fail a step and its run, in this attempt or in any; see `Store.fail_step`."""
        batch = self.batch
        if batch is not None:
            failure = Failure(task, clean_message(message), state_name, attempt, task_run_id)
            return await self._persist(lambda: batch.fail(failure))
        return await self._persist(
            lambda: self.store.fail_step(
                self.run_id,
                task,
                clean_message(message),
                state_name=state_name,
                epoch=self.epoch,
                attempt=attempt,
                task_run_id=task_run_id,
            )
        )

    async def note(self, task: TaskKey, state_name: str, message: str, *, task_run_id: UUID) -> None:
        """Note the state of a step that has not ended: AwaitingRetry for its delay, Deferred for a report."""
        await self._persist(
            lambda: self.store.note_state(
                self.run_id,
                task,
                task_run_id=task_run_id,
                state_name=state_name,
                message=clean_message(message),
            )
        )

    async def look(self, awaited: AwaitedStep) -> StepEnd | None:
        """Return why a step need not be waited for any more; None where it still does; see `Store.watch_steps`."""
        return next(iter(await self._persist(lambda: self.store.watch_steps([awaited]))), None)

    async def read_input(self, task: TaskKey, upstream: list[str] | None) -> tuple[RawJson, RawJson]:
        """Return what a claim would give, without claiming; see `Store.read_input`."""
        return await self._persist(lambda: self.store.read_input(self.run_id, task, upstream))

    async def is_current(self) -> bool:
        """Tell whether this writer's epoch is still the run's."""
        return (await self._persist(lambda: self.store.read_run(self.run_id))).epoch == self.epoch

    async def is_completed(self, step_slug: str) -> bool:
        """Tell whether a step has a result."""
        ends = await self._persist(lambda: self.store.list_step_ends(self.run_id, [step_slug]))
        return any(each.status is Status.COMPLETED for each in ends)

    async def _persist(self, statement: Callable[[], Awaitable[T]]) -> T:
        return await persist(self.store, self.patience, statement, f"run {self.run_id}")


async def persist(store: Store, patience: float, statement: Callable[[], Awaitable[T]], of: str) -> T:
    """Return what a statement returns, trying it again for `patience` seconds while PostgreSQL can't answer.

    Args:
        store: the database.
        patience: in seconds.
        statement: safe to repeat.
        of: what it is for, to be named in the log.

    Raises:
        TransientError: it could not in all that time.
    """
    backoff = Backoff(patience, of)
    while True:
        try:
            return await statement()
        except TransientError as error:
            if not await backoff.pause(error):
                raise
        await store.drop_broken_connections()


def clean_message(message: str) -> str:
    """Return an error message as PostgreSQL's text can hold it: no NUL, no lone surrogates, not endless."""
    printable = message.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode("utf-8")
    return printable if len(printable) <= MESSAGE_LIMIT else f"{printable[:MESSAGE_LIMIT]} …"
