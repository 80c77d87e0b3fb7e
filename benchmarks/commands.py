"""The real commands as processes, between a database and a Prefect server of their own."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg

from benchmarks.engine import Connection, Graph, chain, define
from pgflow_prefect.database.connection import create_database
from pgflow_prefect.database.schema import SCRIPTS
from pgflow_prefect.deployment.prefect_server import prefect_server
from pgflow_prefect.shipped import shipped_path

WORKFLOW = "chain"
GRAPH: Graph = chain(5)

HANDLERS = """
from pgflow_prefect import Workflow

workflow = Workflow({slug!r})


async def handle(upstream: dict[str, int]) -> int:
    return len(upstream)


for slug in {steps!r}:
    workflow.step(slug)(handle)
"""

TIMEOUT = 900.0
"""Seconds after which what is waited for will not come any more."""


@dataclass(frozen=True)
class Site:
    """A directory with handlers of one workflow, a database that defines it, and a Prefect server.

    Attributes:
        directory: where commands are started.
        dsn: the database.
        db: an autocommit connection to it.
        api_url: the Prefect server.
    """

    directory: Path
    dsn: str
    db: Connection
    api_url: str

    @contextmanager
    def service(self, *arguments: str, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
        """Run a command that goes on until it is told to stop, from its being ready to the end of the block."""
        log = self.directory / f"{arguments[0]}_{uuid4().hex[:8]}.log"
        with log.open("wb") as output:
            process = self._start(output, *arguments, **variables)
        try:
            self.wait_until(lambda: "ready: " in log.read_text() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield process
            assert process.poll() is None, log.read_text()
        finally:
            process.terminate()
            process.wait()

    def call(self, *arguments: str) -> None:
        """Run a command to its end."""
        with (self.directory / "commands.log").open("ab") as output:
            assert self._start(output, *arguments).wait() == 0

    def begin_runs(self, count: int) -> None:
        """Start runs in SQL, all in one transaction."""
        self.db.execute("SELECT pgflow.run_workflow(%s, '{}') FROM generate_series(1, %s)", [WORKFLOW, count])

    def ask(self, query: str, *parameters: object) -> Any:  # noqa: ANN401  what SQL returns
        """Return the one value that a query finds."""
        [value] = self.db.execute(query, parameters).fetchone() or [None]
        return value

    @staticmethod
    def wait_until(is_so: Callable[[], object]) -> None:
        """Return once something is so."""
        deadline = time.monotonic() + TIMEOUT
        while not is_so():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.05)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of its commands."""
        inherited = {name: text for name, text in os.environ.items() if not name.startswith(("PREFECT_", "PG"))}
        configured = {
            "PGFLOW_DSN": self.dsn,
            "PREFECT_API_URL": self.api_url,
            "PREFECT_HOME": str(self.directory / "prefect"),
            "DO_NOT_TRACK": "1",
        }
        return {**inherited, **configured}

    def _start(
        self,
        output: Any,  # noqa: ANN401  a file
        *arguments: str,
        **variables: str,
    ) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", "pgflow_prefect", *arguments],
            cwd=self.directory,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


@contextmanager
def open_site(server: str, sources: Path | None = None) -> Iterator[Site]:
    """Set up a site on a PostgreSQL server, for as long as the block takes.

    Args:
        server: how to connect to it.
        sources: of another version, whose scripts the database gets.
    """
    name = uuid4().hex[:8]
    dsn = create_database(server, f"benchmark_{name}")
    with (
        tempfile.TemporaryDirectory(prefix="pgflow-", ignore_cleanup_errors=True) as temporary,
        psycopg.connect(dsn, autocommit=True) as db,
        prefect_server(Path(temporary), create_database(server, f"prefect_{name}")) as api_url,
    ):
        for script in SCRIPTS:
            path = shipped_path("sql", script) if sources is None else sources / "sql" / script
            if sources is None or path.exists():  # a former version has fewer of them
                db.execute(path.read_bytes())
        define(db, WORKFLOW, GRAPH)
        flows = Path(temporary) / "flows"
        flows.mkdir()
        (flows / f"{WORKFLOW}.py").write_text(HANDLERS.format(slug=WORKFLOW, steps=[*GRAPH]))
        yield Site(Path(temporary), dsn, db, api_url)
