"""`enable`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from pgflow_prefect.cli.console import format_time, out, print_json
from pgflow_prefect.cli.options import AsJson, Dsn, make_settings

if TYPE_CHECKING:
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.models import Enabled
    from pgflow_prefect.settings import Settings


class Switched(NamedTuple):
    """Whether a workflow is enabled, and its pending runs that are too old to be taken.

    Attributes:
        state: whether it is enabled, and since when.
        older_runs: the runs.
        executes: workers and bridges of this program take its runs. Otherwise `observe` shows them.
    """

    state: Enabled
    older_runs: list[UUID]
    executes: bool = True


def enable(workflow: str, /, *, json: AsJson = False, dsn: Dsn = None) -> None:
    """Let workers and bridges take the runs of a workflow that begin from now on.

    Older pending runs are left alone until you start a worker or a bridge with --adopt.

    Example: `pgflow-prefect enable email_campaign`

    Parameters
    ----------
    workflow
        The workflow's slug.
    """
    import anyio

    switched = anyio.run(switch, make_settings(dsn), workflow, True)
    if json:
        print_switched(switched)
        return
    since = format_time(switched.state.since)
    who = "workers and bridges take" if switched.executes else "`pgflow-prefect observe` shows"
    out.print(f"workflow {workflow!r} is enabled: {who} its runs begun since {since}", markup=False)
    if switched.executes:
        print_older_runs(switched.older_runs)
    elif count := len(switched.older_runs):
        older = f"{count} run{'s go' if count > 1 else ' goes'} on and began before that"
        out.print(f"{older}: `pgflow-prefect observe --adopt` shows {'them' if count > 1 else 'it'}", markup=False)


async def enable_workflow(store: Store, workflow_slug: str) -> Switched:
    """Let workers and bridges take a workflow's new runs. Return the older runs that they leave alone.

    Raises:
        UnknownWorkflowError: the database defines no such workflow.
    """
    state = await store.enable_workflow(workflow_slug)
    older_runs = [run_id for _, run_id in await store.list_older_runs([workflow_slug])]
    return Switched(state, older_runs, store.implementation.executes)


def print_older_runs(older_runs: list[UUID]) -> None:
    """Print how many pending runs are left alone, and the command that takes them."""
    if not older_runs:
        return
    count = len(older_runs)
    out.print(
        f"{count} pending run{'s' if count > 1 else ''} began before the workflow was enabled: "
        f"`pgflow-prefect worker --adopt` or `pgflow-prefect bridge --adopt` takes {'them' if count > 1 else 'it'}",
        markup=False,
    )


def print_switched(switched: Switched) -> None:
    """Print whether workers and bridges take a workflow's runs, as JSON."""
    print_json({**switched.state.model_dump(mode="json"), "older_runs": [str(each) for each in switched.older_runs]})


async def switch(settings: Settings, workflow_slug: str, enabled: bool) -> Switched:
    """Enable or disable a workflow."""
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1, only_reads=True) as store:
        if enabled:
            return await enable_workflow(store, workflow_slug)
        state = await store.enable_workflow(workflow_slug, enabled=False)
        return Switched(state, [], store.implementation.executes)
