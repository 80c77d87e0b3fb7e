"""`record`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from pgflow_prefect.cli.console import err, out, print_error, print_json, print_table
from pgflow_prefect.cli.deploy import check_server
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, make_settings
from pgflow_prefect.cli.prune import show_progress
from pgflow_prefect.cli.runs import read_since
from pgflow_prefect.errors import PgflowPrefectError, UsageError
from pgflow_prefect.models import Ending, Status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    from pgflow_prefect.database.run_names import RunName
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.settings import Settings

_PAGE = 100  # runs that are read together


@dataclass(frozen=True)
class Choice:
    """Which runs to show.

    Attributes:
        runs: only these, or None.
        since: runs that ended since then; None with `runs`.
        workflows: only runs of these workflows, or None for all.
        status: completed, failed or cancelled, or None for all. Failed runs include cancelled ones.
    """

    runs: tuple[RunName, ...] | None
    since: datetime | None
    workflows: tuple[str, ...] | None
    status: Status | Ending | None

    @property
    def statuses(self) -> list[tuple[Status, Ending | None]]:
        """The statuses and endings of the chosen runs."""
        if self.status is Ending.CANCELLED:
            return [(Status.FAILED, Ending.CANCELLED)]
        if self.status is not None:
            return [(Status(self.status), None)]
        return [(Status.FAILED, None), (Status.COMPLETED, None)]


@dataclass
class Progress:
    """What was done so far.

    Attributes:
        shown: how many runs are shown now, and were not before.
        refused: why a run is not shown, by id.
    """

    shown: int = 0
    refused: dict[UUID, PgflowPrefectError] = field(default_factory=dict)


def record(
    *runs: str,
    since: str | None = None,
    workflow: Annotated[list[str] | None, Parameter(negative="", consume_multiple=True)] = None,
    status: Literal["completed", "failed", "cancelled"] | None = None,
    dry_run: Annotated[bool, Flag] = False,
    json: AsJson = False,
    dsn: Dsn = None,
) -> int:
    """Show ended runs in Prefect that it was never told of: those of workflows that are recorded later.

    Past runs of Airflow that were imported are among them: they have flow runs without a deployment.

    Their task runs and artifacts have the times of the rows. Prefect dates the flow runs itself: now. Automations react
    to them as to any flow run. A run that is shown already is left alone, so you can repeat the command, and run
    several at once. Ctrl-C stops after the present runs. The exit code is 1 if a run could not be shown.

    Example: `pgflow-prefect record --since 7d --status failed`

    Parameters
    ----------
    runs
        Only these runs: their ids, unique beginnings of their ids, or latest.
    since
        Runs that ended since then: 30m, 2h, 7d, or a date and time.
    workflow
        Only runs of these workflows.
    status
        Only runs that are completed, failed or cancelled. The failed runs include the cancelled ones.
    dry_run
        Show how many runs would be shown, and show none.
    """
    import anyio

    from pgflow_prefect.database.run_names import parse_run_name

    if bool(runs) == (since is not None):
        raise UsageError("which runs? give their ids, or --since 7d")
    if runs and (workflow or status):
        raise UsageError("the ids name the runs: leave out --workflow and --status")
    chosen = Choice(
        tuple(map(parse_run_name, runs)) if runs else None,
        read_since(since) if since is not None else None,
        tuple(workflow) if workflow else None,
        None if status is None else Ending.CANCELLED if status == "cancelled" else Status(status),
    )
    settings = make_settings(dsn)
    if dry_run:
        _print_counts(anyio.run(_count, settings, chosen), json=json)
        return 0
    check_server()
    done = Progress()
    try:
        anyio.run(_record, settings, chosen, done, out.is_terminal and not json)
    except KeyboardInterrupt:
        err.print(f"{_describe(done)} before the interruption", markup=False)
        raise
    return _conclude(done, json=json)


def _conclude(done: Progress, *, json: bool) -> int:
    if json:
        refused = [{"run": str(run_id), "error": str(error)} for run_id, error in done.refused.items()]
        print_json({"shown": done.shown, "refused": refused})
        return int(bool(refused))
    out.print(_describe(done))
    for error, count in Counter(map(str, done.refused.values())).items():
        print_error(error, hint=f"so {_count_of(count)} could not be shown", code=1)
    return int(bool(done.refused))


def _describe(done: Progress) -> str:
    return f"shown in Prefect: {_count_of(done.shown)}"


def _count_of(number: int) -> str:
    return f"{number} run{'s'[: number != 1]}"


def _print_counts(found: Counter[tuple[str, str]], *, json: bool) -> None:
    rows = [(workflow, status, number) for (workflow, status), number in sorted(found.items())]
    if json:
        print_json([dict(zip(("workflow", "status", "runs"), row, strict=True)) for row in rows])
    elif rows:
        print_table(("workflow", "status", "to show"), [(*names, str(number)) for *names, number in rows])
    else:
        out.print("Prefect was told of all these runs")


async def _count(settings: Settings, chosen: Choice) -> Counter[tuple[str, str]]:
    from pgflow_prefect.database.store import open_store

    found: Counter[tuple[str, str]] = Counter()
    async with open_store(settings, size=1, only_reads=True) as store:
        async for run_ids in _find(store, chosen):
            for run in await store.read_unrecorded(run_ids):
                found[run.workflow_slug, run.ended_as or run.status] += 1
    return found


async def _find(store: Store, chosen: Choice) -> AsyncIterator[list[UUID]]:
    """Yield the chosen runs that Prefect was not told of, in portions, those of each workflow in their order."""
    if chosen.runs is not None:
        found = [await store.find_run_id(name) for name in chosen.runs]
        for start in range(0, len(found), _PAGE):
            some = found[start : start + _PAGE]
            await _check_ended(store, some)
            yield some
        return
    assert chosen.since is not None
    for slug in chosen.workflows or ():
        await store.load_definition(slug)  # a mistyped name is an error
    for slug in chosen.workflows or await store.list_slugs():
        for status, ended_as in chosen.statuses:
            after: tuple[datetime, UUID] | None = None
            while page := await store.list_unrecorded(
                slug, status, ended_as, since=chosen.since, after=after, limit=_PAGE
            ):
                after = page[-1]
                yield [run_id for _, run_id in page]


async def _check_ended(store: Store, run_ids: list[UUID]) -> None:
    """Refuse a run that has not ended: it would be shown while it is executed, if it takes long.

    Raises:
        UsageError: one of them is pending, or does not exist.
    """
    for run_id in run_ids:
        if (await store.read_run(run_id)).status is Status.PENDING:
            raise UsageError(f"run {run_id} has not ended: it can be recorded after its end")


async def _record(settings: Settings, chosen: Choice, done: Progress, live: bool) -> None:
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.prefect_api.client import connect_to_prefect
    from pgflow_prefect.services.flow_recorder import open_flow_recorder
    from pgflow_prefect.services.recording import open_recorder

    async with open_store(settings, size=2, only_reads=True) as store, connect_to_prefect() as client:
        own = await open_recorder(settings, store, client) if store.implementation.executes else None
        others = await open_flow_recorder(settings, store, client)
        with show_progress(live, None) as progress:
            async for run_ids in _find(store, chosen):
                elsewhere = {*run_ids} if own is None else await store.find_executed_elsewhere(run_ids)
                for recorder, some in (
                    (own, [each for each in run_ids if each not in elsewhere]),
                    (others, [each for each in run_ids if each in elsewhere]),
                ):
                    if recorder is None or not some:
                        continue
                    recorded = await recorder.record(some)
                    done.shown += len(recorded.shown)
                    done.refused |= recorded.refused
                progress.update(progress.task_ids[0], completed=done.shown)
