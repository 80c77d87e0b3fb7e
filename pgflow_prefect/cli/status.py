"""`status`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from pgflow_prefect.cli.console import out, print_cells, print_json, print_table
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, RunId, make_settings
from pgflow_prefect.cli.snapshot import COLUMNS, Snapshot, count
from pgflow_prefect.errors import DatabaseUnavailableError
from pgflow_prefect.models import Held, Run, Status

if TYPE_CHECKING:
    from uuid import UUID

    from rich.console import RenderableType

    from pgflow_prefect.database.run_names import RunName
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.models import Enabled
    from pgflow_prefect.settings import Settings

_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 0.25, 2.0  # seconds between two looks; they grow while nothing changes

_MOST_CHILDREN = 10
"""The children that it names."""


def status(
    run_id: RunId,
    /,
    *,
    watch: Annotated[bool, Flag] = False,
    json: AsJson = False,
    dsn: Dsn = None,
) -> int:
    """Show a run, all its steps, and the process that executes it.

    A step's status is that of its row. If a plainer word exists, it comes first: `running (pending)`.

    Example: `pgflow-prefect status latest --watch`

    Parameters
    ----------
    watch
        Follow the run until it ends. The exit code is then 1 if the run failed.
    """
    import anyio

    from pgflow_prefect.database.run_names import parse_run_name

    return anyio.run(_show, make_settings(dsn), parse_run_name(run_id), watch, json)


async def _show(settings: Settings, name: RunName, watch: bool, json: bool) -> int:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1, only_reads=True) as store:
        found = await _read(store, await store.find_run_id(name), with_payload=json)
        if watch and not json:
            found = await _watch(store, found)
        elif watch:
            found = await _await_end(store, found, with_payload=json)
    if json:
        waiting = [slug for slug in found.order if slug not in found.states]
        started = [found.states[slug] for slug in found.order if slug in found.states]
        print_json({"run": found.run, "steps": started, "waiting": waiting, "relatives": [*found.relatives]})
    elif not (watch and out.is_terminal):  # it is on the screen already
        for line in found.describe():
            out.print(line, markup=False)
        if out.is_terminal:
            out.print(found.make_table(out.width))
        else:
            print_table(COLUMNS, found.rows())
    return int(watch and found.run.status is Status.FAILED)


async def _watch(store: Store, found: Snapshot) -> Snapshot:
    with _make_view(found) as view:
        return await _await_end(store, found, view)


async def _await_end(
    store: Store, found: Snapshot, view: _View | None = None, *, with_payload: bool = False
) -> Snapshot:
    import anyio

    from pgflow_prefect.waiting import Pauses

    intervals = Pauses(_SHORTEST_INTERVAL, _LONGEST_INTERVAL, factor=1.5)
    while not found.has_ended:
        await anyio.sleep(intervals.draw())
        try:
            latest = await _read(store, found.run.id, found.order, with_payload=with_payload)
        except DatabaseUnavailableError:  # the database may come back, and the user can stop waiting
            await store.drop_broken_connections()
            latest = found
        if latest != found:
            intervals.reset()
        if view is not None:
            view.update(found, latest)
        found = latest
    return found


async def _read(store: Store, run_id: UUID, order: list[str] | None = None, *, with_payload: bool = False) -> Snapshot:
    from pgflow_prefect.definitions.graph import build_graph, sort_steps

    [run] = await store.mark_unshown([await store.read_run(run_id, with_payload=with_payload)])
    states = {state.step_slug: state for state in await store.list_step_states(run_id)}
    if order is None:  # a run keeps its definition
        order = sort_steps(build_graph(await store.load_run_definition(run_id)))
    enabled = await _find_enabled(store, run)
    has_dead_holder = run.held is Held.LEASED and await store.has_dead_holder(run_id)
    executes = store.implementation.executes or run.workflow_slug in await store.list_moved_flows()
    relatives = tuple(await store.list_relatives(run_id, _MOST_CHILDREN)) if executes else ()
    return Snapshot(
        run, states, order, enabled, executes=executes, has_dead_holder=has_dead_holder, relatives=relatives
    )


async def _find_enabled(store: Store, run: Run) -> Enabled | None:
    """Return whether the workflow of a run without an owner is enabled."""
    if run.status is not Status.PENDING or run.held in {Held.LEASED, Held.QUEUED}:
        return None
    return (await store.list_enabled()).get(run.workflow_slug)


class _View:
    """A line for each change, where nothing is drawn."""

    def update(self, before: Snapshot, after: Snapshot) -> None:
        for slug, state in after.states.items():
            shown = state.task_state or after.describe_word(slug)
            former = before.states.get(slug)
            if former is None or (former.task_state or before.describe_word(slug)) != shown:
                print_cells((slug, shown))
        sys.stdout.flush()


class _LiveView(_View):
    """The table, drawn again at each change: as much as fits into the terminal, and all of it at the end."""

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

    if found.has_ended:
        return Group(*map(Text, [*found.describe(), found.count()]), found.make_table(out.width))
    # One line each, so that rich knows the height of what it draws over.
    lines = [Text(line, no_wrap=True, overflow="ellipsis") for line in [*found.describe(), found.count()]]
    room = max(out.height - len(lines) - 3, 1)  # under the table's head, over its last line and the cursor
    if len(found.order) <= room:
        return Group(*lines, found.make_table(out.width))
    left_out = f"… {count(len(found.order) - room, 'more step')}"
    return Group(*lines, found.make_table(out.width, found.pick(room)), Text(left_out, "dim"))
