"""Sends questions to the database that come at the same time in one statement."""

from asyncio import gather, sleep
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from pgflow_prefect.errors import PgflowPrefectError, TransientError
from pgflow_prefect.execution.batch import LOCK_TIMEOUT, SHORT_LOCK_TIMEOUT
from pgflow_prefect.waiting import Asked, Collected, give, refuse

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
        self._collected: Collected[Q, A] = Collected(self._answer, most=MOST, late=LATE)

    async def ask(self, question: Q) -> A:
        """Return the answer to a question.

        Raises:
            PgflowPrefectError: the error that the question alone would raise.
        """
        return await self._collected.ask(question)

    async def _answer(self, asked: Sequence["Asked[Q, A]"]) -> None:
        """Answer questions, those that meet a lock after all others."""
        locked = await self._try(asked, lock_timeout=LOCK_TIMEOUT)
        await gather(*(self._ask_until_unlocked(each) for each in locked))

    async def _ask_until_unlocked(self, asked: "Asked[Q, A]") -> None:
        """Answer a question that met a lock: wait for the lock, or look again where too many questions wait for one."""
        pause: float = _SHORTEST_PAUSE
        locked: Sequence[Asked[Q, A]] = [asked]
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

    async def _try(self, asked: Sequence["Asked[Q, A]"], *, lock_timeout: float | None) -> Sequence["Asked[Q, A]"]:
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
                refuse(waiting, error)
            return []
        for (_, waiting), answer in zip(asked, answers, strict=True):
            give(waiting, answer)
        return []
