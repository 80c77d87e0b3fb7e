"""`logs`."""

from __future__ import annotations

import json as jsonlib
import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pgflow_prefect.cli.console import out, print_cells
from pgflow_prefect.cli.options import Dsn, Flag, RunId, make_settings
from pgflow_prefect.cli.shown import explain_no_flow_run, list_steps
from pgflow_prefect.models import Status
from pgflow_prefect.wording import clean, clean_block, escape_json

if TYPE_CHECKING:
    from datetime import timedelta
    from uuid import UUID

    from pgflow_prefect.database.run_names import RunName
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.prefect_api.run_logs import LogLine, RunLogs
    from pgflow_prefect.settings import Settings

_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 0.5, 3.0  # seconds between two looks; they grow while nothing is logged
_STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}

Step = Annotated[str | None, Parameter(help="Show only this step's lines.", show_default=False)]
JsonLines = Annotated[
    bool, Parameter(name="--json", negative="", show_default=False, help="Print an object of JSON for each line.")
]


def logs(
    run_id: RunId,
    step: Step = None,
    /,
    *,
    follow: Annotated[bool, Flag] = False,
    json: JsonLines = False,
    dsn: Dsn = None,
) -> int:
    """Show what a run's handlers and its flow run have logged.

    The lines are Prefect's, of all processes that have executed the run. Prefect gets them some seconds late.

    Example: `pgflow-prefect logs latest --follow`

    Parameters
    ----------
    follow
        Show further lines until the run ends. The exit code is then 1 if the run failed.
    """
    import anyio

    from pgflow_prefect.database.run_names import parse_run_name

    return anyio.run(_show, make_settings(dsn), parse_run_name(run_id), step, follow, json)


async def _show(settings: Settings, name: RunName, step: str | None, follow: bool, json: bool) -> int:
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.prefect_api.client import connect_to_prefect
    from pgflow_prefect.prefect_api.run_logs import RunLogs, find_log_delay

    async with open_store(settings, size=1) as store:
        run_id = await store.find_run_id(name)
        run = await store.read_run(run_id)
        steps = await list_steps(store, run_id, step)
        if not follow and not await store.list_flow_runs(run_id):
            raise await explain_no_flow_run(store, run)
        async with connect_to_prefect() as client:
            lines = RunLogs(client, steps, step)
            if follow:
                return await _follow(store, run_id, lines, find_log_delay(), json=json)
            await _print_new(store, run_id, lines, json=json)
    return 0


async def _follow(store: Store, run_id: UUID, lines: RunLogs, delay: timedelta, *, json: bool) -> int:
    """Print lines until the run has ended, and its last ones have had time to reach Prefect."""
    import anyio

    from pgflow_prefect.waiting import Pauses

    pauses = Pauses(_SHORTEST_INTERVAL, _LONGEST_INTERVAL, factor=1.5)
    last_look: float | None = None
    while True:
        run = await store.read_run(run_id)
        is_last = last_look is not None and anyio.current_time() >= last_look
        if await _print_new(store, run_id, lines, json=json):
            pauses.reset()
        if is_last:
            return int(run.status is Status.FAILED)
        if run.status is Status.PENDING:
            last_look = None  # it was reopened
        elif last_look is None:
            last_look = anyio.current_time() + delay.total_seconds()
        await anyio.sleep(pauses.draw())


async def _print_new(store: Store, run_id: UUID, lines: RunLogs, *, json: bool) -> bool:
    """Print the lines that are new; tell whether there were any."""
    printed = False
    async for line in lines.read_new(await store.list_flow_runs(run_id), await store.list_task_runs(run_id)):
        _print(line, json=json)
        printed = True
    sys.stdout.flush()
    return printed


def _print(line: LogLine, *, json: bool) -> None:
    if json:
        shown = {"time": line.time.isoformat(), "level": line.level, "step": line.step, "message": line.message}
        sys.stdout.write(escape_json(jsonlib.dumps(shown, ensure_ascii=False)) + "\n")
    elif not out.is_terminal:
        print_cells((line.time.isoformat(), line.level, line.step or "-", line.message))
    else:
        from rich.text import Text

        place = f"{clean(line.step)}: " if line.step else ""
        out.print(
            Text.assemble(
                (f"{line.time.astimezone():%Y-%m-%d %H:%M:%S} ", "dim"),
                (f"{line.level} ", _STYLES.get(line.level, "")),
                (place, "bold"),
                clean_block(line.message),
            ),
            soft_wrap=True,
        )
