"""`disable`."""

from __future__ import annotations

from pgflow_prefect.cli.console import out
from pgflow_prefect.cli.enable import print_switched, switch
from pgflow_prefect.cli.options import AsJson, Dsn, make_settings


def disable(workflow: str, /, *, json: AsJson = False, dsn: Dsn = None) -> None:
    """Stop workers and bridges from taking a workflow's runs. Runs that are executing go on.

    Example: `pgflow-prefect disable email_campaign`

    Parameters
    ----------
    workflow
        The workflow's slug.
    """
    import anyio

    switched = anyio.run(switch, make_settings(dsn), workflow, False)
    if json:
        print_switched(switched)
        return
    if switched.executes:
        told = "no worker or bridge takes its runs. Runs that are executing go on"
    else:
        told = (
            "`pgflow-prefect observe` shows none of its new runs. It shows those that it has begun to show to their end"
        )
    out.print(f"workflow {workflow!r} is disabled: {told}", markup=False)
