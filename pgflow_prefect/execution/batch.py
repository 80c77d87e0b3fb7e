"""Sends the claims and reports of all runs of a process: those that come at the same time share a statement."""

import logging
from asyncio import CancelledError, Future, Task, TimerHandle, get_running_loop, wait
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple
from uuid import UUID

from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import (
    PgflowPrefectError,
    ResultInvalidError,
    RunNotPendingError,
    SupersededError,
    TransientError,
)
from pgflow_prefect.models import Claim, ClaimRequest, Completion, Failure, Report, TaskElement
from pgflow_prefect.waiting import give, refuse

MOST, MOST_BYTES = 100, 1024 * 1024
"""The limits of a statement: elements, and bytes of all their results. A larger result has a statement of its own."""

LOCK_TIMEOUT = 0.25
"""Seconds that a statement waits for a lock. Then the locked run gets a statement of its own, which waits longer."""

SHORT_LOCK_TIMEOUT = 0.02
"""The same in seconds, if other runs wait for the answer or for locks."""

LATE = 0.25
"""Seconds after which other runs no longer wait for the answer to a statement."""

_SLOW = 1.0  # seconds; after a slower statement, each of its runs gets a statement of its own
_MOST_AT_ONCE = 3  # statements of several runs, and as many of one run, if the pool has the connections
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between two looks at a locked run
_MOST_LOOKS = 25  # at a locked run: they take about as long as a statement may; then its steps get the error

_OF_ONE = (ResultInvalidError, RunNotPendingError, SupersededError)
"""Errors that are expected: the database refuses one element of several."""

_logger = logging.getLogger(__name__)


class _Element(NamedTuple):
    """A request that waits for its answer."""

    run: "RunBatch"
    asked: Completion | Failure | ClaimRequest
    answer: "Future[Any]"

    @property
    def size(self) -> int:
        return len(self.asked.result) if isinstance(self.asked, Completion) else 0


@dataclass(eq=False)
class RunBatch:
    """The requests of the steps of one run.

    Only one statement at a time has elements of a run, because each transition locks the run's row.

    Attributes:
        batch: the requests of all runs.
        run_id: the run.
        epoch: in which it was taken.
        looks: how often in a row the run was locked, or held up a statement. Such a run gets its own statement.
        sizes: bytes of the reported results, by step slug.
    """

    batch: "Batch"
    run_id: UUID
    epoch: int
    looks: int = field(default=0, init=False)
    reports: deque[_Element] = field(default_factory=deque, init=False)
    claims: deque[_Element] = field(default_factory=deque, init=False)
    sending: Task[None] | None = field(default=None, init=False)  # the statement that has elements of it
    pause: TimerHandle | None = field(default=None, init=False)  # until the next look at a locked run
    sizes: dict[str, int] = field(default_factory=dict, init=False)
    is_closed: bool = field(default=False, init=False)

    async def complete(self, completion: Completion) -> Report:
        """Store a step's result; see `Store.complete_step`."""
        self.sizes[completion.task.step_slug] = len(completion.result)
        return await self._ask(completion, self.reports)  # type: ignore[no-any-return]

    async def fail(self, failure: Failure) -> Report:
        """Fail a step and its run; see `Store.fail_step`."""
        return await self._ask(failure, self.reports)  # type: ignore[no-any-return]

    async def claim(self, request: ClaimRequest) -> Claim:
        """Claim a step; see `Store.claim_step`."""
        return await self.claim_later(request)

    def claim_later(self, request: ClaimRequest) -> "Future[Claim]":
        """Claim a step with the next statement, after the reports in that statement."""
        return self._ask(request, self.claims)

    def _ask(self, asked: Completion | Failure | ClaimRequest, waiting: deque[_Element]) -> "Future[Any]":
        answer: Future[Any] = get_running_loop().create_future()
        waiting.append(_Element(self, asked, answer))
        self.batch.note(self)
        return answer

    @property
    def waits(self) -> bool:
        """Whether a statement could take elements of it now."""
        return self.sending is None and self.pause is None and bool(self.reports or self.claims)

    @property
    def goes_alone(self) -> bool:
        """Whether it needs a statement of its own, so that no other run waits for it."""
        return self.looks > 0 or (bool(self.reports) and self.reports[0].size > MOST_BYTES)

    def take(self, room: int, size: int) -> tuple[list[_Element], int]:
        """Take the next elements, and return the bytes that are left.

        A claim may need a report that makes its step ready. So a claim never goes before a report.

        Args:
            room: the most elements.
            size: the most bytes. The first element may be larger.
        """
        taken: list[_Element] = []
        while self.reports and len(taken) < room:
            if self.reports[0].size > size and (taken or size < MOST_BYTES):
                return taken, 0
            size -= self.reports[0].size
            taken.append(self.reports.popleft())
        while self.claims and not self.reports and len(taken) < room:
            taken.append(self.claims.popleft())
        return taken, max(0, size)

    def give_back(self, elements: Sequence[_Element]) -> None:
        """Put elements back in front of those that wait."""
        if self.is_closed:
            for element in elements:
                element.answer.cancel()
            return
        for element in reversed(elements):
            (self.claims if isinstance(element.asked, ClaimRequest) else self.reports).appendleft(element)

    def drop(self) -> list[_Element]:
        """Take all elements that wait."""
        dropped = [*self.reports, *self.claims]
        self.reports.clear()
        self.claims.clear()
        return dropped


