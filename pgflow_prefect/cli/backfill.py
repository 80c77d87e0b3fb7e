"""`backfill`, and its commands `list`, `show`, `pause`, `resume` and `cancel`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number

from pgflow_prefect.cli.console import format_time, out, print_json, print_table, shorten
from pgflow_prefect.cli.missed import MissedDates, find_missed
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, make_settings
from pgflow_prefect.cli.run import read_payload
from pgflow_prefect.cli.snapshot import count
from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeVar

    from pgflow_prefect.database.backfill_statements import Backfill, BackfillDate, PreviewedDate, WantedBackfill
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.settings import Settings

    T = TypeVar("T")

_MOST_ACTIVE = 1000

app = App(name="backfill")

BackfillId = Annotated[int, Parameter(validator=Number(gte=1), help="The backfill's number: `backfill list` shows it.")]
Reason = Annotated[str | None, Parameter(help="Shown with the backfill.")]


@app.default
def backfill(
    workflow: str,
    /,
    *,
    from_: Annotated[str | None, Parameter(name="--from")] = None,
    to: str | None = None,
    missed: Annotated[bool, Flag] = False,
    airflow_dsn: Annotated[str | None, Parameter(show_default=False)] = None,
    dag_file: Annotated[Path | None, Parameter(show_default=False)] = None,
    cron: str | None = None,
    every: str | None = None,
    timezone: str = "UTC",
    max_active: Annotated[int, Parameter(validator=Number(gte=1, lte=_MOST_ACTIVE))] = 1,
    payload: Annotated[str, Parameter(allow_leading_hyphen=True)] = "{}",  # `-` alone
    on_existing: Literal["none", "failed", "all"] = "none",
    newest_first: Annotated[bool, Flag] = False,
    stop_on_failure: Annotated[bool, Flag] = False,
    dry_run: Annotated[bool, Flag] = False,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Start a run of a workflow for each date of the past that a schedule would have had.

    Workers and bridges execute the runs after all other runs, at most `--max-active` at once. Each run has its date in
    the payload, as `logical_date`, and Python finds it in `context.logical_date`. A date that has a run already is
    left, so you can repeat the command. `pgflow-prefect guide backfill` says more.

    Example: `pgflow-prefect backfill hr --every 1d --from 2026-01-01 --to 2026-01-31`

    Parameters
    ----------
    workflow
        The workflow's slug.
    from_
        The first day, or the first moment: 2026-01-01, or 2026-01-01T06:00.
    to
        The last day, with all its dates, or the last moment.
    missed
        The dates since the latest one that has a run, of Airflow's or of this database. Without --cron or --every,
        they are those of the DAG in Airflow. If that has catchup=False, only the latest one counts.
    airflow_dsn
        With --missed: Airflow's metadata database. The default is PGFLOW_AIRFLOW_DSN.
    dag_file
        With --missed: the file that the script of `pgflow-prefect airflow dump` has written.
    cron
        The dates, such as "0 9 * * 1-5".
    every
        The time from one date to the next: 15m, 6h, 1d, 1w.
    timezone
        In which the dates and --cron are, such as Europe/Berlin.
    max_active
        The most runs of the backfill at the same time. 1 executes the dates one after the other.
    payload
        The payload of all runs, a JSON object, or @FILE, or - for standard input.
    on_existing
        What to do with a date that has a run. none: leave it. failed: reopen a failed run. all: start another run, if
        the latest one has ended.
    newest_first
        Begin with the latest date.
    stop_on_failure
        Pause the backfill when one of its runs fails.
    dry_run
        Show the dates, and what would be done with each. Start nothing.
    """
    import anyio

    from pgflow_prefect.database.backfill_statements import MOST_DATES, OnExisting, WantedBackfill
    from pgflow_prefect.deployment.backfill_dates import Range, plan_dates

    text = read_payload(payload)
    settings = make_settings(dsn)
    if missed:
        if from_ is not None or to is not None:
            raise UsageError("--missed begins after the latest run and ends now: leave out --from and --to")
        source = MissedDates(workflow, cron, every, timezone, airflow_dsn, dag_file)
        found = anyio.run(find_missed, settings, source)
        if found is None:
            _print_nothing_missed(workflow, json=json)
            return
        planned = found
    elif airflow_dsn is not None or dag_file is not None:
        raise UsageError("--airflow-dsn and --dag-file go with --missed")
    elif from_ is None or to is None:
        raise UsageError("which dates? give --from and --to, or --missed")
    else:
        planned = anyio.run(plan_dates, Range(from_, to, cron, every, timezone), MOST_DATES)
    wanted = WantedBackfill(
        workflow_slug=workflow,
        dates=planned.dates,
        interval_starts=planned.interval_starts,
        payload=text,
        max_active=max_active,
        on_existing=OnExisting(on_existing),
        newest_first=newest_first,
        stop_on_failure=stop_on_failure,
        schedule=planned.description,
    )
    if dry_run:
        _print_preview(anyio.run(_preview, settings, wanted), wanted, json=json)
        return
    started = anyio.run(_start, settings, wanted)
    if json:
        print_json({"backfill": started})
        return
    out.print(f"backfill {started.id} of workflow {workflow!r}: {_describe_dates(started)}", markup=False)
    out.print(f"follow it with `pgflow-prefect backfill show {started.id}`", markup=False)


