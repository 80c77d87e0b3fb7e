"""Sends questions to the database that come at the same time in one statement."""

from asyncio import Future, Task, gather, get_running_loop, sleep
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import copy_context
from typing import Generic, TypeVar

from pgflow_prefect.errors import PgflowPrefectError, TransientError
from pgflow_prefect.execution.batch import LOCK_TIMEOUT, SHORT_LOCK_TIMEOUT

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between two looks at what is locked

Q = TypeVar("Q")
A = TypeVar("A")

MOST = 100
"""Questions in one statement, at most."""

LATE = 0.25
"""Seconds for which later questions wait for the answer to a statement."""


class Gathering(Generic[Q, A]):
    """Asks one kind of question for all runs of a process.

    Questions that come during a statement go with the next one. If a statement fails, each of its questions is sent
    again alone. So only the question that caused the error gets it, and only questions that meet a lock wait for it.
    """

    def __init__(
        self, ask_all: Callable[[Sequence[Q], float | None], Awaitable[Sequence[A]]], most_patient: int
    ) -> None:
        """Begin with no questions, in the event loop that runs.

        Args:
            ask_all: asks the database, and returns an answer for each question, in their order. The second argument
                says how many seconds to wait for a lock; None for what the database says.
            most_patient: questions that wait for a lock at the same time: each of them has a connection.
        """
        self._ask_all = ask_all
        self._most_patient = most_patient
        self._patient = 0
        self._waiting: deque[tuple[Q, Future[A]]] = deque()
        self._context = copy_context()  # not the context of the run that asks first
        self._is_due = False
        self._under_way: set[Task[None]] = set()
        self._keeping: Task[None] | None = None  # the statement that later questions wait for

    async def ask(self, question: Q) -> A:
        """Return the answer to a question.

        Raises:
            PgflowPrefectError: the error that the question alone would raise.
        """
        answer: Future[A] = get_running_loop().create_future()
        self._waiting.append((question, answer))
        self._send_soon()
        return await answer

    def _send_soon(self) -> None:
        if not self._is_due and self._keeping is None:
            self._is_due = True
            get_running_loop().call_soon(self._send, context=self._context)

    def _send(self) -> None:
        self._is_due = False
        asked: list[tuple[Q, Future[A]]] = []
        while self._waiting and len(asked) < MOST:
            question, answer = self._waiting.popleft()
            if not answer.done():  # the run that asked was cancelled
                asked.append((question, answer))
        if not asked:
            return
        loop = get_running_loop()
        task = self._keeping = loop.create_task(self._answer(asked), context=self._context)
        self._under_way.add(task)

        def go_on() -> None:
            timer.cancel()
            if self._keeping is task:
                self._keeping = None
                if self._waiting:
                    self._send_soon()

        def end(_: object) -> None:
            self._under_way.discard(task)
            if not task.cancelled():
                task.exception()  # raised in the tasks that asked
            go_on()

        timer = loop.call_later(LATE, go_on, context=self._context)
        task.add_done_callback(end)

    async def _answer(self, asked: list[tuple[Q, "Future[A]"]]) -> None:
        """Answer questions, those that meet a lock after all others."""
        try:
            locked = await self._try(asked, lock_timeout=LOCK_TIMEOUT)
            await gather(*(self._ask_until_unlocked(each) for each in locked))
        except BaseException as error:  # a signal, or the end of the process: the waiting tasks get it, too
            for _, waiting in asked:
                _refuse(waiting, error)
            raise

    async def _ask_until_unlocked(self, asked: tuple[Q, "Future[A]"]) -> None:
        """Answer a question that met a lock: wait for the lock, or look again where too many questions wait for one."""
        pause, locked = _SHORTEST_PAUSE, [asked]
        while locked and not asked[1].done():
            is_patient = self._patient < self._most_patient
            self._patient += is_patient
            try:
                locked = await self._try([asked], lock_timeout=None if is_patient else SHORT_LOCK_TIMEOUT)
            finally:
                self._patient -= is_patient
            if locked:
                await sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _try(
        self, asked: list[tuple[Q, "Future[A]"]], *, lock_timeout: float | None
    ) -> list[tuple[Q, "Future[A]"]]:
        """Answer questions in one statement, or each alone, and return those that met a lock."""
        try:
            answers = await self._ask_all([question for question, _ in asked], lock_timeout)
        except PgflowPrefectError as error:
            is_of_rows = isinstance(error, TransientError) and error.is_of_rows
            if len(asked) > 1 and (is_of_rows or not isinstance(error, TransientError)):
                return [locked for each in asked for locked in await self._try([each], lock_timeout=SHORT_LOCK_TIMEOUT)]
            if is_of_rows and lock_timeout is not None:
                return asked
            for _, waiting in asked:
                _refuse(waiting, error)
            return []
        for (_, waiting), answer in zip(asked, answers, strict=True):
            if not waiting.done():
                waiting.set_result(answer)
        return []


def _refuse(waiting: "Future[A]", error: BaseException) -> None:
    if not waiting.done():
        waiting.set_exception(error)
        waiting.exception()  # the run that asked may have stopped waiting
