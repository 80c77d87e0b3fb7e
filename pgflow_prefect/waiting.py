"""How this package waits: growing pauses between tries, a wake-up, and questions that share a request."""

import logging
import random
from asyncio import CancelledError, Future, Task, get_running_loop
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextvars import copy_context
from time import monotonic
from typing import Any, Generic, TypeAlias, TypeVar

import anyio

Item = TypeVar("Item")
Answer = TypeVar("Answer")

Asked: TypeAlias = "tuple[Item, Future[Answer]]"
"""An item, and the future that gets its answer."""

_SHORTEST, _LONGEST = 0.1, 5.0  # seconds

_logger = logging.getLogger(__name__)


class Pauses:
    """The seconds to wait before each further try of one thing: longer each time, until it has worked.

    Attributes:
        shortest: the first pause, and the first one after `reset`.
        longest: no pause is longer.
        factor: by which pauses grow.
    """

    def __init__(self, shortest: float = _SHORTEST, longest: float = _LONGEST, *, factor: float = 2.0) -> None:
        self.shortest, self.longest, self.factor = shortest, longest, factor
        self._next = shortest

    def draw(self) -> float:
        """Return the next pause, spread at random: a server that comes back should not meet all clients at once."""
        pause, self._next = self._next, min(self.factor * self._next, self.longest)
        return pause * random.uniform(0.7, 1.3)  # noqa: S311  no secret

    def reset(self) -> None:
        """Begin with the shortest pause again."""
        self._next = self.shortest


def make_pauses(patience: float) -> Iterator[float]:
    """Yield the seconds to wait before each further try, for `patience` seconds from the first of them."""
    deadline = monotonic() + patience
    pauses = Pauses()
    while monotonic() + (pause := pauses.draw()) <= deadline:
        yield pause


class Wakeup:
    """Ends a wait early. If no task is waiting, the next wait returns at once."""

    def __init__(self) -> None:
        self._woken = anyio.Event()

    def wake(self) -> None:
        """End the present wait, or the next one."""
        self._woken.set()

    async def wait(self, at_most: float) -> None:
        """Return when it is woken, or after so many seconds."""
        with anyio.move_on_after(at_most):
            await self._woken.wait()
        self._woken = anyio.Event()


class Backoff:
    """The pauses between the tries of one thing: ever longer, and at an end when they are no use.

    Attributes:
        has_begun: this is not the first try.
    """

    def __init__(self, patience: float, of: str) -> None:
        """Begin to count with the first pause.

        Args:
            patience: seconds for which it is tried again.
            of: what it is for, to be named in the log.
        """
        self._of = of
        self._pauses = make_pauses(patience)
        self.has_begun = False

    async def pause(self, error: Exception) -> bool:
        """Wait for the next try, after this error; False at once where there should be none."""
        self.has_begun = True
        pause = next(self._pauses, None)
        if pause is None:
            return False
        _logger.warning("%s: %s; trying again in about %.1f s", self._of, error, pause)
        await anyio.sleep(pause)
        return True


class Collected(Generic[Item, Answer]):
    """Asks for several items with one request.

    Items that come during a request wait for the next one. A late answer no longer keeps them waiting.
    """

    def __init__(
        self,
        ask_all: Callable[[Sequence["Asked[Item, Answer]"]], Awaitable[None]],
        *,
        most: int,
        late: float,
        at_once: float = float("inf"),
    ) -> None:
        """Begin without items, in the running event loop.

        Args:
            ask_all: sends a request, and answers each of its items.
            most: items in one request.
            late: seconds after which other items no longer wait for a request.
            at_once: the most requests at the same time; all but the last one are late.
        """
        self._ask_all = ask_all
        self._most, self._late_after, self._at_once = most, late, at_once
        self._waiting: deque[Asked[Item, Answer]] = deque()
        self._is_due = False
        self._under_way: set[Task[None]] = set()
        self._late: set[Task[None]] = set()  # of those
        self._context = copy_context()  # a request must not have the context of the run that asks first

    async def ask(self, item: Item) -> Answer:
        """Return the answer to an item, or raise its error."""
        answer: Future[Answer] = get_running_loop().create_future()
        self._waiting.append((item, answer))
        self._send_soon()
        return await answer

    def _send_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            get_running_loop().call_soon(self._send, context=self._context)

    def _send(self) -> None:
        self._is_due = False
        if self._under_way - self._late or len(self._under_way) >= self._at_once:
            return
        asked: list[Asked[Item, Answer]] = []
        while self._waiting and len(asked) < self._most:
            each = self._waiting.popleft()
            if not each[1].done():  # its caller was cancelled
                asked.append(each)
        if asked:
            self._begin(asked)

    def _begin(self, asked: "list[Asked[Item, Answer]]") -> None:
        loop = get_running_loop()
        task = loop.create_task(self._answer_all(asked), context=self._context)
        self._under_way.add(task)

        def keep_waiting_no_more() -> None:
            self._late.add(task)
            self._send_soon()

        timer = loop.call_later(self._late_after, keep_waiting_no_more, context=self._context)

        def end(_: object) -> None:
            timer.cancel()
            self._under_way.discard(task)
            self._late.discard(task)
            if not task.cancelled():
                task.exception()  # the callers get it
            self._send_soon()

        task.add_done_callback(end)

    async def _answer_all(self, asked: "list[Asked[Item, Answer]]") -> None:
        try:
            await self._ask_all(asked)
        except BaseException as error:
            waiting = [*asked]
            if not isinstance(error, Exception):  # the process ends: all callers must get it
                waiting += self._waiting
                self._waiting.clear()
            for _, answer in waiting:
                refuse(answer, error)
            if not isinstance(error, Exception):
                raise


def give(waiting: "Future[Answer]", answer: Answer) -> None:
    """Answer a caller, unless it was cancelled."""
    if not waiting.done():
        waiting.set_result(answer)


def refuse(waiting: "Future[Any]", error: BaseException) -> None:
    """Raise an error where a caller waits, unless it was cancelled."""
    if waiting.done():
        return
    if isinstance(error, CancelledError):
        waiting.cancel()
    else:
        waiting.set_exception(error)
        waiting.exception()  # the caller may be gone, and no other one asks for it
