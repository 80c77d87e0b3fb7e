"""`shadow`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pgflow_prefect.cli.bind import check_step
from pgflow_prefect.cli.console import out, print_json, print_table
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, Handlers, make_settings
from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from pgflow_prefect.models import ShadowSummary
    from pgflow_prefect.settings import Settings


def shadow(
    workflow: str,
    step: str | None = None,
    /,
    *,
    off: Annotated[bool, Flag] = False,
    handlers: Handlers = None,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Run a step's handler beside an external worker and compare their results. Without a step, show the comparisons.

    The step becomes external, if it is not. The handler must allow it: `@workflow.step(shadow=True)`. Its writes
    through `context.connection` are rolled back. Its result is compared and never stored. Of a run that Airflow
    executes, a worker runs the handler after Airflow has completed the task.

    Example: `pgflow-prefect shadow email_campaign prepare_list`

    Parameters
    ----------
    workflow
        The workflow's slug.
    step
        The step's slug.
    off
        Stop running the handler beside the external worker.
    """
    import anyio

    settings = make_settings(dsn)
    if step is None:
        _print_shadows(anyio.run(_list_shadows, settings, workflow), json)
        return
    if not off:
        _check_shadow(workflow, step, handlers)
    changed = anyio.run(_shadow, settings, workflow, step, not off)
    if json:
        print_json({"workflow": workflow, "step": step, "shadow": not off, "changed": changed})
        return
    state = "has no shadow any more" if off else "has a shadow: `pgflow-prefect shadow` shows the comparisons"
    out.print(f"step {step!r} of workflow {workflow!r} {state}", markup=False)


def _check_shadow(workflow: str, step: str, handlers: str | None) -> None:
    from pgflow_prefect.deployment.handler_files import load_workflow

    loaded, source = load_workflow(workflow, handlers)
    handler = loaded.handlers.get(step)
    if handler is None:
        raise UsageError(f"{source} has no handler of step {step!r}: write one")
    if handler.is_map:
        raise UsageError(f"step {step!r} is a map, and a shadow is for plain steps: compare another step")
    if not handler.shadow:
        raise UsageError(
            f"the handler of step {step!r} in {source} does not allow a shadow. Declare it with "
            "@workflow.step(shadow=True), once its work has no effect outside"
        )


async def _shadow(settings: Settings, workflow: str, step: str, wanted: bool) -> bool:
    from pgflow_prefect.bindings import Kind
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        await check_step(store, workflow, step)
        row = (await store.list_bindings(workflow)).get(step)
        options = dict(row.options) if row is not None and row.kind == Kind.EXTERNAL else {}
        had_one = options.pop("shadow", False)
        if not (wanted or had_one):
            return False  # nothing changes for the external worker
        return await store.bind_step(
            workflow, step, Kind.EXTERNAL, options=options | {"shadow": True} if wanted else options
        )


async def _list_shadows(settings: Settings, workflow: str) -> list[ShadowSummary]:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        await store.load_definition(workflow)
        return await store.list_shadows(workflow)


def _print_shadows(shadows: list[ShadowSummary], json: bool) -> None:
    if json:
        print_json(shadows)
    elif not shadows:
        out.print("no shadow has run yet: `pgflow-prefect shadow WORKFLOW STEP` starts one")
    else:
        columns = ("step", "same", "different", "failed", "took", "last difference")
        print_table(columns, [_describe_shadow(each) for each in shadows])


def _describe_shadow(found: ShadowSummary) -> tuple[str, ...]:
    from pgflow_prefect.render.labels import format_seconds

    took = format_seconds(found.seconds) if found.seconds is not None else "-"
    counts = (str(found.same), str(found.different), str(found.failed))
    return (found.step_slug, *counts, took, "; ".join(found.details))
