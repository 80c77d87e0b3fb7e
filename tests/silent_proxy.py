"""A proxy in front of PostgreSQL that can fall silent: it keeps connections open, and forwards nothing any more."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psycopg
from psycopg.conninfo import make_conninfo

Hear = Callable[[bytes], None]


@dataclass
class SilentProxy:
    """Links between clients and a server.

    Attributes:
        dsn: by which clients reach the server through the proxy.
        loop: where it works.
    """

    dsn: str
    loop: asyncio.AbstractEventLoop
    _alive: set[asyncio.Event] = field(default_factory=set)
    _closed_to_new: bool = False

    def fall_silent(self, *, for_new_ones: bool = False) -> None:
        """Forward nothing any more on the links that are open, and perhaps nothing on new ones either."""

        def silence() -> None:
            self._closed_to_new = for_new_ones
            for link in self._alive:
                link.set()
            self._alive.clear()

        self.loop.call_soon_threadsafe(silence)

    def synchronise(self) -> None:
        """Return once what was asked of it is so."""
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop).result()

    def speak(self) -> None:
        """Forward on new links again."""
        self.loop.call_soon_threadsafe(setattr, self, "_closed_to_new", False)

    def link(self) -> asyncio.Event:
        """Return what is set once a new link is silent."""
        link = asyncio.Event()
        if self._closed_to_new:
            link.set()
        else:
            self._alive.add(link)
        return link


@contextmanager
def silent_proxy(
    dsn: str, linger: float = 0, hear: Callable[[], Hear] = lambda: lambda part: None
) -> Iterator[SilentProxy]:
    """Put a proxy in front of the server that a connection string names.

    Args:
        dsn: of the server.
        linger: seconds after which one side of a silent link learns that the other one has closed it.
        hear: called for each new link, and returns what hears all that its client sends.
    """
    with psycopg.connect(dsn) as connection:
        host, port = connection.info.host, connection.info.port
    loop = asyncio.new_event_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        silent = proxy.link()
        writers = [writer]
        with suppress(OSError, asyncio.CancelledError):  # the server is down, perhaps, or this comes to its end
            if host.startswith("/"):
                server = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
            else:
                server = await asyncio.open_connection(host, port)
            writers.append(server[1])
            there = _forward(reader, server[1], silent, linger, hear())
            await asyncio.gather(there, _forward(server[0], writer, silent, linger, lambda part: None))
        for each in writers:
            each.close()

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    listening = asyncio.start_server(serve, "127.0.0.1", 0)
    listener = asyncio.run_coroutine_threadsafe(listening, loop).result()
    address = listener.sockets[0].getsockname()
    proxy = SilentProxy(make_conninfo(dsn, host=address[0], port=address[1], sslmode="disable"), loop)

    async def close() -> None:
        listener.close()
        links = asyncio.all_tasks() - {asyncio.current_task()}
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silent: asyncio.Event, linger: float, hear: Hear
) -> None:
    """Forward until one side closes. On a silent link, what comes is read and thrown away: TCP looks healthy."""
    with suppress(ConnectionError):
        while part := await reader.read(65536):
            if not silent.is_set():
                hear(part)
                writer.write(part)
                await writer.drain()
    if silent.is_set():
        await asyncio.sleep(linger)
    writer.close()
