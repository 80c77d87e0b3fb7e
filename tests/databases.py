"""Databases of tests: made as copies, and dropped soon after their test.

A database is some 300 files and 12 MB. To copy them costs less than most tests where the files are in memory, and a
second on many disks. What is dropped within seconds never gets to a disk.
"""

import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

_MEMORY = Path("/dev/shm")  # noqa: S108  Linux keeps this directory in memory
_ROOM = 4 * 1024**3
"""Bytes that are free where the servers of a test session keep their data in memory: each takes some 300 MB."""

_UNUSED = """
    SELECT datname FROM pg_database d
    WHERE datname = ANY (%s) AND NOT EXISTS (
        SELECT FROM pg_stat_activity a WHERE a.datname = d.datname AND a.backend_type <> 'autovacuum worker'
    )
"""


def choose_place() -> str:
    """Return the directory for what servers of tests keep: in memory where there is room, else the temporary one."""
    if _MEMORY.is_dir() and min(shutil.disk_usage(_MEMORY).free, psutil.virtual_memory().available) > _ROOM:
        return str(_MEMORY)
    return tempfile.gettempdir()


class Databases:
    """Makes and drops databases on a server."""

    def __init__(self, server_dsn: str, *, is_ours: bool) -> None:
        """Begin with none.

        Args:
            server_dsn: of a superuser.
            is_ours: the server is an embedded one of this session.
        """
        self._server_dsn = server_dsn
        # Half the processor time, where a checkpoint costs nothing: the embedded server has fsync off.
        self._strategy = sql.SQL(" STRATEGY file_copy" if is_ours else "")
        self._made: set[str] = set()
        self._discarded: set[str] = set()
        self._server: psycopg.Connection[tuple[object, ...]] | None = None

    def make(self, template: str | None) -> str:
        """Create a database, empty or as a copy of another one, and return its connection string."""
        name = f"test_{uuid4().hex[:12]}"
        copied = sql.SQL(" TEMPLATE {}").format(sql.Identifier(template)) if template else sql.SQL("")
        create = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
        self._connect().execute(create + copied + self._strategy)
        self._made.add(name)
        return make_conninfo(self._server_dsn, dbname=name)

    def discard(self, dsn: str) -> None:
        """Drop a database whose test is over: now, or later where a connection is still open."""
        self._discarded.add(str(conninfo_to_dict(dsn)["dbname"]))
        server = self._connect()
        for [name] in server.execute(_UNUSED, [[*self._discarded]]).fetchall():
            with suppress(psycopg.errors.ObjectInUse):  # a connection has come meanwhile
                server.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(str(name))))
                self._forget([str(name)])

    def close(self) -> None:
        """Close the connection to the server."""
        if self._server is not None:
            self._server.close()

    def drop_all(self) -> None:
        """Drop what is left, whether it is in use or not."""
        with ThreadPoolExecutor(8) as pool:  # each waits for a checkpoint, and several share one
            [*pool.map(self._drop, self._made)]
        self._forget([*self._made])

    def _connect(self) -> psycopg.Connection[tuple[object, ...]]:
        """Return an open connection; a test may have ended the one before."""
        try:
            if self._server is not None:
                self._server.execute("SELECT 1")
                return self._server
        except psycopg.OperationalError:
            pass
        self._server = psycopg.connect(self._server_dsn, autocommit=True)
        return self._server

    def _drop(self, name: str) -> None:
        with psycopg.connect(self._server_dsn, autocommit=True) as server:
            server.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _forget(self, names: Iterable[str]) -> None:
        self._made.difference_update(names)
        self._discarded.difference_update(names)
