"""`doctor`."""

from __future__ import annotations

import os
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pgflow_prefect.cli.console import err, out, print_json, print_table
from pgflow_prefect.cli.options import AsJson, Dsn, make_settings

if TYPE_CHECKING:
    from pgflow_prefect.deployment.diagnosis.findings import Finding
    from pgflow_prefect.settings import Settings

_STYLES = {"ok": "green", "warning": "yellow", "fault": "red", "skipped": "dim"}


def doctor(
    *,
    flow_run: Annotated[bool, Parameter(negative="--no-flow-run", show_default=False)] = True,
    json: AsJson = False,
    dsn: Dsn = None,
) -> int:
    """Check the database, Prefect, and the connections between them, and give advice for each problem.

    Each check is one line: ok, warning, fault or skipped. The exit code is 1 if there is a fault.

    Example: `pgflow-prefect doctor`

    Parameters
    ----------
    flow_run
        Run a flow of one task, and measure how long Prefect takes to show it. The flow run is deleted afterwards.
    """
    from pgflow_prefect.deployment.diagnosis.findings import Outcome
    from pgflow_prefect.execution.process.signals import run_event_loop

    settings = make_settings(dsn)
    found = run_event_loop(_examine, settings, _name_source(settings, dsn), flow_run, json)
    if json:
        print_json(found)
    elif not out.is_terminal:
        columns = ("check", "outcome", "message", "advice")
        print_table(columns, [(each.check, each.outcome, each.message, each.advice or "") for each in found])
    return int(any(each.outcome is Outcome.FAULT for each in found))


def _name_source(settings: Settings, dsn: str | None) -> str:
    """Return the source of the connection string, never the string itself."""
    from pgflow_prefect.database.connection import LIBPQ_VARIABLES

    if dsn:
        return "--dsn"
    if os.environ.get("PGFLOW_DSN"):
        return "PGFLOW_DSN"
    if settings.dsn is not None:
        return "PGFLOW_BLOCK"
    named = [name for name in LIBPQ_VARIABLES if os.environ.get(name)]
    return ", ".join(named) or "the embedded server, because no setting names another one"


async def _examine(settings: Settings, source: str, flow_run: bool, quiet: bool) -> list[Finding]:
    from rich.markup import escape
    from rich.status import Status as Spinner

    from pgflow_prefect.deployment.diagnosis.doctor import examine

    found = []
    # On the console of the lines, which are drawn above it; on standard error where these go into a pipe.
    console = out if out.is_terminal else err
    spinner = Spinner("", console=console)
    if console.is_terminal:
        spinner.start()
    try:

        def begin(name: str) -> None:
            spinner.update(f"{escape(name)} …")

        async with aclosing(examine(settings, source, with_flow_run=flow_run, begin=begin)) as findings:
            async for finding in findings:
                found.append(finding)
                if out.is_terminal and not quiet:
                    _print_finding(finding)
    finally:
        spinner.stop()
    return found


def _print_finding(finding: Finding) -> None:
    from rich.markup import escape

    style = _STYLES[finding.outcome]
    out.print(
        f"[{style}]{finding.outcome:<8}[/{style}] [bold]{escape(finding.check)}[/bold]: {escape(finding.message)}"
    )
    if finding.advice:
        out.print(f"         {escape(finding.advice)}")
