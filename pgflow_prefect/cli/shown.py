"""What commands that show a part of Prefect say where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgflow_prefect.errors import PgflowPrefectError, UsageError

if TYPE_CHECKING:
    from uuid import UUID

    from pgflow_prefect.database.store import Store
    from pgflow_prefect.models import Run

_SHOWN = 20  # names of steps in a message


async def list_steps(store: Store, run_id: UUID, only: str | None) -> list[str]:
    """Return the slugs of a run's steps.

    Raises:
        UsageError: the step that the user wants is not among them.
    """
    steps = [*(await store.load_run_definition(run_id)).steps]
    if only is not None and only not in steps:
        shown = ", ".join(steps[:_SHOWN]) + (", …" if len(steps) > _SHOWN else "")
        raise UsageError(f"run {run_id} has no step {only!r}: its steps are {shown}")
    return steps


async def explain_no_flow_run(store: Store, run: Run) -> PgflowPrefectError:
    """Return the error that says why a run has no flow run."""
    [marked] = await store.mark_unshown([run])
    if marked.is_unshown:
        return PgflowPrefectError(
            f"Prefect was not told of run {run.id}: once it has ended, `pgflow-prefect record {run.id}` shows it"
        )
    return PgflowPrefectError(
        f"run {run.id} has no flow run in Prefect: `pgflow-prefect status {run.id}` shows what it waits for"
    )
