"""Sends displays to Prefect from one thread of this process, which no run waits for."""

import asyncio
import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import AsyncExitStack
from contextvars import Context
from functools import cache, partial
from time import monotonic
from typing import Any, Protocol, TypeVar
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.events import Event, RelatedResource
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from pgflow_prefect.prefect_api.internals import EventsClient, SettingsContext, get_events_client, get_settings_context
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.waiting import Pauses

T = TypeVar("T")

Related = Future[list[RelatedResource]]
"""The related resources of one flow run's events, when they are known."""

Make = Callable[[], Event]

Request = Callable[[PrefectClient], Awaitable[object]]

PATIENCE = 5.0
"""Seconds without progress after which an ending process stops waiting for Prefect."""

MOST_WAITING = 20_000
"""The most events that wait for an absent Prefect; later ones are dropped, and reconciling repairs that."""

_MOST_UNCONFIRMED, _LONGEST_UNCONFIRMED = 700, 90.0
"""Events, and seconds, that may have gone to a dead server: Prefect's client checks after 700 events, or 30 s. An event
that is sent twice has the same id, by which the server recognises it."""

_STRIDE = 1_000
"""Events after which it checks how far the server is. The server has room for 10,000 events, and silently drops more.
All processes that send to it share that room."""

_LONGEST_STRIDE = 30.0  # seconds; a task run that a user has deleted never shows
_LOOK_INTERVAL = 0.2  # seconds

_PAUSE = 0.25  # seconds; requests that a run waits for take less, unless the server is busy
_LINGER = 0.02  # seconds: a wake-up for each event would cost more than the event
_LONGEST_ATTENTION = 1.0  # seconds without an event, after which it needs a wake-up
_LONGEST_LOOK = 10.0  # seconds, more than the search for related resources takes, with or without an answer
_SHORTEST_WAIT, _LONGEST_WAIT = 0.1, 5.0  # seconds between two tries

HELD_BACK = 0.25
"""Seconds for which an event waits for what makes it superfluous. An event takes about 5 ms of the server's CPU."""

_TASK_RUN = "prefect.task-run."

_logger = logging.getLogger(__name__)


class HeldEvent:
    """An event that is sent later, unless it is taken before that."""

    def __init__(self, make: Make, related: Related | None) -> None:
        """Hold an event of this maker, from now on."""
        self._due = monotonic() + HELD_BACK
        self._content = [(make, related)]  # a list, because two threads can't both take its only element

    def is_due(self, now: float) -> bool:
        """Tell whether it no longer waits: it was taken, or its time has come."""
        return not self._content or self._due <= now

    def take(self) -> tuple[Make, Related | None] | None:
        """Return what is to be sent, which the caller then sends or drops; None if it was taken before."""
        try:
            return self._content.pop()
        except IndexError:
            return None


class Sender(Protocol):
    """Where a run's displays go: to Prefect, or nowhere while Prefect is not told of the run."""

    @property
    def is_shown(self) -> bool:
        """Whether Prefect is told of the run."""

    def send(self, make: Make, related: Related | None = None) -> None:
        """Send an event; see `EventSender`."""

    def hold(self, make: Make, related: Related | None = None) -> HeldEvent:
        """Send an event, unless it is taken soon; see `EventSender`."""

    def request(self, act: Request, what: str) -> None:
        """Make a request to Prefect's API; see `EventSender`."""

    def look_up(self, find: Callable[[PrefectClient], Awaitable[T]], otherwise: T) -> "Future[T]":
        """Ask Prefect's API; see `EventSender`."""

    def give_way(self) -> None:
        """Send nothing for a moment; see `EventSender`."""


