"""The way of our events to Prefect: one thread and one websocket of this process, which nobody waits for."""

import asyncio
import atexit
import logging
import threading
from collections import deque
from concurrent.futures import Future
from contextvars import copy_context
from functools import cache

from prefect.events import Event, RelatedResource
from prefect.events.clients import EventsClient, get_events_client
from prefect.settings import get_current_settings

from pgflow_prefect.execution.redaction import describe_error

Related = Future[list[RelatedResource]]
"""What the events of one flow run are related to, once that is known."""

PATIENCE = 5.0
"""Seconds for which a process that ends waits until Prefect has heard everything."""

MOST_WAITING = 20_000
"""Events that wait for Prefect to come back; of more, the latest are dropped, and reconciling makes up for them."""

_LINGER = 0.02  # seconds: to be woken for each event would cost more than the event
_SHORTEST_WAIT, _LONGEST_WAIT = 0.1, 5.0  # seconds between two tries

_logger = logging.getLogger(__name__)


class EventStream:
    """Sends events in the order in which they came, while Prefect can be reached, and keeps them while it can't.

    Prefect's own `emit_event` hands every single event over to a thread, from there to another one and back, while all
    three contend for the interpreter: for a step that does nothing, that was half of what the step cost.
    """

    def __init__(self) -> None:
        """Start the thread; it ends with the process, once it has sent everything."""
        self._events: deque[tuple[Event, Related | None]] = deque()
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._is_awake = False
        self._is_full = False
        self._is_closing = False
        context = copy_context()  # with the settings that are in force here
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="pgflow-events", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def send(self, event: Event, related: Related | None = None) -> None:
        """Send an event, soon; from any thread.

        Args:
            event: what happened.
            related: what else it is related to; it waits until that is known.
        """
        if len(self._events) >= MOST_WAITING:
            if not self._is_full:
                _logger.warning("Prefect does not take events: the next ones are dropped, and not shown at once")
            self._is_full = True
            return
        self._is_full = False
        self._events.append((event, related))
        if not self._is_awake:
            self._is_awake = True
            self._loop.call_soon_threadsafe(self._wake.set)

    def close(self, timeout: float = PATIENCE) -> None:
        """Send what is left, and wait until Prefect has got it, for so many seconds at most."""
        self._is_closing = True
        self._loop.call_soon_threadsafe(self._wake.set)
        self._thread.join(timeout)

    def _run(self) -> None:
        self._loop.run_until_complete(self._send_all())

    async def _send_all(self) -> None:
        wait = _SHORTEST_WAIT
        while await self._await_events():
            try:
                async with get_events_client() as client:
                    while await self._await_events():
                        wait = await self._send_next(client, wait)
            except Exception as error:  # noqa: BLE001  it could not connect, for whatever reason
                wait = await self._pause(error, wait)

    async def _await_events(self) -> bool:
        """Return once there is an event to be sent; False where there will be none."""
        while not self._events:
            self._is_awake = False
            if self._events:  # it came just before that
                break
            if self._is_closing:
                return False
            await self._wake.wait()
            self._wake.clear()
            if not self._is_closing:
                await asyncio.sleep(_LINGER)
        self._is_awake = True
        return True

    async def _send_next(self, client: EventsClient, wait: float) -> float:
        event, related = self._events[0]
        if related is not None:
            found: list[RelatedResource] = await asyncio.wrap_future(related)
            event.related += found
        self._events.popleft()
        try:
            await client.emit(event)
        except Exception as error:  # noqa: BLE001  the client has kept the event, and sends it when it has reconnected
            return await self._pause(error, wait)
        return _SHORTEST_WAIT

    @staticmethod
    async def _pause(error: Exception, wait: float) -> float:
        """Wait for the next try, and return for how long to wait for the one after it."""
        _logger.warning("Prefect does not take events: %s", describe_error(error))
        await asyncio.sleep(wait)
        return min(2 * wait, _LONGEST_WAIT)


@cache
def _open_stream(url: str | None) -> EventStream:
    """Return the stream to a server; another one for each."""
    return EventStream()


def send_event(event: Event, related: Related | None = None) -> None:
    """Send an event to the Prefect server that the settings name; see `EventStream.send`."""
    _open_stream(get_current_settings().api.url).send(event, related)
