"""`cancel`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgflow_prefect.cli.console import err, out, print_json
from pgflow_prefect.cli.options import AsJson, Dsn, RunId, make_settings
from pgflow_prefect.errors import PgflowPrefectError, RunNotPendingError

if TYPE_CHECKING:
    from pgflow_prefect.database.run_names import RunName
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.models import Run
    from pgflow_prefect.settings import Settings


def cancel(run_id: RunId, /, *, reason: str | None = None, json: AsJson = False, dsn: Dsn = None) -> None:
    """End a run and its steps as failed, and its flow run in Prefect as Cancelled; again: changes nothing.

    A process that executes it stops within a third of the lease; async handlers are interrupted, sync ones go on,
    and what they return is dropped.

    Example: `pgflow-prefect cancel latest --reason "wrong list"`

    Parameters
    ----------
    reason
        Shown with the run and its steps.
    """
    import anyio

    from pgflow_prefect.database.run_names import parse_run_name

    run, unshown = anyio.run(_cancel, make_settings(dsn), parse_run_name(run_id), reason, json)
    if json:
        print_json({"run": run, "not_shown_in_prefect": unshown})
        return
    out.print(f"run {run.id} is cancelled", markup=False)
    if unshown is not None:
        err.print(f"not shown in Prefect yet, `pgflow-prefect reconcile --apply` does it: {unshown}", markup=False)


async def _cancel(settings: Settings, name: RunName, reason: str | None, with_payload: bool) -> tuple[Run, str | None]:
    """Cancel a run; return it, and why Prefect does not show it yet."""
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.models import CANCELLED, Status

    async with open_store(settings, size=1) as store:
        run_id = await store.find_run_id(name)
        run = await store.read_run(run_id)
        if run.status is Status.COMPLETED:
            raise RunNotPendingError(f"run {run_id} is completed: there is nothing to cancel")
        if run.status is Status.FAILED and not run.is_cancelled:
            raise RunNotPendingError(f"run {run_id} has failed already: {run.error_message}")
        await store.cancel_run(run_id, f"{CANCELLED}: {reason}" if reason else CANCELLED)
        cancelled = await store.read_run(run_id, with_payload=with_payload)
        return cancelled, await _tell_prefect(store, cancelled)


async def _tell_prefect(store: Store, run: Run) -> str | None:
    """Show a cancellation in Prefect, where that can be done now; else return why it can't."""
    from pgflow_prefect.prefect_api.client import connect_to_prefect, has_server
    from pgflow_prefect.services.cancellation import show_cancelled

    if run.flow_run_id is None or not has_server():
        return None
    try:
        async with connect_to_prefect() as client:
            await show_cancelled(client, run, await store.read_installation())
    except PgflowPrefectError as error:
        return str(error)
    return None
