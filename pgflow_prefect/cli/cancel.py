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
    """Cancel a run: it and its steps end as failed, its flow run in Prefect as Cancelled.

    A process that executes the run stops within a third of the lease. Async handlers are interrupted. Sync handlers go
    on, and their results are dropped. Cancelling a cancelled run again changes nothing.

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
        err.print(
            f"Prefect does not show it yet: {unshown}. `pgflow-prefect reconcile --apply` repairs that", markup=False
        )


async def _cancel(settings: Settings, name: RunName, reason: str | None, with_payload: bool) -> tuple[Run, str | None]:
    """Cancel a run. Return it, and the reason if Prefect does not show it yet."""
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.models import CANCELLED, Status

    async with open_store(settings, size=1) as store:
        run_id = await store.find_run_id(name)
        run = await store.read_run(run_id)
        if run.status is Status.COMPLETED:
            raise RunNotPendingError(f"run {run_id} is completed: there is nothing to cancel")
        if run.status is Status.FAILED and not run.is_cancelled:
            raise RunNotPendingError(f"run {run_id} has failed already: {run.error_message}")
        await store.read_installation()  # refuses a copy before its run ends here: the original shows that run
        await store.cancel_run(run_id, f"{CANCELLED}: {reason}" if reason else CANCELLED)
        cancelled = await store.read_run(run_id, with_payload=with_payload)
        return cancelled, await _tell_prefect(store, cancelled)


async def _tell_prefect(store: Store, run: Run) -> str | None:
    """Show a cancellation in Prefect. If that is impossible now, return the reason."""
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
