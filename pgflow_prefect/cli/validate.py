"""`validate`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

from pgflow_prefect.cli.console import out, print_json, print_table
from pgflow_prefect.cli.doers import print_stubs
from pgflow_prefect.cli.options import AsJson, Dsn, Handlers, make_settings
from pgflow_prefect.errors import InvalidDefinitionError

if TYPE_CHECKING:
    from pgflow_prefect.definitions.model import WorkflowDefinition
    from pgflow_prefect.deployment.doers import Doer
    from pgflow_prefect.recording import RecordLater
    from pgflow_prefect.settings import Settings


def validate(workflow: str, /, *, handlers: Handlers = None, json: AsJson = False, dsn: Dsn = None) -> int:
    """Check a workflow, its handlers and its bindings, and name every problem. The exit code is 1 if there is one.

    Example: `pgflow-prefect validate email_campaign`

    Parameters
    ----------
    workflow
        The workflow's slug.
    """
    import anyio

    from pgflow_prefect.definitions.graph import build_graph
    from pgflow_prefect.render.text import describe_graph
    from pgflow_prefect.workflow import to_flow_name

    checked = anyio.run(_check, make_settings(dsn), workflow, handlers)
    definition, doers, problems = checked.definition, checked.doers, checked.problems
    if json:
        print_json(
            {
                "workflow": workflow,
                "handlers": checked.source,
                "steps": checked.kinds,
                "functions": {slug: each.to_json() for slug, each in doers.items() if each.function is not None},
                "stubs": [slug for slug, each in doers.items() if each.is_stub],
                "definition_hash": definition.definition_hash,
                "problems": problems,
                "recorded_later": None if checked.recording is None else asdict(checked.recording),
            }
        )
        return 1 if problems else 0  # cyclopts takes True for success
    out.print(f"handlers: {checked.source}", markup=False)
    if problems:
        out.print(str(InvalidDefinitionError(workflow, problems)), markup=False)
    else:
        out.print(f"workflow {workflow!r} is valid: {describe_graph(build_graph(definition))}", markup=False)
    if (name := to_flow_name(workflow)) != workflow:
        out.print(f"its flow in Prefect is called {name!r}, because the slug is not a valid name there", markup=False)
    print_table(("step", "done by"), [(slug, each.text) for slug, each in doers.items()])
    print_stubs(doers)
    if checked.recording is not None:
        out.print(_describe_recording(checked.recording), markup=False)
    if external := [slug for slug in checked.external if not doers[slug].is_stub]:
        who = "external workers, which call complete_step" if checked.executes else "pgflow's own workers"
        out.print(f"done by {who}: {', '.join(external)}", markup=False)
    return 1 if problems else 0


def _describe_recording(recording: RecordLater) -> str:
    others = "no other run" if recording.one_in is None else f"one in {recording.one_in} of the others"
    return (
        f"a worker records its runs later: Prefect shows failed runs, runs from {recording.longer_than:g} s on, and "
        f"{others}. Until a run is shown, Prefect's Cancel has nothing to cancel, and handlers find no flow run: "
        "`pgflow-prefect guide recording`"
    )


class _Checked(NamedTuple):
    """The result of `validate`."""

    definition: WorkflowDefinition
    source: str
    kinds: dict[str, str]
    doers: dict[str, Doer]
    problems: list[str]
    recording: RecordLater | None
    executes: bool = True

    @property
    def external(self) -> list[str]:
        """The steps that an external worker does."""
        from pgflow_prefect.bindings import Kind

        return [slug for slug, kind in self.kinds.items() if kind == Kind.EXTERNAL]


async def _check(settings: Settings, workflow: str, handlers: str | None) -> _Checked:
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.definitions.graph import order_steps
    from pgflow_prefect.deployment.binding_problems import find_all_problems, find_doers, find_missing_here
    from pgflow_prefect.deployment.child_workflows import find_nested_problems
    from pgflow_prefect.deployment.doers import describe_doers
    from pgflow_prefect.deployment.handler_files import load_workflow

    async with open_store(settings, size=1, only_reads=True) as store:
        definition = await store.load_definition(workflow)
        rows = await store.list_bindings(workflow)
        loaded, source = load_workflow(workflow, handlers, has_rows=bool(rows))
        kinds = find_doers(loaded, definition, rows)
        order = order_steps(definition)
        problems = await find_all_problems(store, loaded, definition, rows)
        problems += find_missing_here(loaded, rows, settings)
        problems += await find_nested_problems(store, loaded, definition, source)
        problems += _find_twins(workflow, await store.list_slugs())
        recording = settings.recordings.get(workflow, loaded.record)
        if recording is not None and loaded.record is None:
            problems += loaded.find_recording_problems()
        doers = describe_doers(order, rows, loaded, source, definition.children)
        return _Checked(
            definition,
            source,
            {slug: kinds[slug] for slug in order},
            doers,
            problems,
            recording,
            store.implementation.executes,
        )


def _find_twins(workflow: str, slugs: Iterable[str]) -> list[str]:
    """Return the workflows whose flow in Prefect would have the same name, a sentence each."""
    from pgflow_prefect.workflow import to_flow_name

    name = to_flow_name(workflow)
    twins = [slug for slug in slugs if slug != workflow and to_flow_name(slug) == name]
    return [f"workflow {twin!r} has the same flow in Prefect, {name!r}: rename one of them" for twin in twins]