class EventSender:
    """Sends events in their order while Prefect answers, and keeps them while it does not.

    It also makes requests to Prefect's API (a name, an artifact), each once.

    Prefect's own `emit_event` passes every event to a thread, from there to another one and back, while all three
    compete for the interpreter. For an empty step, that was half of its cost.
    """

    is_shown = True

    def __init__(self) -> None:
        """Start the thread; it ends with the process, after it has sent everything."""
        self._waiting: deque[tuple[Make, Related | None]] = deque()
        self._held: deque[HeldEvent] = deque()  # in the order in which they are due
        self._made: deque[Event] = deque()  # the first of those, and events to send again
        self._sent: deque[tuple[float, Event]] = deque(maxlen=_MOST_UNCONFIRMED)
        self._strides = 0  # events sent since the last check
        self._marked: Event | None = None  # the last one of the stride before
        self._progress = 0  # any progress, for comparison
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._is_awake = False
        self._is_full = False
        self._closing: asyncio.Future[None] = self._loop.create_future()
        self._resumes_at = float("-inf")  # of the monotonic clock
        self._is_told = False  # that Prefect does not take events
        self._client: PrefectClient | None = None
        self._resources = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._asked: deque[Callable[[], Coroutine[Any, Any, None]]] = deque()
        self._requests: set[asyncio.Task[None]] = set()  # that are under way
        # Only the settings of the first sender's context: the thread would keep the rest for ever.
        current = get_settings_context()
        self._context = Context()
        self._context.run(SettingsContext(profile=current.profile, settings=current.settings).__enter__)
        self._thread = threading.Thread(
            target=self._context.copy().run, args=(self._run,), name="pgflow-outbox", daemon=True
        )
        self._thread.start()
        # Like Prefect, before the interpreter refuses new threads: `atexit` is later, and then no server name can be
        # resolved.
        getattr(threading, "_register_atexit", atexit.register)(self.close)

    @property
    def waiting(self) -> int:
        """How many events wait to be sent."""
        return len(self._waiting) + len(self._held)

    def send(self, make: Make, related: Related | None = None) -> None:
        """Send an event, soon; from any thread.

        Args:
            make: returns it; called in the sender's thread, while a run's event loop waits for PostgreSQL or a handler.
            related: its other related resources; the event waits until they are known.
        """
        if self._has_room():
            self._waiting.append((make, related))
            self._awaken()

    def hold(self, make: Make, related: Related | None = None) -> HeldEvent:
        """Send an event after `HELD_BACK` seconds, unless it is taken before that; from any thread.

        Args:
            make: as of `send`.
            related: as of `send`.
        """
        held = HeldEvent(make, related)
        if HELD_BACK <= 0:
            held.take()
            self.send(make, related)
        elif self._has_room():
            self._held.append(held)
            self._awaken()
        return held

    def _has_room(self) -> bool:
        if self.waiting >= MOST_WAITING:
            if not self._is_full:
                _logger.warning("Prefect does not take events: the next ones are dropped, and not shown at once")
            self._is_full = True
            return False
        self._is_full = self._is_full and self.waiting > MOST_WAITING // 2
        return True

    def _awaken(self) -> None:
        if not self._is_awake:
            self._is_awake = True
            self._loop.call_soon_threadsafe(self._wake.set)

    def repeat(self, make: Make, interval: float) -> Callable[[], None]:
        """Send an event repeatedly, until a call of the returned function; from any thread.

        Args:
            make: returns it; called in the sender's thread, each time.
            interval: seconds before the first event, and between two of them.
        """
        is_over = threading.Event()

        def beat() -> None:
            if not is_over.is_set() and not self._closing.done():
                self.send(make)
                self._loop.call_later(interval, beat)

        self._loop.call_soon_threadsafe(self._loop.call_later, interval, beat)
        return is_over.set

    def request(self, act: Request, what: str) -> None:
        """Make a request to Prefect's API, soon; from any thread. A failure is logged.

        Args:
            act: makes the request.
            what: its subject, for the log.
        """
        self._ask(partial(self._perform, act, what))

    def look_up(self, find: Callable[[PrefectClient], Awaitable[T]], otherwise: T) -> "Future[T]":
        """Ask Prefect's API at once, from this thread, because a handler may block the run's event loop.

        Args:
            find: asks.
            otherwise: the answer if Prefect gives none in time.
        """
        found: Future[T] = Future()
        self._ask(partial(self._find, find, otherwise, found))
        return found

    def _ask(self, question: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._asked.append(question)
        self._loop.call_soon_threadsafe(self._begin, context=self._context)

    def give_way(self) -> None:
        """Send nothing for a moment, because a run waits for an answer of the server; from any thread.

        A server that works on a run's events answers ten times as late. All callers together pause the sender for at
        most half of the time.
        """
        now = monotonic()
        if now > self._resumes_at + _PAUSE:
            self._resumes_at = now + _PAUSE

    def close(self, timeout: float = PATIENCE) -> None:
        """Send the rest, and wait until Prefect has it; stop after this many seconds without progress."""
        self._loop.call_soon_threadsafe(self._close)
        seen = -1
        while self._thread.is_alive() and self._progress != seen:
            seen = self._progress
            self._thread.join(timeout)

    def _close(self) -> None:
        if not self._closing.done():
            self._closing.set_result(None)
        self._wake.set()

    def _run(self) -> None:
        self._loop.run_until_complete(self._work())

    async def _work(self) -> None:
        async with self._resources:
            await self._send_all()
            while self._asked or self._requests:
                if self._requests:
                    await asyncio.wait(self._requests)
                await asyncio.sleep(0)  # the last ones have begun

    def _begin(self) -> None:
        task = self._loop.create_task(self._asked.popleft()())
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)

    async def _perform(self, act: Request, what: str) -> None:
        try:
            await self._sleep(_LINGER)  # the caller has more to do
            client = await self._open_client()
            await self._await_way()
            await act(client)
            self._progress += 1
        except Exception as error:  # noqa: BLE001  whatever it is, it is only shown
            _logger.warning("%s is not shown: %s", what, describe_error(error))

    async def _find(self, find: Callable[[PrefectClient], Awaitable[T]], otherwise: T, found: "Future[T]") -> None:
        answer = otherwise
        try:
            async with asyncio.timeout(PATIENCE):
                answer = await find(await self._open_client())
        except Exception as error:  # noqa: BLE001  whatever it is, there is another answer
            _logger.debug("Prefect's API was asked in vain: %s", describe_error(error))
        finally:
            found.set_result(answer)

    async def _open_client(self) -> PrefectClient:
        async with self._opening:
            if self._client is None:
                self._client = await self._resources.enter_async_context(get_client())
            return self._client

    async def _send_all(self) -> None:
        pauses = Pauses(_SHORTEST_WAIT, _LONGEST_WAIT)
        while await self._await_events():
            try:
                async with get_events_client() as client:
                    while await self._await_events():
                        await self._send_next(client)
                        self._is_told = False
                        pauses.reset()
            except Exception as error:  # noqa: BLE001  whatever keeps it from connecting, or from going on
                if not self._is_told:
                    _logger.warning("Prefect does not take events: %s; trying again", describe_error(error))
                self._is_told = True
                self._take_back()
                await asyncio.sleep(pauses.draw())

    def _take_back(self) -> None:
        """Send the latest again: the broken client would have done that, and the next client does not know them."""
        since = monotonic() - _LONGEST_UNCONFIRMED
        self._made.extendleft(event for sent, event in reversed(self._sent) if sent > since)
        self._sent.clear()

    async def _await_events(self) -> bool:
        """Wait for an event to send; return False if there will be none."""
        bored_at = monotonic() + _LONGEST_ATTENTION
        while not self._are_any_due() and not self._made:
            # A wake-up takes the interpreter from the caller, who is between two steps. So poll instead.
            if (monotonic() > bored_at and not self._held) or self._closing.done():
                self._is_awake = False
                if self.waiting:  # it came just before that
                    self._is_awake = True
                    continue
                if self._closing.done():
                    return False
                await self._wake.wait()
                self._wake.clear()
                bored_at = monotonic() + _LONGEST_ATTENTION
            await self._sleep(_LINGER)
        self._is_awake = True
        await self._await_way()
        return True

    def _are_any_due(self) -> bool:
        """Tell whether events wait to be sent now, those among them that were held back for long enough."""
        now = float("inf") if self._closing.done() else monotonic()
        while self._held and self._held[0].is_due(now):
            if (content := self._held.popleft().take()) is not None:
                self._waiting.append(content)
        return bool(self._waiting)

    async def _await_way(self) -> None:
        """Wait until no run needs the server."""
        while (left := self._resumes_at - monotonic()) > 0 and not self._closing.done():
            await self._sleep(left)

    async def _sleep(self, seconds: float) -> None:
        """Wait for this time, or until the end."""
        await asyncio.wait([self._closing], timeout=seconds)

    async def _send_next(self, client: EventsClient) -> None:
        if not self._made:
            await self._make_next()
        if not self._made:
            return
        event = self._made[0]
        try:
            await client.emit(event)
        except Exception:
            if not _can_be_sent(event):
                self._made.popleft()
            raise  # the others are sent again, perhaps twice, which changes nothing because an event has an id
        self._sent.append((monotonic(), event))
        self._made.popleft()
        self._progress += 1
        self._strides += 1
        if self._strides >= _STRIDE and event.resource.id.startswith(_TASK_RUN):
            if self._marked is not None:
                await self._await_record(self._marked)
            self._marked, self._strides = event, 0

    async def _await_record(self, event: Event) -> None:
        """Wait until the server shows the state of an event's task run."""
        task_run_id = UUID(event.resource.id.removeprefix(_TASK_RUN))
        deadline = monotonic() + _LONGEST_STRIDE
        while monotonic() < deadline:
            try:
                shown = await (await self._open_client()).read_task_run(task_run_id)
                if shown.state is not None and shown.state.timestamp >= event.occurred:
                    return
                self._progress += 1  # it answers
            except ObjectNotFound:
                self._progress += 1  # and will have it soon
            except Exception as error:  # noqa: BLE001  the server may be away
                _logger.debug("task run %s does not show: %s", task_run_id, describe_error(error))
            await asyncio.sleep(_LOOK_INTERVAL)

    async def _make_next(self) -> None:
        make, related = self._waiting.popleft()
        try:
            event = make()
            if related is not None:
                found = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(related)), _LONGEST_LOOK)
                event.related += found
        except Exception as error:  # noqa: BLE001  whatever its maker raises
            _logger.warning("an event is not sent: %s", describe_error(error))
        else:
            self._made.append(event)


def _can_be_sent(event: Event) -> bool:
    try:
        event.model_dump_json()
    except Exception as error:  # noqa: BLE001  it would never be sent, and nothing after it
        _logger.warning("event %s of %s is not sent: %s", event.event, event.resource.id, describe_error(error))
        return False
    return True


@cache
def _open_outbox(url: str | None) -> EventSender:
    """Return the sender for a server; another one for each."""
    return EventSender()


os.register_at_fork(after_in_child=_open_outbox.cache_clear)  # threads stay behind


def find_outbox() -> EventSender:
    """Return the sender of this process for the Prefect server that the settings name."""
    return _open_outbox(get_current_settings().api.url)
