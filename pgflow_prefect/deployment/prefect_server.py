"""Runs a Prefect server of our own for a limited time, with its data in PostgreSQL and with measured settings."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from pgflow_prefect.database.connection import to_sqlalchemy_url
from pgflow_prefect.errors import PgflowPrefectError

RECORDER_SETTINGS = {
    # Task runs show four times sooner than with the defaults, which write them one by one. A whole second: Prefect
    # 3.8 cuts the fraction off, and half a second is a loop that never waits.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}

POOL_SETTING, POOL_SIZE = "PREFECT_SERVER_DATABASE_SQLALCHEMY_POOL_SIZE", 20
"""Connections that a server keeps. With its default, 5, it opens and closes connections all the time under load: the
same flow runs cost PostgreSQL twice as much."""

_START_TIMEOUT = 300.0  # seconds; a new database takes all of Prefect's migrations, and a busy machine its time
_STOP_TIMEOUT = 5.0  # it would wait for every open connection, a browser's too


@contextmanager
def prefect_server(home: Path, dsn: str, *, port: int | None = None, auth: str | None = None) -> Iterator[str]:
    """Run a Prefect server on this machine until the block ends, and yield the URL of its API.

    Web pages of other origins can't read its answers.

    Args:
        home: an existing directory for Prefect's files.
        dsn: the PostgreSQL database for the rest; Prefect creates its tables there.
        port: by default a free port.
        auth: the `PREFECT_API_AUTH_STRING` of clients, such as `admin:PASSWORD`; by default none.

    Raises:
        PgflowPrefectError: it did not start; the message has the end of its log.
    """
    port = port or _find_free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        **RECORDER_SETTINGS,
        POOL_SETTING: str(POOL_SIZE),
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": url,
        "PREFECT_API_DATABASE_CONNECTION_URL": to_sqlalchemy_url(dsn),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": url.removesuffix("/api"),
        **({"PREFECT_SERVER_API_AUTH_STRING": auth, "PREFECT_API_AUTH_STRING": auth} if auth else {}),
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),
        "DO_NOT_TRACK": "1",
    }
    log = home / "server.log"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_healthy(url, process, log)
        yield url
    finally:
        _stop(process)


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    with httpx.Client(timeout=2) as client:  # a new one each time would read all certificates, which takes 20 ms of CPU
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if client.get(f"{url}/health").is_success:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.1)
    tail = log.read_text(errors="replace")[-2000:].strip()
    raise PgflowPrefectError(f"the Prefect server did not start; the end of its log:\n{tail}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server and its children: first with SIGTERM, then with SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_STOP_TIMEOUT)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