class Batch:
    """The requests of all runs of a process. Requests that come during a statement go with the next one.

    No run keeps another run waiting. If another transaction has locked a run, the run gets a statement of its own. If a
    statement fails, its halves are sent again until the element with the error is found. Runs with many requests share
    a statement fairly with runs that have few.
    """

    def __init__(self, store: Store) -> None:
        """Begin without requests, in the running event loop.

        Args:
            store: the database.
        """
        self._store = store
        self._waiting: dict[RunBatch, None] = {}  # in their order
        self._context = copy_context()  # a statement of several runs must not have the context of one step
        self._is_due = False
        self._together: set[Task[None]] = set()
        self._late: set[Task[None]] = set()  # of those
        self._alone: set[Task[None]] = set()
        self._patient = 0
        self._at_once = max(1, min(_MOST_AT_ONCE, store.connections // 2))

    @asynccontextmanager
    async def open(self, run_id: UUID, epoch: int) -> AsyncIterator[RunBatch]:
        """Take the requests of a run's steps until the block ends.

        Args:
            run_id: the run.
            epoch: in which it was taken.
        """
        run = RunBatch(self, run_id, epoch)
        try:
            yield run
        finally:
            run.is_closed = True
            await self._leave(run)

    def note(self, run: RunBatch) -> None:
        """Note a run with a request, and send it together with the other requests of this moment."""
        self._waiting.setdefault(run)
        self._send_soon()

    async def _leave(self, run: RunBatch) -> None:
        """Drop the requests without an answer: no step waits for them."""
        for element in run.drop():
            element.answer.cancel()
        self._waiting.pop(run, None)
        if run.pause is not None:
            run.pause.cancel()
        if run.sending is not None:
            if run.sending in self._alone:
                run.sending.cancel()
            # After the run is released, none of its claims may reach the database.
            await wait([run.sending], timeout=_SLOW)

    # Choosing the next elements

    def _send_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            get_running_loop().call_soon(self._send, context=self._context)

    def _send(self) -> None:
        self._is_due = False
        for run in [each for each in self._waiting if each.waits and each.goes_alone]:
            if len(self._alone) >= self._at_once:
                break
            self._send_run(run)
        is_free = len(self._together) < self._at_once and not self._together - self._late
        if is_free and (elements := self._take()):
            self._send_elements(elements)

    def _take(self) -> list[_Element]:
        """Take elements of the waiting runs, the same number of each run if it has so many."""
        elements: dict[RunBatch, list[_Element]] = {}
        room, size = MOST, MOST_BYTES
        runs = [run for run in self._waiting if run.waits and not run.goes_alone]
        while runs and room and size:
            share = max(1, room // len(runs))
            for run in runs[:room]:
                taken, size = run.take(min(share, room), size)
                elements.setdefault(run, []).extend(taken)
                room -= len(taken)
                if not room or not size:
                    break
            runs = [run for run in runs if run.waits]
        for run in elements:  # the next statement begins with the runs that had no turn
            self._waiting.pop(run)
            if run.waits:
                self._waiting[run] = None
        # All processes lock runs in the order of their ids, so that two processes never wait for each other.
        ordered = sorted(elements, key=lambda run: run.run_id)
        return [element for run in ordered for element in elements[run]]

    # Sending

    def _send_elements(self, elements: list[_Element]) -> None:
        task = self._begin(self._send_together(elements), elements, self._together)

        def keep_waiting_no_more() -> None:
            if not task.done():
                self._late.add(task)
                self._send_soon()

        timer = get_running_loop().call_later(LATE, keep_waiting_no_more, context=self._context)
        task.add_done_callback(lambda _: timer.cancel())

    def _send_run(self, run: RunBatch) -> None:
        self._waiting.pop(run)  # it goes to the end of the queue
        elements, _ = run.take(MOST, MOST_BYTES)
        if run.waits:
            self._waiting[run] = None
        self._begin(self._send_alone(run, elements), elements, self._alone)

    def _begin(
        self, sending: Coroutine[Any, Any, None], elements: list[_Element], under_way: set[Task[None]]
    ) -> Task[None]:
        task = get_running_loop().create_task(self._answer_all(sending, elements), context=self._context)
        under_way.add(task)
        for element in elements:
            element.run.sending = task

        def end(_: object) -> None:
            under_way.discard(task)
            self._late.discard(task)
            for run in {element.run for element in elements}:
                run.sending = None
                if (run.reports or run.claims) and not run.is_closed:
                    self._waiting.setdefault(run)
            if not task.cancelled():
                task.exception()  # the waiting steps get it
            self._send_soon()

        task.add_done_callback(end)
        return task

    async def _answer_all(self, sending: Coroutine[Any, Any, None], elements: list[_Element]) -> None:
        try:
            await sending
        except BaseException as error:
            # Prefect raises a signal as an exception anywhere in the event loop. All waiting steps must get it.
            waiting = [*elements]
            if not isinstance(error, CancelledError):
                waiting += [element for run in self._waiting for element in run.drop()]
            for element in waiting:
                refuse(element.answer, error)
            raise

    async def _send_together(self, elements: list[_Element]) -> None:
        """Send elements of any runs in one statement, or in halves if that statement fails."""
        runs = {element.run for element in elements}
        begun = monotonic()
        try:
            answers = await self._perform(elements, LOCK_TIMEOUT)
        except TransientError as error:
            if error.is_of_rows and (len(runs) > 1 or monotonic() - begun < _SLOW):
                _logger.info("%d runs: their requests are sent again run by run: %s", len(runs), error)
                self._suspect(runs, elements)
            else:
                for element in elements:
                    refuse(element.answer, error)
        except Exception as error:  # noqa: BLE001  the halves show which element caused it
            await self._send_halves(elements, error)
        else:
            self._answer(elements, answers)
            if len(runs) > 1 and monotonic() - begun > _SLOW:
                self._suspect(runs, [])

    async def _send_halves(self, elements: list[_Element], error: Exception) -> None:
        if len(elements) == 1:
            if isinstance(error, ResultInvalidError):
                await self._send_one(elements[0])  # the single function names the value, or stores a message without it
            else:
                refuse(elements[0].answer, error)  # without a second call: a user's trigger may have raised it
            return
        level = logging.DEBUG if isinstance(error, _OF_ONE) else logging.WARNING
        _logger.log(level, "run %s: its statement is sent again in halves: %s", elements[0].run.run_id, error)
        middle = len(elements) // 2
        for half in (elements[:middle], elements[middle:]):
            # A run keeps its order: its later elements wait for those that are sent again.
            again = {element.run for element in half if element.run.looks}
            for run in again:
                run.give_back([element for element in half if element.run is run])
            rest = [element for element in half if element.run not in again]
            if rest:
                await self._send_together(rest)

    async def _send_one(self, element: _Element) -> None:
        run_id, epoch, asked = element.run.run_id, element.run.epoch, element.asked
        try:
            if isinstance(asked, Completion):
                give(element.answer, await self._store.complete_step(run_id, epoch, asked))
            elif isinstance(asked, Failure):
                given = asked.as_parameters() | {"epoch": epoch}
                task, message = asked.task, given.pop("error_message")
                del given["step_slug"], given["task_index"]
                give(element.answer, await self._store.fail_step(run_id, task, str(message), **given))  # type: ignore[arg-type]
            else:
                give(element.answer, await self._store.claim_step(run_id, epoch, asked))
        except Exception as error:  # noqa: BLE001  it is raised where the answer is awaited
            refuse(element.answer, error)

    async def _send_alone(self, run: RunBatch, elements: list[_Element]) -> None:
        """Send elements of one run in a statement, and try again later if the run stays locked."""
        first, begun = run.looks <= 1, monotonic()
        patient = not first and self._patient < self._at_once - 1
        self._patient += patient
        try:
            answers = await self._perform(elements, None if patient else LOCK_TIMEOUT if first else SHORT_LOCK_TIMEOUT)
        except TransientError as error:
            is_worth_it = not patient and run.looks < _MOST_LOOKS and monotonic() - begun < _SLOW
            if error.is_of_rows and is_worth_it:
                self._suspect({run}, elements)
                if not first:
                    self._pause(run)
            else:
                for element in elements:
                    refuse(element.answer, error)
        except Exception as error:  # noqa: BLE001  as above
            run.looks = 0
            await self._send_halves(elements, error)
        else:
            run.looks = int(monotonic() - begun > _SLOW)  # a user's trigger may be slow, and would hold up other runs
            self._answer(elements, answers)
        finally:
            self._patient -= patient

    async def _perform(
        self, elements: list[_Element], lock_timeout: float | None
    ) -> list[Report | Claim | PgflowPrefectError | None]:
        asked = [TaskElement(each.run.run_id, each.run.epoch, each.asked) for each in elements]
        return await self._store.perform_tasks(asked, lock_timeout=lock_timeout)

    # Answers

    def _answer(self, elements: list[_Element], answers: Sequence[Report | Claim | PgflowPrefectError | None]) -> None:
        locked: list[_Element] = []
        for element, answer in zip(elements, answers, strict=True):
            if answer is None:
                locked.append(element)
            elif isinstance(answer, PgflowPrefectError):
                refuse(element.answer, answer)
            else:
                give(element.answer, answer)
        self._suspect({element.run for element in locked}, locked)

    def _suspect(self, runs: set[RunBatch], elements: list[_Element]) -> None:
        """Send these elements again, and give each of these runs a statement of its own."""
        for run in runs:
            run.looks += 1
            run.give_back([element for element in elements if element.run is run])

    def _pause(self, run: RunBatch) -> None:
        def look_again() -> None:
            run.pause = None
            self._send_soon()

        pause = min(_SHORTEST_PAUSE * 2**run.looks, _LONGEST_PAUSE)
        run.pause = get_running_loop().call_later(pause, look_again, context=self._context)
