"""`retry` and `cancel`."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from pgflow_prefect.cli.console import err, out
from pgflow_prefect.cli.options import Dsn, make_settings
from pgflow_prefect.errors import PgflowPrefectError, RunNotPendingError

if TYPE_CHECKING:
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.models import Run
    from pgflow_prefect.settings import Settings


def retry(run_id: UUID, /, *, dsn: Dsn = None) -> None:
    """Make a failed or cancelled run pending again, for a worker or a bridge: what completed is not executed again.

    Example: `pgflow-prefect retry 0b0e3a4e-6a5c-4d35-9c55-0a7f7f3a2c11`

    Parameters
    ----------
    run_id
        The run, as `runs` shows it.
    """
    import anyio

    anyio.run(_retry, make_settings(dsn), run_id)


def cancel(run_id: UUID, /, *, reason: str | None = None, dsn: Dsn = None) -> None:
    """End a run and its steps as failed, and its flow run in Prefect as Cancelled; again: changes nothing.

    A process that executes it stops within a third of the lease; async handlers are interrupted, sync ones go on,
    and what they return is dropped.

    Example: `pgflow-prefect cancel 0b0e3a4e-6a5c-4d35-9c55-0a7f7f3a2c11 --reason 'wrong list'`

    Parameters
    ----------
    run_id
        The run, as `runs` shows it.
    reason
        Shown with the run and its steps.
    """
    import anyio

    anyio.run(_cancel, make_settings(dsn), run_id, reason)


async def _retry(settings: Settings, run_id: UUID) -> None:
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.models import Status

    async with open_store(settings, size=1) as store:
        run = await store.read_run(run_id)
        if run.status is Status.COMPLETED:
            raise RunNotPendingError(f"run {run_id} is completed: there is nothing to retry")
        if run.status is Status.FAILED:
            await store.reopen_run(run_id)
        enabled = (await store.list_enabled()).get(run.workflow_slug)
        out.print(f"run {run_id} is pending", markup=False)
        if enabled is None or not enabled.enabled:
            out.print(
                f"no worker or bridge takes it: `pgflow-prefect enable {run.workflow_slug}`, "
                f"or go on with it here: `pgflow-prefect run --resume {run_id}`",
                markup=False,
            )


async def _cancel(settings: Settings, run_id: UUID, reason: str | None) -> None:
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.models import CANCELLED, Status

    async with open_store(settings, size=1) as store:
        run = await store.read_run(run_id)
        if run.status is Status.COMPLETED:
            raise RunNotPendingError(f"run {run_id} is completed: there is nothing to cancel")
        if run.status is Status.FAILED and not run.is_cancelled:
            raise RunNotPendingError(f"run {run_id} has failed already: {run.error_message}")
        await store.cancel_run(run_id, f"{CANCELLED}: {reason}" if reason else CANCELLED)
        out.print(f"run {run_id} is cancelled", markup=False)
        await _tell_prefect(store, run)


async def _tell_prefect(store: Store, run: Run) -> None:
    """Show the cancellation in Prefect, where that can be done now."""
    from pgflow_prefect.deployment.cancellation import show_cancelled
    from pgflow_prefect.execution.in_process import connect_to_prefect, has_server

    if run.flow_run_id is None or not has_server():
        return
    try:
        async with connect_to_prefect() as client:
            await show_cancelled(client, await store.read_run(run.id))
    except PgflowPrefectError as error:
        err.print(f"not shown in Prefect yet, `pgflow-prefect reconcile --apply` does it: {error}", markup=False)
