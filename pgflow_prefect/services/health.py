"""Whether a service lives and is ready, as Kubernetes, systemd and scripts ask it."""

import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic

import anyio

from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import DatabaseReadOnlyError, PgflowPrefectError, UsageError

STALLED = 30.0
"""Seconds after which an event loop that has not turned counts as dead."""

_LONGEST_PASS = 60.0  # seconds between two looks for pending runs, beside what their statements may take
_BEAT = 1.0  # seconds
_INTERVAL = 5.0  # seconds between two looks at the database, and between two signs of life

_logger = logging.getLogger(__name__)


@dataclass
class Health:
    """What a service knows of itself. Threads read it: an event loop that hangs can't answer.

    A database that is away makes a service not ready, and leaves it alive: to start it anew would not help.

    Attributes:
        statement_bound: seconds that one statement may take; one look for pending runs has several.
        is_asked: something wants to know.
    """

    statement_bound: float
    is_asked: bool = False
    _beat_at: float = field(default_factory=monotonic)
    _passed_at: Callable[[], float] | None = None
    _trouble: str | None = "it starts"
    _is_draining: bool = False

    def find_death(self) -> str | None:
        """Return why the service should be started anew; None while it lives."""
        if (silent := monotonic() - self._beat_at) > STALLED:
            return f"the event loop has not turned for {silent:.0f} s"
        if self._passed_at is None or self._is_draining:
            return None
        if (silent := monotonic() - self._passed_at()) > _LONGEST_PASS + 4 * self.statement_bound:
            return f"it has not looked for pending runs for {silent:.0f} s"
        return None

    def find_trouble(self) -> str | None:
        """Return why the service takes no runs; None while it is ready."""
        return self.find_death() or ("it drains" if self._is_draining else self._trouble)

    def drains(self, action: Callable[[], object]) -> Callable[[], None]:
        """Return an action that also makes the service not ready: it comes to its end."""

        def act() -> None:
            self._is_draining = True
            _notify("STOPPING=1")
            action()

        return act

    @asynccontextmanager
    async def watched(self, store: Store, passed_at: Callable[[], float]) -> AsyncIterator[None]:
        """Be ready while the block works and the database can be written.

        Args:
            store: the database.
            passed_at: returns when the service looked for pending runs last, by the monotonic clock.
        """
        self._passed_at = passed_at
        self._trouble = None
        async with anyio.create_task_group() as group:
            if self.is_asked:
                group.start_soon(self._watch, store)
            yield
            group.cancel_scope.cancel()

    async def _watch(self, store: Store) -> None:
        while True:
            try:
                await store.check_writable()
                self._trouble = None
            except DatabaseReadOnlyError:
                self._trouble = "the database is read-only"
            except PgflowPrefectError:
                self._trouble = "the database does not answer"
            if self._trouble is not None:
                with suppress(PgflowPrefectError):
                    await store.drop_broken_connections()
            await anyio.sleep(_INTERVAL)

    async def beat(self) -> None:
        """Note that the event loop turns, until this is cancelled."""
        while True:
            self._beat_at = monotonic()
            await anyio.sleep(_BEAT)


@asynccontextmanager
async def open_health(health: Health, *, port: int | None, file: Path | None) -> AsyncIterator[None]:
    """Tell of a service's health for as long as the block takes: on a port, in a file, and to systemd, if it asks.

    Args:
        health: of the service.
        port: answers `GET /live` and `GET /ready` on all addresses: 200, or 503 with the reason.
        file: is written every few seconds while the service lives, with `ready` or the reason why not in it.

    Raises:
        UsageError: the port is taken, or the file can't be written.
    """
    is_awaited = bool(os.environ.get("NOTIFY_SOCKET"))
    if port is None and file is None and not is_awaited:
        yield
        return
    health.is_asked = True
    with ExitStack() as opened:
        if port is not None:
            opened.enter_context(_answer(health, port))
        if file is not None or is_awaited:
            opened.enter_context(_sign(health, file))
        async with anyio.create_task_group() as group:
            group.start_soon(health.beat)
            yield
            group.cancel_scope.cancel()


@contextmanager
def _answer(health: Health, port: int) -> Iterator[None]:
    """Answer probes over HTTP, in threads of their own."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 5.0  # seconds for a request
        server_version, sys_version = "pgflow-prefect", ""

        def do_GET(self) -> None:
            find = {"/live": health.find_death, "/ready": health.find_trouble}.get(self.path.partition("?")[0])
            if find is None:
                self._send(404, "ask for /live or /ready")
            elif (reason := find()) is not None:
                self._send(503, reason)
            else:
                self._send(200, "ok")

        do_HEAD = do_GET  # noqa: N815  as http.server has it

        def _send(self, status: int, text: str) -> None:
            body = f"{text}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing: a probe comes every few seconds."""

    try:
        server = ThreadingHTTPServer(("", port), Handler)
    except OSError as error:
        raise UsageError(f"--health-port {port} can't be used: {error.strerror}; choose another one") from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="pgflow-health-port", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def _sign(health: Health, file: Path | None) -> Iterator[None]:
    """Give signs of life from a thread of its own; each is missing where the service is dead."""
    closing = threading.Event()
    interval = min(_INTERVAL, int(os.environ.get("WATCHDOG_USEC") or 60e6) / 3e6)
    if file is not None:
        try:
            _write(file, health)
        except OSError as error:
            raise UsageError(f"--health-file {file} can't be written: {error.strerror}") from error

    def sign() -> None:
        is_ready = False
        while not closing.wait(interval):
            if health.find_death() is not None:
                continue
            if not is_ready and health.find_trouble() is None:
                is_ready = True
                _notify("READY=1")
            _notify("WATCHDOG=1")
            if file is not None:
                try:
                    _write(file, health)
                except OSError as error:
                    _logger.warning("--health-file %s can't be written: %s", file, error.strerror)

    thread = threading.Thread(target=sign, name="pgflow-health", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join(timeout=1)
        if file is not None:
            file.unlink(missing_ok=True)


def _write(file: Path, health: Health) -> None:
    trouble = health.find_trouble()
    file.write_text("ready\n" if trouble is None else f"not ready: {trouble}\n", encoding="utf-8")


def _notify(what: str) -> None:
    """Tell systemd, if it wants to hear: see sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.setblocking(False)
        link.sendto(what.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)
