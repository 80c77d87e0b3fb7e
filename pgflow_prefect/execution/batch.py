"""Claims and completions of a run that come at the same time, in one statement and one transaction."""

import logging
from asyncio import CancelledError, Future, Task, create_task, get_running_loop, wait
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import (
    PgflowPrefectError,
    ResultInvalidError,
    RunNotPendingError,
    SupersededError,
    TransientError,
)
from pgflow_prefect.models import Claim, ClaimRequest, Completion, Report

MOST, MOST_BYTES = 100, 1024 * 1024
"""Of a batch: steps, and what their results may have together; a larger one travels alone."""


_OF_ONE = (ResultInvalidError, RunNotPendingError, SupersededError)
"""What is to be expected: one of several is refused."""

_logger = logging.getLogger(__name__)


class Batch:
    """What is on its way to the database while the former statement is being answered goes with the next one.

    A run's transitions lock its row, one after the other: several connections would make none of them faster. A
    statement that fails is no whole: then each goes alone, so that only the one that is to blame hears of it.
    """

    def __init__(self, store: Store, run_id: UUID, epoch: int) -> None:
        """Begin with nothing.

        Args:
            store: the database.
            run_id: the run.
            epoch: in which it was taken.
        """
        self._store = store
        self._run_id = run_id
        self._epoch = epoch
        self._completions: deque[tuple[Completion, Future[Report]]] = deque()
        self._claims: deque[tuple[ClaimRequest, Future[Claim]]] = deque()
        self._sending: Task[None] | None = None

    async def complete(self, completion: Completion) -> Report:
        """Store a step's result; see `Store.complete_step`."""
        answer: Future[Report] = get_running_loop().create_future()
        self._completions.append((completion, answer))
        self._send_soon()
        return await answer

    async def claim(self, request: ClaimRequest) -> Claim:
        """Claim a step; see `Store.claim_step`."""
        return await self.claim_later(request)

    def claim_later(self, request: ClaimRequest) -> "Future[Claim]":
        """Claim a step with the next statement, after whatever is completed with it."""
        answer: Future[Claim] = get_running_loop().create_future()
        self._claims.append((request, answer))
        self._send_soon()
        return answer

    def _send_soon(self) -> None:
        if self._sending is None or self._sending.done():
            self._sending = create_task(self._send())

    async def close(self) -> None:
        """Leave what is not answered yet: no step waits for it."""
        if self._sending is not None:
            self._sending.cancel()
            await wait([self._sending])
            if not self._sending.cancelled():
                self._sending.exception()  # raised to those who waited

    async def _send(self) -> None:
        completions: list[tuple[Completion, Future[Report]]] = []
        claims: list[tuple[ClaimRequest, Future[Claim]]] = []
        try:
            while self._completions or self._claims:
                completions = self._take_completions()
                # A claim may be of a step that one of the completions makes ready: it comes with that one or later.
                room = 0 if self._completions else MOST - len(completions)
                claims = [self._claims.popleft() for _ in range(min(room, len(self._claims)))]
                if len(completions) + len(claims) == 1:
                    await self._send_each(completions, claims)
                else:
                    await self._send_all(completions, claims)
        except BaseException as error:
            # A signal, which Prefect raises wherever the event loop is at that moment: those who wait are to hear it.
            for _, reported in (*completions, *self._completions):
                _break_off(reported, error)
            for _, asked in (*claims, *self._claims):
                _break_off(asked, error)
            self._completions.clear()
            self._claims.clear()
            raise

    def _take_completions(self) -> list[tuple[Completion, "Future[Report]"]]:
        taken: list[tuple[Completion, Future[Report]]] = []
        size = 0
        while self._completions and len(taken) < MOST:
            size += len(self._completions[0][0].result)
            if taken and size > MOST_BYTES:
                break
            taken.append(self._completions.popleft())
        return taken

    async def _send_all(
        self, completions: list[tuple[Completion, "Future[Report]"]], claims: list[tuple[ClaimRequest, "Future[Claim]"]]
    ) -> None:
        try:
            reports, claimed = await self._store.complete_and_claim(
                self._run_id, self._epoch, [each for each, _ in completions], [each for each, _ in claims]
            )
        except TransientError as error:
            for _, reported in completions:
                _refuse(reported, error)
            for _, asked in claims:
                _refuse(asked, error)
        except Exception as error:  # noqa: BLE001  of whichever it is, it alone is to hear
            level = logging.DEBUG if isinstance(error, _OF_ONE) else logging.WARNING
            _logger.log(level, "run %s: what comes together is sent one by one: %s", self._run_id, error)
            await self._send_each(completions, claims)
        else:
            for (_, reported), report in zip(completions, reports, strict=True):
                _answer(reported, report)
            for (_, asked), claim in zip(claims, claimed, strict=True):
                if isinstance(claim, PgflowPrefectError):
                    _refuse(asked, claim)
                else:
                    _answer(asked, claim)

    async def _send_each(
        self, completions: list[tuple[Completion, "Future[Report]"]], claims: list[tuple[ClaimRequest, "Future[Claim]"]]
    ) -> None:
        for completion, reported in completions:
            try:
                _answer(reported, await self._store.complete_step(self._run_id, self._epoch, completion))
            except Exception as error:  # noqa: BLE001  it is raised where the answer is awaited
                _refuse(reported, error)
        for request, asked in claims:
            try:
                _answer(asked, await self._store.claim_step(self._run_id, self._epoch, request))
            except Exception as error:  # noqa: BLE001  likewise
                _refuse(asked, error)


@asynccontextmanager
async def open_batch(store: Store, run_id: UUID, epoch: int) -> AsyncIterator[Batch]:
    """Take claims and completions of a run for as long as the block takes."""
    batch = Batch(store, run_id, epoch)
    try:
        yield batch
    finally:
        await batch.close()


def _answer(waiting: "Future[Any]", answer: object) -> None:
    if not waiting.done():  # the caller may have been cancelled
        waiting.set_result(answer)


def _break_off(waiting: "Future[Any]", error: BaseException) -> None:
    if isinstance(error, CancelledError):
        waiting.cancel()
    elif not waiting.done():
        waiting.set_exception(error)
        waiting.exception()


def _refuse(waiting: "Future[Any]", error: Exception) -> None:
    if not waiting.done():
        waiting.set_exception(error)
        waiting.exception()  # a step that was claimed ahead may never ask
