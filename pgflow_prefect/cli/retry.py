"""`retry`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pgflow_prefect.cli.console import out, print_json
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, RunId, make_settings
from pgflow_prefect.errors import RunNotPendingError

if TYPE_CHECKING:
    from pgflow_prefect.database.run_names import RunName
    from pgflow_prefect.models import Run
    from pgflow_prefect.settings import Settings


def retry(run_id: RunId, /, *, force: Annotated[bool, Flag] = False, json: AsJson = False, dsn: Dsn = None) -> None:
    """Make a failed or cancelled run pending again, for a worker or a bridge. Completed steps are not executed again.

    Example: `pgflow-prefect retry latest`

    Parameters
    ----------
    force
        Also a run that Airflow has executed: workers here execute its failed steps, and no mirror follows it any more.
    """
    import anyio

    from pgflow_prefect.database.run_names import parse_run_name

    run, taken = anyio.run(_retry, make_settings(dsn), parse_run_name(run_id), force, json)
    if json:
        print_json({"run": run, "enabled": taken})
        return
    out.print(f"run {run.id} is pending", markup=False)
    if not taken:
        out.print(
            f"its workflow is not enabled. Use `pgflow-prefect enable {run.workflow_slug}`, "
            f"or execute it here with `pgflow-prefect run --resume {run.id}`",
            markup=False,
        )


async def _retry(settings: Settings, name: RunName, force: bool, with_payload: bool) -> tuple[Run, bool]:
    """Reopen a run. Return it, and whether its workflow is enabled."""
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.models import Status

    async with open_store(settings, size=1) as store:
        run_id = await store.find_run_id(name)
        run = await store.read_run(run_id)
        if run.status is Status.COMPLETED:
            raise RunNotPendingError(f"run {run_id} is completed: there is nothing to retry")
        if force and run.status is Status.FAILED:
            await store.execute_mirrored_run(run_id)
        if run.status is Status.FAILED:
            await store.reopen_run(run_id)
        enabled = (await store.list_enabled()).get(run.workflow_slug)
        return await store.read_run(run_id, with_payload=with_payload), enabled is not None and enabled.enabled
