"""`prune`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from pgflow_prefect.cli.console import err, out, print_json, print_table
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, make_settings
from pgflow_prefect.errors import UsageError
from pgflow_prefect.wording import parse_duration

if TYPE_CHECKING:
    from rich.progress import Progress

    from pgflow_prefect.database.pruning import PrunableRuns
    from pgflow_prefect.database.run_names import RunName
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.models import Status
    from pgflow_prefect.settings import Settings

_LONGEST = timedelta(days=36525)  # a century: the result of the subtraction must be a valid date


@dataclass(frozen=True)
class Choice:
    """Which runs to delete.

    Attributes:
        older_than: the time since they ended.
        workflows: only runs of these workflows, or None for all.
        status: completed or failed, or None for both.
        batch: how many runs one transaction deletes.
        runs: only these runs, of any age, or None.
    """

    older_than: timedelta
    workflows: tuple[str, ...] | None
    status: Status | None
    batch: int
    runs: tuple[RunName, ...] | None = None


@dataclass
class Pruned:
    """What was deleted so far."""

    runs: int = 0
    definitions: int = 0


def read_age(text: str) -> timedelta:
    """Return how long `90m`, `12h`, `30d` or `2w` are.

    Raises:
        UsageError: the text has another form, or means no time or more than a century.
    """
    age = parse_duration(text.strip(), is_exact=True)
    if age is None or not timedelta() < age <= _LONGEST:
        raise UsageError(f"--older-than {text!r} is not a time like 90m, 12h, 30d or 2w, between 0 and 100 years")
    return age


def prune(
    *,
    older_than: str | None = None,
    any_age: Annotated[bool, Flag] = False,
    run: Annotated[list[str] | None, Parameter(negative="", consume_multiple=True)] = None,
    workflow: Annotated[list[str] | None, Parameter(negative="", consume_multiple=True)] = None,
    status: Literal["completed", "failed"] | None = None,
    batch: Annotated[int, Parameter(validator=Number(gte=1, lte=100_000))] = 1000,
    dry_run: Annotated[bool, Flag] = False,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Delete runs that ended long ago, or the ended runs of a workflow, or one run, with all their rows.

    Pending runs are never deleted. A run that a process still holds, or whose end Prefect does not show yet, stays a
    day longer, unless you ask for any age. Snapshots of former definitions are deleted with the last run that refers
    to them. Prefect's flow runs stay. You can run several prunes at once. Ctrl-C stops after the present batch.

    Example: `pgflow-prefect prune --older-than 30d`

    Parameters
    ----------
    older_than
        How long ago a run must have ended: 90m, 12h, 30d, 2w.
    any_age
        With --workflow: delete all of its ended runs. Then their steps can be removed from the definition.
    run
        Only this run, of any age: its id, the beginning of its id, or latest.
    workflow
        Only runs of these workflows.
    status
        Only runs that are completed or failed.
    batch
        How many runs one transaction deletes.
    dry_run
        Show what would be deleted, and delete nothing.
    """
    import anyio

    from pgflow_prefect.database.pruning import ANY_AGE
    from pgflow_prefect.database.run_names import parse_run_name
    from pgflow_prefect.models import Status

    _check_choice(older_than, any_age, run, workflow, status)
    chosen = Choice(
        read_age(older_than) if older_than is not None else ANY_AGE,
        tuple(workflow) if workflow else None,
        Status(status) if status else None,
        batch,
        tuple(map(parse_run_name, run)) if run else None,
    )
    settings = make_settings(dsn)
    if dry_run:
        _print_counts(anyio.run(_count, settings, chosen), json=json)
        return
    pruned = Pruned()
    try:
        anyio.run(_prune, settings, chosen, pruned, out.is_terminal and not json)
    except KeyboardInterrupt:
        err.print(f"{_describe(pruned)} before the interruption", markup=False)
        raise
    if json:
        print_json({"runs": pruned.runs, "definitions": pruned.definitions})
    else:
        out.print(_describe(pruned))


def _check_choice(
    older_than: str | None, any_age: bool, run: list[str] | None, workflow: list[str] | None, status: str | None
) -> None:
    if sum((older_than is not None, any_age, bool(run))) != 1:
        raise UsageError("which runs? give one of --older-than 30d, --workflow NAME --any-age and --run RUN_ID")
    if any_age and not workflow:
        raise UsageError("--any-age goes with --workflow: it deletes all runs of these workflows that have ended")
    if run and (workflow or status):
        raise UsageError("--run names the run: leave out --workflow and --status")


def _describe(pruned: Pruned) -> str:
    snapshots = f", and {_count_of(pruned.definitions, 'former definition')}" if pruned.definitions else ""
    return f"deleted {_count_of(pruned.runs, 'run')}{snapshots}"


def _count_of(number: int, what: str) -> str:
    return f"{number} {what}{'s'[: number != 1]}"


def _print_counts(found: list[PrunableRuns], *, json: bool) -> None:
    if json:
        print_json(found)
    elif found:
        rows = [(each.workflow_slug, each.status, str(each.runs), str(each.kept)) for each in found]
        print_table(("workflow", "status", "to delete", "kept a day longer"), rows)
    else:
        out.print("nothing is that old")


async def _count(settings: Settings, chosen: Choice) -> list[PrunableRuns]:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        if chosen.runs is not None:
            return [await _count_run(store, name) for name in chosen.runs]
        await _check_workflows(store, chosen)
        return await store.count_prunable(chosen.older_than, chosen.workflows, chosen.status)


async def _count_run(store: Store, name: RunName) -> PrunableRuns:
    from pgflow_prefect.database.pruning import PrunableRuns
    from pgflow_prefect.models import Status

    run = await store.read_run(await store.find_run_id(name))
    goes = run.status is not Status.PENDING
    return PrunableRuns(workflow_slug=run.workflow_slug, status=run.status, runs=int(goes), kept=int(not goes))


async def _prune(settings: Settings, chosen: Choice, pruned: Pruned, live: bool) -> None:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        if chosen.runs is not None:
            for run_id in [await store.find_run_id(name) for name in chosen.runs]:
                await store.prune_run(run_id)
                pruned.runs += 1
            return
        await _check_workflows(store, chosen)
        total = 0
        if live:
            counted = await store.count_prunable(chosen.older_than, chosen.workflows, chosen.status)
            total = sum(each.runs for each in counted)
        with show_progress(live, total) as progress:
            found = chosen.batch
            while found >= chosen.batch:
                found = await store.prune_runs(
                    chosen.older_than, at_most=chosen.batch, workflow_slugs=chosen.workflows, status=chosen.status
                )
                pruned.runs += found
                progress.update(progress.task_ids[0], completed=pruned.runs)
        pruned.definitions = await store.prune_definitions(chosen.workflows)


async def _check_workflows(store: Store, chosen: Choice) -> None:
    for slug in chosen.workflows or ():
        await store.load_definition(slug)  # a mistyped name is an error


@contextmanager
def show_progress(live: bool, total: int | None) -> Iterator[Progress]:
    """Show on a terminal how many runs are done, of so many if that is known."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(complete_style="cyan"), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn())
    with Progress(*columns, console=out, disable=not live, transient=True) as progress:
        progress.add_task("runs", total=total)
        yield progress
