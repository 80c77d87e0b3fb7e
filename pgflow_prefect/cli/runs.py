"""`runs`."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from pgflow_prefect.cli.console import format_duration, format_time, out, print_json, print_table, shorten
from pgflow_prefect.cli.options import AsJson, Dsn, make_settings
from pgflow_prefect.cli.snapshot import describe_run_status
from pgflow_prefect.errors import UsageError
from pgflow_prefect.models import Ending, Status
from pgflow_prefect.wording import parse_duration

if TYPE_CHECKING:
    from pgflow_prefect.models import Run
    from pgflow_prefect.settings import Settings

RunStatus = Status | Literal[Ending.CANCELLED]
"""The values of `--status`: a status, or cancelled, which is an ending."""


def read_since(text: str, option: str = "--since") -> datetime:
    """Return the moment `30m`, `2h` or `7d` ago, or that of an ISO date and time in the user's time zone.

    Raises:
        UsageError: the text is neither.
    """
    try:
        if (age := parse_duration(text, "smhd", is_exact=True)) is not None:
            return datetime.now(UTC) - age
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise UsageError(
            f"{option} {text!r} is neither a time like 30m, 2h or 7d nor a date and time like 2026-01-31T09:30"
        ) from None


def runs(
    *,
    workflow: str | None = None,
    status: RunStatus | None = None,
    since: str | None = None,
    limit: Annotated[int, Parameter(validator=Number(gte=1))] = 20,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """List the newest runs.

    Example: `pgflow-prefect runs --workflow email_campaign --status failed`

    Parameters
    ----------
    workflow
        Only runs of this workflow.
    status
        Only runs that are pending, completed, failed or cancelled. The failed runs include the cancelled ones.
    since
        Only runs that began since then: 30m, 2h, 7d, or a date and time.
    limit
        The greatest number of runs to list.
    """
    import anyio

    begun = read_since(since) if since else None
    listing = partial(_list_runs, limit=limit, with_payload=json)
    found, how_to_start = anyio.run(listing, make_settings(dsn), workflow, status, begun)
    if json:
        print_json(found)
    elif found:
        columns: tuple[str, ...] = ("run", "workflow", "status", "created", "took", "steps", "error")
        rows = [_describe_run(each) for each in found]
        if any(each.logical_date for each in found):
            columns = (*columns, "logical date")
            rows = [(*row, format_time(each.logical_date)) for row, each in zip(rows, found, strict=True)]
        if any(each.is_unshown for each in found):
            columns = (*columns, "prefect")
            rows = [(*row, "not shown" if each.is_unshown else "") for row, each in zip(rows, found, strict=True)]
        print_table(columns, rows, whole=("run", "status"), spare=("error", "created", "steps", "took"))
    else:
        out.print(f"no runs: {how_to_start}")


def _describe_run(run: Run) -> tuple[str, ...]:
    took = format_duration(run.created_at, run.finished_at)
    error = shorten(run.error_message or "", 60)
    # One that was inserted by hand has no definition, and nothing that remains, until it begins.
    steps = "-" if run.steps is None or run.remaining is None else f"{run.steps - run.remaining}/{run.steps}"
    return (str(run.id), run.workflow_slug, describe_run_status(run), format_time(run.created_at), took, steps, error)


async def _list_runs(
    settings: Settings,
    workflow: str | None,
    status: RunStatus | None,
    since: datetime | None,
    *,
    limit: int,
    with_payload: bool,
) -> tuple[list[Run], str]:
    """Return the runs, and a sentence that says how to start one."""
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1, only_reads=True) as store:
        if workflow is not None:
            await store.load_definition(workflow)  # a mistyped name is an error, not an empty list
        found = await store.mark_unshown(
            await store.list_runs(
                workflow_slug=workflow, status=status, since=since, limit=limit, with_payload=with_payload
            )
        )
        return found, store.implementation.how_to_start
