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

    from pgflow_prefect.database.pruning import PrunableRuns, Swept
    from pgflow_prefect.database.run_names import RunName
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.execution.process.storages import BlockStorage
    from pgflow_prefect.models import Status
    from pgflow_prefect.settings import Settings

_LONGEST = timedelta(days=36525)  # a century: the result of the subtraction must be a valid date


@dataclass(frozen=True)
class Choice:
    """Which runs to delete.

    Attributes:
        older_than: the time since they ended; None to delete no run.
        workflows: only runs of these workflows, or None for all.
        status: completed or failed, or None for both.
        batch: how many runs one transaction deletes.
        runs: only these runs, of any age, or None.
    """

    older_than: timedelta | None
    workflows: tuple[str, ...] | None
    status: Status | None
    batch: int
    runs: tuple[RunName, ...] | None = None


@dataclass
class Pruned:
    """What was deleted so far."""

    runs: int = 0
    definitions: int = 0
    swept: Swept | None = None
    backfills: int = 0


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
    results: Annotated[bool, Flag] = False,
    handlers: Annotated[list[str] | None, Parameter(negative="", consume_multiple=True)] = None,
    batch: Annotated[int, Parameter(validator=Number(gte=1, lte=100_000))] = 1000,
    dry_run: Annotated[bool, Flag] = False,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Delete runs that ended long ago, or the ended runs of a workflow, or one run, with all their rows.

    Pending runs are never deleted. A run that a process still holds, or whose end Prefect does not show yet, stays a
    day longer, unless you ask for any age. Snapshots of former definitions are deleted with the last run that refers
    to them, and so are backfills. Prefect's flow runs stay. You can run several prunes at once. Ctrl-C stops after the
    present batch.

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
    results
        Delete stored results, too, whose runs are gone: in the storages of PGFLOW_RESULT_STORAGE and of the handlers.
    handlers
        The files or modules of the handlers that name storages. The default is flows/*.py.
    batch
        How many runs one transaction deletes.
    dry_run
        Show what would be deleted, and delete nothing.
    """
    import anyio

    from pgflow_prefect.database.pruning import ANY_AGE, Swept
    from pgflow_prefect.database.run_names import parse_run_name
    from pgflow_prefect.models import Status

    _check_choice(
        older_than=older_than,
        any_age=any_age,
        run=run,
        workflow=workflow,
        status=status,
        results=results,
        handlers=handlers,
    )
    chosen = Choice(
        read_age(older_than) if older_than is not None else ANY_AGE if any_age or run else None,
        tuple(workflow) if workflow else None,
        Status(status) if status else None,
        batch,
        tuple(map(parse_run_name, run)) if run else None,
    )
    settings = make_settings(dsn)
    storages = _find_storages(settings, handlers) if results else []
    pruned = Pruned(swept=Swept() if results else None)
    if dry_run:
        counted = anyio.run(_count, settings, chosen, storages, pruned.swept)
        _print_counts(counted, pruned.swept, json=json)
        return
    try:
        anyio.run(_prune, settings, chosen, storages, pruned, out.is_terminal and not json)
    except KeyboardInterrupt:
        err.print(f"{_describe(pruned)} before the interruption", markup=False)
        raise
    if json:
        stored = {} if pruned.swept is None else {"results": pruned.swept.objects}
        print_json({"runs": pruned.runs, "definitions": pruned.definitions, **stored})
    else:
        out.print(_describe(pruned))


def _check_choice(
    *,
    older_than: str | None,
    any_age: bool,
    run: list[str] | None,
    workflow: list[str] | None,
    status: str | None,
    results: bool,
    handlers: list[str] | None,
) -> None:
    named = sum((older_than is not None, any_age, bool(run)))
    if named > 1 or (named == 0 and (not results or workflow or status)):
        raise UsageError("which runs? give one of --older-than 30d, --workflow NAME --any-age and --run RUN_ID")
    if handlers and not results:
        raise UsageError("--handlers names the storages of results: add --results")
    if any_age and not workflow:
        raise UsageError("--any-age goes with --workflow: it deletes all runs of these workflows that have ended")
    if run and (workflow or status):
        raise UsageError("--run names the run: leave out --workflow and --status")


def _describe(pruned: Pruned) -> str:
    parts = [_count_of(pruned.runs, "run")]
    if pruned.definitions:
        parts.append(_count_of(pruned.definitions, "former definition"))
    if pruned.backfills:
        parts.append(_count_of(pruned.backfills, "backfill"))
    if pruned.swept is not None:
        parts.append(f"{_count_of(pruned.swept.objects, 'stored result')} of runs that are gone")
    return f"deleted {', and '.join(parts)}"


def _count_of(number: int, what: str) -> str:
    return f"{number} {what}{'s'[: number != 1]}"


def _print_counts(found: list[PrunableRuns], swept: Swept | None, *, json: bool) -> None:
    if json:
        print_json(found if swept is None else {"runs": found, "runs_gone_with_results": swept.runs})
        return
    if swept is not None:
        out.print(f"{_count_of(swept.runs, 'run')} that {'is' if swept.runs == 1 else 'are'} gone left stored results")
    if found:
        rows = [(each.workflow_slug, each.status, str(each.runs), str(each.kept)) for each in found]
        print_table(("workflow", "status", "to delete", "kept a day longer"), rows)
    elif swept is None:
        out.print("nothing is that old")


async def _count(
    settings: Settings, chosen: Choice, storages: list[BlockStorage], swept: Swept | None
) -> list[PrunableRuns]:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        if swept is not None:
            await _sweep(store, storages, swept, live=False, dry_run=True)
        if chosen.older_than is None:
            return []
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


async def _prune(settings: Settings, chosen: Choice, storages: list[BlockStorage], pruned: Pruned, live: bool) -> None:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        if pruned.swept is not None:
            await store.read_installation()  # refuses a copy before any of its runs is deleted
        if chosen.runs is not None:
            for run_id in [await store.find_run_id(name) for name in chosen.runs]:
                await store.prune_run(run_id)
                pruned.runs += 1
        elif chosen.older_than is not None:
            await _prune_old(store, chosen, chosen.older_than, pruned, live)
        if pruned.swept is not None:
            await _sweep(store, storages, pruned.swept, live=live)


async def _prune_old(store: Store, chosen: Choice, older_than: timedelta, pruned: Pruned, live: bool) -> None:
    await _check_workflows(store, chosen)
    total = 0
    if live:
        counted = await store.count_prunable(older_than, chosen.workflows, chosen.status)
        total = sum(each.runs for each in counted)
    with show_progress(live, total) as progress:
        found = chosen.batch
        while found >= chosen.batch:
            found = await store.prune_runs(
                older_than, at_most=chosen.batch, workflow_slugs=chosen.workflows, status=chosen.status
            )
            pruned.runs += found
            progress.update(progress.task_ids[0], completed=pruned.runs)
    pruned.definitions = await store.prune_definitions(chosen.workflows)
    if chosen.status is None:
        pruned.backfills = await store.prune_backfills(older_than, chosen.workflows)


async def _sweep(
    store: Store, storages: list[BlockStorage], swept: Swept, *, live: bool, dry_run: bool = False
) -> None:
    from pgflow_prefect.services.stored_results import sweep

    with show_progress(live, None) as progress:

        def tell() -> None:
            progress.update(progress.task_ids[0], completed=swept.runs)

        for storage in storages:
            await sweep(store, storage, swept, tell, dry_run=dry_run)


def _find_storages(settings: Settings, handlers: list[str] | None) -> list[BlockStorage]:
    """Return the storages that settings and files of handlers name.

    Raises:
        UsageError: there is none, or a file can't be loaded.
    """
    from pgflow_prefect.deployment.handler_files import DIRECTORY, load_directory, load_workflows
    from pgflow_prefect.services.stored_results import find_storages

    loaded = load_workflows(handlers) if handlers else load_directory()
    if storages := find_storages((workflow for workflow, _ in loaded.values()), settings):
        return storages
    where = ", ".join(handlers) if handlers else f"{DIRECTORY}/*.py"
    raise UsageError(
        f"--results: neither PGFLOW_RESULT_STORAGE nor {where} names a storage. Set the variable, or name the files by "
        "--handlers"
    )


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
