"""`open`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pgflow_prefect.cli.console import err, out, print_json
from pgflow_prefect.cli.options import AsJson, Dsn, RunId, make_settings
from pgflow_prefect.cli.shown import explain_no_flow_run, list_steps
from pgflow_prefect.errors import PgflowPrefectError, UsageError

if TYPE_CHECKING:
    from uuid import UUID

    from pgflow_prefect.database.run_names import RunName
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.settings import Settings

Step = Annotated[str | None, Parameter(help="Open the page of this step's task run.", show_default=False)]


def open_(
    run_id: RunId,
    step: Step = None,
    /,
    *,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Open a run's page in Prefect's UI.

    The command prints the page's address. On a terminal, it also opens the page in your browser.

    Example: `pgflow-prefect open latest`
    """
    import anyio

    from pgflow_prefect.database.run_names import parse_run_name

    page = anyio.run(_find_page, make_settings(dsn), parse_run_name(run_id), step)
    if json:
        print_json({"url": page})
        return
    out.print(page, markup=False)
    if out.is_terminal and not _open(page):
        err.print("no browser was found: open the address yourself", markup=False)


async def _find_page(settings: Settings, name: RunName, step: str | None) -> str:
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.prefect_api.pages import find_flow_run_page, find_task_run_page

    async with open_store(settings, size=1, only_reads=True) as store:
        run_id = await store.find_run_id(name)
        run = await store.read_run(run_id)
        await list_steps(store, run_id, step)
        if run.flow_run_id is None:
            raise await explain_no_flow_run(store, run)
        task_runs = await _find_task_runs(store, run_id, run.flow_run_id)
    if step is not None and step not in task_runs:
        raise PgflowPrefectError(f"step {step!r} of run {run_id} has no task run yet: it was never claimed")
    page = find_flow_run_page(run.flow_run_id) if step is None else find_task_run_page(task_runs[step])
    if not page:
        raise UsageError("the address of Prefect's UI is not known: set PREFECT_API_URL or PREFECT_UI_URL")
    return page


async def _find_task_runs(store: Store, run_id: UUID, flow_run_id: UUID) -> dict[str, UUID]:
    """Return the task runs of the steps that were begun, by step slug."""
    from pgflow_prefect.models import TaskKey
    from pgflow_prefect.prefect_api.ids import find_task_run_id

    if store.implementation.executes:
        return await store.list_task_runs(run_id)
    # Where pgflow's own workers execute the run, no claim has noted it.
    begun = [each.step_slug for each in await store.list_step_states(run_id)]
    return {slug: find_task_run_id(flow_run_id, TaskKey(slug)) for slug in begun}


def _open(page: str) -> bool:
    """Open a page in the user's browser; tell whether there is one."""
    import webbrowser

    return webbrowser.open(page)
