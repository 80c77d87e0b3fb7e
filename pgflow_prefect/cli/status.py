"""`status`."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

from cyclopts import Parameter

from pgflow_prefect.cli.console import format_duration, make_table, out, print_json, print_table, shorten
from pgflow_prefect.cli.options import AsJson, Dsn, make_settings
from pgflow_prefect.errors import DatabaseUnavailableError
from pgflow_prefect.models import Held, Run, Status, StepState

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pgflow_prefect.database.store import Store
    from pgflow_prefect.settings import Settings

COLUMNS = ("step", "status", "in Prefect", "attempts", "took", "done by", "result or error")

_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 0.25, 2.0  # seconds between two looks; the longer nothing changes, the longer


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        run: the run.
        states: the steps that have started, by slug.
        order: the slugs of all steps.
    """

    run: Run
    states: dict[str, StepState]
    order: list[str]

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will change: a failed run's claimed steps may still finish."""
        working = any(state.status is Status.PENDING and state.started_at for state in self.states.values())
        lives = self.run.held is Held.LEASED
        return self.run.status is not Status.PENDING and not (working and lives)

    def describe(self) -> list[str]:
        """Return what there is to say of the run as a whole, a line each."""
        run = self.run
        lines = [f"run {run.id} of workflow {run.workflow_slug!r}: {run.status}"]
        if run.error_message:
            lines.append(run.error_message)
        if run.status is Status.PENDING:
            lines.append(_describe_owner(run))
        if run.recoveries:
            lines.append(f"taken over {_count(run.recoveries, 'time')} in a row without a further step completing")
        if run.stale_writes:
            lines.append(f"refused {_count(run.stale_writes, 'write')} of former owners")
        return lines

    def pick(self, room: int) -> list[str]:
        """Return so many steps at most, in their order: those that failed, are worked on, or ended last."""
        chosen = frozenset(sorted(self.order, key=self._rank)[:room])
        return [slug for slug in self.order if slug in chosen]

    def _rank(self, slug: str) -> tuple[int, float]:
        state = self.states.get(slug)
        if state is None:
            return 4, 0.0
        if state.status is Status.COMPLETED:
            return 3, -state.finished_at.timestamp() if state.finished_at else 0.0
        return (0 if state.status is Status.FAILED else 1 if state.started_at else 2), 0.0

    def count(self) -> str:
        """Return how far the run is."""
        done = sum(state.status is Status.COMPLETED for state in self.states.values())
        return f"{done} of {_count(len(self.order), 'step')} completed"

    def rows(self, slugs: Iterable[str] | None = None) -> Iterator[tuple[str, ...]]:
        """Yield a row for each step, or for each of these, those that wait for others too."""
        for slug in self.order if slugs is None else slugs:
            if (state := self.states.get(slug)) is None:
                yield (slug, "waiting", "", "", "", "", "")
                continue
            took = format_duration(state.started_at, state.finished_at) if state.started_at else ""
            result = "" if state.step_result is None else jsonlib.dumps(state.step_result, ensure_ascii=False)
            note = shorten(state.error_message or result)
            yield (slug, state.status, state.task_state or "", str(state.attempts), took, state.handler or "", note)


def status(
    run_id: UUID,
    /,
    *,
    watch: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    json: AsJson = False,
    dsn: Dsn = None,
) -> int:
    """Show a run and its steps, those that wait for others too, and who executes it.

    Example: `pgflow-prefect status 0b0e3a4e-6a5c-4d35-9c55-0a7f7f3a2c11 --watch`

    Parameters
    ----------
    run_id
        The run, as `runs` shows it.
    watch
        Go on until the run has ended; the exit code is then 1 if it has failed.
    """
    import anyio

    return anyio.run(_show, make_settings(dsn), run_id, watch, json)


async def _show(settings: Settings, run_id: UUID, watch: bool, json: bool) -> int:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        found = await _read(store, run_id)
        if watch and not json:
            found = await _watch(store, found)
        elif watch:
            found = await _await_end(store, found)
    if json:
        waiting = [slug for slug in found.order if slug not in found.states]
        print_json({"run": found.run, "steps": list(found.states.values()), "waiting": waiting})
    elif not (watch and out.is_terminal):  # there it is on the screen
        for line in found.describe():
            out.print(line, markup=False)
        print_table(COLUMNS, found.rows())
    return int(watch and found.run.status is Status.FAILED)


async def _watch(store: Store, found: Snapshot) -> Snapshot:
    with _make_view(found) as view:
        return await _await_end(store, found, view)


async def _await_end(store: Store, found: Snapshot, view: _View | None = None) -> Snapshot:
    import anyio

    interval = _SHORTEST_INTERVAL
    while not found.has_ended:
        await anyio.sleep(interval)
        try:
            latest = await _read(store, found.run.id, found.order)
        except DatabaseUnavailableError:  # it may come back; whoever watches can end it
            await store.drop_broken_connections()
            latest = found
        interval = _SHORTEST_INTERVAL if latest != found else min(interval * 1.5, _LONGEST_INTERVAL)
        if view is not None:
            view.update(found, latest)
        found = latest
    return found


async def _read(store: Store, run_id: UUID, order: list[str] | None = None) -> Snapshot:
    from pgflow_prefect.graph import build_graph, sort_steps

    run = await store.read_run(run_id)
    states = {state.step_slug: state for state in await store.list_step_states(run_id)}
    if order is None:  # a run keeps its definition
        order = sort_steps(build_graph(await store.load_run_definition(run_id)))
    return Snapshot(run, states, order)


class _View:
    """A line for each change, where nobody draws."""

    def update(self, before: Snapshot, after: Snapshot) -> None:
        for slug, state in after.states.items():
            shown = state.task_state or state.status
            former = before.states.get(slug)
            if former is None or (former.task_state or former.status) != shown:
                sys.stdout.write(f"{slug}\t{shown}\n")
        sys.stdout.flush()


class _LiveView(_View):
    """The table, drawn anew; as much of it as the terminal has room for, and at the end all of it."""

    def __init__(self, found: Snapshot) -> None:
        from rich.live import Live

        self.live = Live(_draw(found), console=out, auto_refresh=False)

    def update(self, before: Snapshot, after: Snapshot) -> None:
        self.live.update(_draw(after), refresh=True)


@contextmanager
def _make_view(found: Snapshot) -> Iterator[_View]:
    if not out.is_terminal:
        yield _View()
        return
    view = _LiveView(found)
    with view.live:
        yield view


def _draw(found: Snapshot) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    lines = [*found.describe(), found.count()]
    room = max(out.height - len(lines) - 3, 1)  # under the table's head, over its last line and the cursor
    if found.has_ended or len(found.order) <= room:
        return Group(*map(Text, lines), make_table(COLUMNS, found.rows()))
    left_out = f"… {_count(len(found.order) - room, 'more step')}"
    return Group(*map(Text, lines), make_table(COLUMNS, found.rows(found.pick(room))), Text(left_out, "dim"))


def _describe_owner(run: Run) -> str:
    if run.held is Held.LEASED:
        return f"held by {run.held_by}"
    if run.held is Held.QUEUED:
        return "waits in Prefect for a worker"
    if run.held is Held.EXPIRED:
        return f"{run.held_by} has not been heard of: a worker or a bridge takes it over"
    return "nobody holds it: a worker or a bridge takes it, or `pgflow-prefect run --resume`"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s'[: number != 1]}"
