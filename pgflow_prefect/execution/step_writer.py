"""Writes what happens to the steps of a run to PostgreSQL, before Prefect hears of it."""

import logging
from asyncio import Future
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar
from uuid import UUID

from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import (
    NO_REFUSALS,
    PgflowPrefectError,
    TransientError,
    WriteRefusedError,
)
from pgflow_prefect.execution.batch import RunBatch
from pgflow_prefect.models import (
    AnyOutcome,
    AwaitedStep,
    CachedResult,
    Claim,
    ClaimRequest,
    Completion,
    Failure,
    ItemReport,
    MapState,
    Report,
    Status,
    StepEnd,
    StepFailure,
    StepState,
    TaskKey,
)
from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.waiting import Backoff

T = TypeVar("T")

MESSAGE_LIMIT = 10_000
"""Characters of an error message that are kept: enough to understand it, few enough for a row."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepWriter:
    """The only writer for a run: its statements carry the epoch in which its flow run took the run.

    It tries a statement again after an error of the moment. That is safe: a claim that is counted twice only skips a
    number, and a repeated report returns the report that was stored first.

    Attributes:
        store: the database.
        run_id: the run.
        epoch: of the ownership, from `take_run`.
        patience: seconds for which a statement is tried again.
        batch: combines claims and completions that come at the same time.
    """

    store: Store
    run_id: UUID
    epoch: int
    patience: float
    batch: RunBatch | None = None

    @property
    def fence(self) -> int | None:
        """The epoch that a completion carries; None where the attempt alone is the fence."""
        return self.epoch

    @property
    def decides_about_retries(self) -> bool:
        """Whether the database decides if a failed attempt is tried again, and when."""
        return self.store.implementation.retries_in_sql

    async def claim(self, request: ClaimRequest) -> Claim:
        """Count an attempt and return the step's input; see `Store.claim_step`."""
        batch = self.batch
        if batch is not None:
            return await self._note(lambda: batch.claim(request))
        return await self._note(lambda: self.store.claim_step(self.run_id, self.epoch, request))

    def claim_later(self, request: ClaimRequest) -> "Future[Claim] | None":
        """Claim a step with the next statement, which is not tried again; None if statements are not combined."""
        return self.batch.claim_later(request) if self.batch is not None else None

    async def complete(
        self, task: TaskKey, result: str, *, task_run_id: UUID, attempt: int, outcome: AnyOutcome | None = None
    ) -> Report:
        """Store a step's result, or another outcome; see `Store.complete_step`."""
        completion = Completion(task, result, attempt, task_run_id, outcome)
        batch = self.batch
        if batch is not None:
            return await self._note(lambda: batch.complete(completion))
        return await self._note(lambda: self.store.complete_step(self.run_id, self.fence, completion))

    async def find_cached(self, task: TaskKey, cache_key: str) -> CachedResult | None:
        """Return the result of an earlier run; see `Store.find_cached`."""
        return await self._persist(lambda: self.store.find_cached(self.run_id, task, cache_key))

    async def fail(
        self, task: TaskKey, message: str, *, state_name: str, task_run_id: UUID, attempt: int | None
    ) -> Report:
        """Fail a step and its run, in this attempt or in any; see `Store.fail_step`."""
        batch = self.batch
        if batch is not None and not self.decides_about_retries:  # a batch does not tell when the next attempt is due
            failure = Failure(task, clean_message(message), state_name, attempt, task_run_id)
            return await self._note(lambda: batch.fail(failure))
        return await self._note(
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

    async def foresee_retry(self, workflow_slug: str, step_slug: str, attempt: int) -> float | None:
        """Return in how many seconds the database tries a task again whose attempt fails; None if it does not."""
        known = await self._persist(lambda: self.store.list_task_options(workflow_slug))
        options = {each.step_slug: each for each in known}
        own, general = options[step_slug], options[None]
        most = own.max_attempts if own.max_attempts is not None else general.max_attempts
        delay = own.base_delay if own.base_delay is not None else general.base_delay
        return None if attempt >= (most or 1) else float((delay or 0) * 2**attempt)

    async def work_items(
        self, step_slug: str, reports: Sequence[ItemReport], *, wanted: int, held: Collection[int]
    ) -> MapState:
        """Report on items of a map, and claim others; see `Store.work_items`.

        Args:
            step_slug: the map.
            reports: on items.
            wanted: how many to claim at most.
            held: the items that this process has, with those of the reports.
        """
        tries = count()
        return await self._note(
            lambda: self.store.work_items(
                self.run_id,
                step_slug,
                self.epoch,
                reports,
                wanted=wanted,
                held=held if next(tries) else None,  # the answer of the former try may be lost
            )
        )

    async def list_returned_items(self, step_slug: str, item_indexes: Sequence[int]) -> list[int]:
        """Return which of these items their programs have given back; see `Store.list_returned_items`."""
        return await self._persist(lambda: self.store.list_returned_items(self.run_id, step_slug, item_indexes))

    async def note(self, task: TaskKey, state_name: str, message: str, *, task_run_id: UUID) -> None:
        """Note the state of a step that has not ended: AwaitingRetry for its delay, Deferred for a report."""
        await self._note(
            lambda: self.store.note_state(
                self.run_id,
                task,
                task_run_id=task_run_id,
                state_name=state_name,
                message=clean_message(message),
            )
        )

    async def look(self, awaited: AwaitedStep) -> StepEnd | None:
        """Return why the wait for a step is over, or None while it goes on; see `Store.watch_steps`."""
        return next(iter(await self._persist(lambda: self.store.watch_steps([awaited]))), None)

    async def read_input(self, task: TaskKey, upstream: list[str] | None) -> tuple[RawJson, RawJson]:
        """Return the input that a claim would return, without a claim; see `Store.read_input`."""
        return await self._persist(lambda: self.store.read_input(self.run_id, task, upstream))

    async def is_current(self) -> bool:
        """Tell whether this writer's epoch is still the run's."""
        return (await self._persist(lambda: self.store.read_run(self.run_id))).epoch == self.epoch

    async def list_step_ends(self, step_slugs: Collection[str]) -> list[StepState]:
        """Return the states of those of these steps that have one; see `Store.list_step_ends`."""
        return await self._persist(lambda: self.store.list_step_ends(self.run_id, step_slugs))

    async def list_failed_steps(self) -> list[StepFailure]:
        """Return the run's steps that have failed by themselves, in the order of their ends."""
        return await self._persist(lambda: self.store.list_failed_steps(self.run_id))

    async def is_completed(self, step_slug: str) -> bool:
        """Tell whether a step has a result."""
        ends = await self.list_step_ends([step_slug])
        return any(each.status is Status.COMPLETED for each in ends)

    async def _note(self, statement: Callable[[], Awaitable[T]]) -> T:
        """Run a statement that notes what happens to a step.

        Raises:
            WriteRefusedError: PostgreSQL refuses it for good, and not because of what it was given.
        """
        try:
            return await self._persist(statement)
        except NO_REFUSALS:
            raise
        except PgflowPrefectError as error:
            raise WriteRefusedError(str(error)) from error

    async def _persist(self, statement: Callable[[], Awaitable[T]]) -> T:
        return await persist(self.store, self.patience, statement, f"run {self.run_id}")


async def persist(store: Store, patience: float, statement: Callable[[], Awaitable[T]], of: str) -> T:
    """Run a statement, again for `patience` seconds while PostgreSQL can't answer, and return its result.

    Args:
        store: the database.
        patience: in seconds.
        statement: safe to repeat.
        of: the purpose, for the log.

    Raises:
        TransientError: PostgreSQL did not answer in all that time.
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
    """Return an error message that PostgreSQL's text can hold: no NUL, no lone surrogates, and a bounded length."""
    printable = message.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode("utf-8")
    return printable if len(printable) <= MESSAGE_LIMIT else f"{printable[:MESSAGE_LIMIT]} …"