def _print_nothing_missed(workflow: str, *, json: bool) -> None:
    if json:
        print_json({"missed": []})
    else:
        out.print(f"no date of workflow {workflow!r} was missed", markup=False)


@app.command(name="list")
def list_(
    *,
    workflow: str | None = None,
    limit: Annotated[int, Parameter(validator=Number(gte=1))] = 20,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """List the newest backfills.

    Parameters
    ----------
    workflow
        Only backfills of this workflow.
    limit
        The greatest number of backfills to list.
    """

    async def read(store: Store) -> list[Backfill]:
        if workflow is not None:
            await store.load_definition(workflow)  # a mistyped name is an error, not an empty list
        return await store.list_backfills(workflow, limit=limit)

    found = _ask(dsn, read)
    if json:
        print_json(found)
    elif found:
        columns = (
            "backfill",
            "workflow",
            "status",
            "dates",
            "planned",
            "under way",
            "ended",
            "failed",
            "left",
            "created",
        )
        print_table(columns, map(_describe_backfill, found), whole=("backfill", "status"), spare=("created", "dates"))
    else:
        out.print("no backfills: start one with `pgflow-prefect backfill WORKFLOW --from … --to …`")


@app.command
def show(backfill_id: BackfillId, /, *, json: AsJson = False, dsn: Dsn = None) -> None:
    """Show a backfill, and each of its dates with its run."""

    async def read(store: Store) -> tuple[Backfill, list[BackfillDate]]:
        return await store.read_backfill(backfill_id), await store.list_backfill_dates(backfill_id)

    found, dates = _ask(dsn, read)
    if json:
        print_json({"backfill": found, "dates": dates})
        return
    _print_backfill(found)
    rows = [
        (format_time(each.logical_date), each.state, str(each.ended_as or each.status or "-"), str(each.run_id or "-"),
         shorten(each.note or "", 60))
        for each in dates
    ]  # fmt: skip
    print_table(("logical date", "state", "status", "run", "note"), rows, whole=("run",), spare=("note",))


@app.command
def pause(backfill_id: BackfillId, /, *, reason: Reason = None, json: AsJson = False, dsn: Dsn = None) -> None:
    """Start no further run of a backfill. The runs that are under way go on."""

    async def move(store: Store) -> Backfill:
        await store.pause_backfill(backfill_id, reason)
        return await store.read_backfill(backfill_id)

    _print_moved(_ask(dsn, move), json=json)


@app.command
def resume(backfill_id: BackfillId, /, *, json: AsJson = False, dsn: Dsn = None) -> None:
    """Let a paused backfill go on."""

    async def move(store: Store) -> Backfill:
        await store.resume_backfill(backfill_id)
        return await store.read_backfill(backfill_id)

    _print_moved(_ask(dsn, move), json=json)


@app.command
def cancel(
    backfill_id: BackfillId,
    /,
    *,
    runs: Annotated[bool, Flag] = False,
    reason: Reason = None,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Start no further run of a backfill, for good.

    Parameters
    ----------
    runs
        Cancel its runs that are under way, too. Otherwise they go on.
    """

    async def move(store: Store) -> Backfill:
        await store.cancel_backfill(backfill_id, reason, cancel_runs=runs)
        return await store.read_backfill(backfill_id)

    _print_moved(_ask(dsn, move), json=json)


def _ask(dsn: str | None, ask: Callable[[Store], Awaitable[T]]) -> T:
    import anyio

    from pgflow_prefect.database.store import open_store

    async def open_and_ask(settings: Settings) -> T:
        async with open_store(settings, size=1) as store:
            return await ask(store)

    return anyio.run(open_and_ask, make_settings(dsn))


async def _preview(settings: Settings, wanted: WantedBackfill) -> list[PreviewedDate]:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        await _check_workflow(store, wanted.workflow_slug)
        return await store.preview_backfill(wanted.workflow_slug, wanted.dates, wanted.on_existing)


async def _start(settings: Settings, wanted: WantedBackfill) -> Backfill:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        await _check_workflow(store, wanted.workflow_slug)
        return await store.read_backfill(await store.start_backfill(wanted))


async def _check_workflow(store: Store, slug: str) -> None:
    """Refuse a workflow that there is not, or that has no valid definition."""
    from pgflow_prefect.definitions.graph import find_problems
    from pgflow_prefect.errors import InvalidDefinitionError

    if problems := find_problems(await store.load_definition(slug)):
        raise InvalidDefinitionError(slug, problems)


_DOING = {"start": "start a run", "reopen": "reopen its run", "leave": "leave its run"}


def _print_preview(dates: list[PreviewedDate], wanted: WantedBackfill, *, json: bool) -> None:
    began = dict(zip(wanted.dates, wanted.interval_starts or (), strict=False))
    if json:
        found = [
            each.model_dump(mode="json") | {"interval_start": _write(began.get(each.logical_date))} for each in dates
        ]
        print_json(found)
        return
    rows = [
        (format_time(each.logical_date), format_time(began.get(each.logical_date)), _DOING[each.action],
         str(each.status or "-"), str(each.run_id or "-"))
        for each in dates
    ]  # fmt: skip
    columns = ("logical date", "data since", "would", "status", "run")
    print_table(columns, rows, whole=("logical date",), spare=("run", "data since", "status"))
    out.print(f"{count(len(dates), 'date')}: nothing was started", markup=False)


def _write(moment: object) -> str | None:
    return None if moment is None else str(moment)


def _describe_backfill(found: Backfill) -> tuple[str, ...]:
    dates = f"{format_time(found.first)} to {format_time(found.last)}"
    numbers = (found.planned, found.started, found.ended, found.failed, found.left_out)
    return (
        *(str(found.id), found.workflow_slug, str(found.status), dates),
        *map(str, numbers),
        format_time(found.created_at),
    )


def _describe_dates(found: Backfill) -> str:
    total = found.planned + found.started + found.ended + found.left_out
    states = [
        *(f"{number} {word}" for number, word in ((found.planned, "planned"), (found.started, "under way")) if number),
        *([f"{found.ended} ended ({found.failed} failed)"] if found.ended else []),
        *([f"{found.left_out} left"] if found.left_out else []),
    ]
    return f"{count(total, 'date')}, {', '.join(states)}"


def _print_backfill(found: Backfill) -> None:
    out.print(f"backfill {found.id} of workflow {found.workflow_slug!r}: {found.status}", markup=False)
    if found.note:
        out.print(found.note, markup=False)
    out.print(_describe_dates(found), markup=False)
    schedule = f"{found.schedule}; " if found.schedule else ""
    order = "newest first" if found.newest_first else "oldest first"
    stop = ", stops at a failure" if found.stop_on_failure else ""
    terms = f"{order}, {found.max_active} at a time, on existing: {found.on_existing}{stop}"
    out.print(f"{schedule}{terms}; by {found.created_by}, {format_time(found.created_at)}", markup=False)


def _print_moved(found: Backfill, *, json: bool) -> None:
    if json:
        print_json(found)
    else:
        out.print(f"backfill {found.id} is {found.status}: {_describe_dates(found)}", markup=False)
