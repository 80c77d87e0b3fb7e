"""`runs` and `status`."""

from typing import Annotated
from uuid import UUID

import anyio
from cyclopts import Parameter
from cyclopts.validators import Number

from pgflow_prefect.cli.console import format_duration, format_time, out, print_json, print_table, shorten
from pgflow_prefect.cli.options import AsJson, Dsn, make_settings
from pgflow_prefect.database.store import open_store
from pgflow_prefect.graph import build_graph, sort_steps
from pgflow_prefect.models import Run, Status, StepState
from pgflow_prefect.settings import Settings


def runs(
    *,
    workflow: str | None = None,
    status: Status | None = None,
    limit: Annotated[int, Parameter(validator=Number(gte=1))] = 20,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """List the newest runs.

    Example: `pgflow-prefect runs --workflow email_campaign --status failed`

    Parameters
    ----------
    workflow
        Only runs of this workflow.
    status
        Only runs that are pending, completed or failed.
    limit
        How many at most.
    """
    found = anyio.run(_list_runs, make_settings(dsn), workflow, status, limit)
    if json:
        print_json(found)
    elif found:
        columns = ("run", "workflow", "status", "created", "took", "error")
        print_table(columns, [_describe_run(each) for each in found])
    else:
        out.print("no runs: start one with `pgflow-prefect run`, or SELECT pgflow.run_workflow(…)")


def status(run_id: UUID, /, *, json: AsJson = False, dsn: Dsn = None) -> None:
    """Show a run and its steps, those that wait for others too.

    Example: `pgflow-prefect status 0b0e3a4e-6a5c-4d35-9c55-0a7f7f3a2c11`

    Parameters
    ----------
    run_id
        The run, as `runs` shows it.
    """
    run, states, order = anyio.run(_read_status, make_settings(dsn), run_id)
    if json:
        waiting = [slug for slug in order if slug not in states]
        print_json({"run": run, "steps": list(states.values()), "waiting": waiting})
        return
    print_status(run, states, order)


def print_status(run: Run, states: dict[str, StepState], order: list[str]) -> None:
    """Print a run's row and a line for each of its steps.

    Args:
        run: the run.
        states: the steps that have started, by slug.
        order: the slugs of all steps.
    """
    out.print(f"run {run.id} of workflow {run.workflow_slug!r}: {run.status}", markup=False)
    if run.error_message:
        out.print(run.error_message, markup=False)
    rows = []
    for slug in order:
        if (state := states.get(slug)) is None:
            rows.append((slug, "waiting", "", "", "", ""))
            continue
        took = format_duration(state.started_at, state.finished_at) if state.started_at else ""
        note = state.error_message or ("" if state.step_result is None else _show(state.step_result))
        rows.append((slug, state.status, state.task_state or "", str(state.attempts), took, shorten(note)))
    print_table(("step", "status", "in Prefect", "attempts", "took", "result or error"), rows)


def _show(value: object) -> str:
    import json  # noqa: PLC0415  the commands have an option of that name

    return json.dumps(value, ensure_ascii=False)


def _describe_run(run: Run) -> tuple[str, ...]:
    took = format_duration(run.created_at, run.finished_at)
    error = shorten(run.error_message or "", 60)
    return (str(run.id), run.workflow_slug, run.status, format_time(run.created_at), took, error)


async def _list_runs(settings: Settings, workflow: str | None, status: Status | None, limit: int) -> list[Run]:
    async with open_store(settings, size=1) as store:
        if workflow is not None:
            await store.load_definition(workflow)  # a mistyped name is an error, not an empty list
        return await store.list_runs(workflow_slug=workflow, status=status, limit=limit)


async def _read_status(settings: Settings, run_id: UUID) -> tuple[Run, dict[str, StepState], list[str]]:
    async with open_store(settings, size=1) as store:
        run = await store.read_run(run_id)
        states = {state.step_slug: state for state in await store.list_step_states(run_id)}
        definition = await store.load_run_definition(run_id)
        return run, states, sort_steps(build_graph(definition))
