"""`skip`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgflow_prefect.cli.console import out, print_json
from pgflow_prefect.cli.options import AsJson, Dsn, RunId, make_settings
from pgflow_prefect.errors import RunNotPendingError

if TYPE_CHECKING:
    from pgflow_prefect.database.run_names import RunName
    from pgflow_prefect.models import Report
    from pgflow_prefect.settings import Settings


def skip(
    run_id: RunId, step: str, /, *, note: str | None = None, cascade: bool = True, json: AsJson = False, dsn: Dsn = None
) -> None:
    """Skip a step of a run that is pending or has not started yet. The run goes on without it.

    What is below it is skipped, too, unless the rule of a step says otherwise. A process that executes the step at this
    moment goes on, and its result is dropped.

    Example: `pgflow-prefect skip latest publish --note "the site is down"`

    Parameters
    ----------
    step
        The step's slug.
    note
        Why, shown with the step.
    cascade
        With --no-cascade, what waits for the step goes on without its result.
    """
    import anyio

    from pgflow_prefect.database.run_names import parse_run_name

    run, report = anyio.run(_skip, make_settings(dsn), parse_run_name(run_id), step, note, cascade)
    if json:
        print_json({"run_id": run, "step": step, "status": report.status, "skip_reason": report.skip_reason})
        return
    out.print(f"step {step!r} of run {run} is skipped: {report.skip_message}", markup=False)


async def _skip(settings: Settings, name: RunName, step: str, note: str | None, cascade: bool) -> tuple[str, Report]:
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.errors import UsageError
    from pgflow_prefect.models import Status
    from pgflow_prefect.wording import suggest

    async with open_store(settings, size=1) as store:
        run_id = await store.find_run_id(name)
        run = await store.read_run(run_id)
        steps = (await store.load_run_definition(run_id)).steps
        if step not in steps:
            raise UsageError(
                f"workflow {run.workflow_slug!r} of run {run_id} has no step {step!r}{suggest(step, steps)}"
            )
        if run.status is not Status.PENDING:
            raise RunNotPendingError(f"run {run_id} is {run.status}: there is nothing to skip")
        report = await store.skip_step(run_id, step, note, cascade=cascade)
        if report.skip_reason is None or report.status is not Status.COMPLETED:
            raise RunNotPendingError(f"step {step!r} of run {run_id} is {report.status} already: it can't be skipped")
        return str(run_id), report
