"""`observe`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgflow_prefect.cli.console import out, print_json
from pgflow_prefect.cli.options import AsJson, Dsn, make_settings

if TYPE_CHECKING:
    from pgflow_prefect.settings import Settings


def observe(workflow: str, /, *, json: AsJson = False, dsn: Dsn = None) -> None:
    """Show a workflow in Prefect that external workers execute: make all its steps external, and enable it.

    Nothing is executed here. A worker or a bridge takes each run, waits for its steps, and shows them in Prefect with
    PostgreSQL's times. Later, `bind` moves the work step by step, and `bind … --undo` moves it back.

    Example: `pgflow-prefect observe email_campaign`

    Parameters
    ----------
    workflow
        The workflow's slug.
    """
    import anyio

    changed = anyio.run(_observe, make_settings(dsn), workflow)
    if json:
        print_json({"workflow": workflow, "changed": changed})
        return
    out.print(
        f"workflow {workflow!r} is observed: its steps are external ({changed} changed), and its runs are shown by a "
        f"worker (`pgflow-prefect worker --workflow {workflow}`) or, with `pgflow-prefect deploy {workflow}`, a bridge",
        markup=False,
    )


async def _observe(settings: Settings, workflow: str) -> int:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        await store.load_definition(workflow)
        changed = await store.observe_workflow(workflow)
        await store.enable_workflow(workflow)
        return changed
