"""Reports whether a service is alive and ready, to Kubernetes, systemd and scripts."""

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
"""If the event loop has not turned for this many seconds, the service counts as dead."""

_LONGEST_PASS = 60.0  # seconds between two looks for pending runs, beside what their statements may take
_BEAT = 1.0  # seconds
_INTERVAL = 5.0  # seconds between two looks at the database, and between two signs of life

_logger = logging.getLogger(__name__)


@dataclass
class Health:
    """The health of a service. Threads read it, because an event loop that hangs can't answer.

    Without a database, a service is alive but not ready: a restart would not help.

    Attributes:
        statement_bound: seconds that one statement may take. A look for pending runs has several.
        is_asked: a probe, a file or systemd uses it.
    """

    statement_bound: float
    is_asked: bool = False
    _beat_at: float = field(default_factory=monotonic)
    _passed_at: Callable[[], float] | None = None
    _trouble: str | None = "it starts"
    _is_draining: bool = False

    def find_death(self) -> str | None:
        """Return why the service must be restarted, or None while it is alive."""
        if (silent := monotonic() - self._beat_at) > STALLED:
            return f"the event loop has not turned for {silent:.0f} s"
        if self._passed_at is None or self._is_draining:
            return None
        if (silent := monotonic() - self._passed_at()) > _LONGEST_PASS + 4 * self.statement_bound:
            return f"it has not looked for pending runs for {silent:.0f} s"
        return None

    def find_trouble(self) -> str | None:
        """Return why the service takes no runs, or None while it is ready."""
        return self.find_death() or ("it drains" if self._is_draining else self._trouble)

    def drains(self, action: Callable[[], object]) -> Callable[[], None]:
        """Wrap an action that ends the service, so that the service is no longer ready."""

        def act() -> None:
            self._is_draining = True
            _notify("STOPPING=1")
            action()

        return act

    @asynccontextmanager
    async def watched(self, store: Store, passed_at: Callable[[], float]) -> AsyncIterator[None]:
        """Be ready inside this block, as long as the database can be written.

        Args:
            store: the database.
            passed_at: returns the time of the last look for pending runs, by the monotonic clock.
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
    """Report a service's health inside this block: on a port, in a file, and to systemd if it started the service.

    Args:
        health: the service's health.
        port: answers `GET /live` and `GET /ready` on all addresses: 200, or 503 with the reason.
        file: written every few seconds while the service is alive. It has `ready`, or the reason why it is not ready.

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
    """Answer probes over HTTP, each in its own thread."""

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
            """Log nothing, because a probe comes every few seconds."""

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
    """Give signs of life from a thread. They stop if the service is dead."""
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
    """Notify systemd, if it started this service: see sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.setblocking(False)
        link.sendto(what.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)
