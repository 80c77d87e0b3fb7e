"""`list`, `validate`, `graph`."""

import sys
from typing import Literal

import anyio

from pgflow_prefect.cli.console import out, print_json, print_table
from pgflow_prefect.cli.options import AsJson, Dsn, Handlers, make_settings
from pgflow_prefect.database.store import open_store
from pgflow_prefect.errors import InvalidDefinitionError
from pgflow_prefect.graph import build_graph, find_problems
from pgflow_prefect.models import WorkflowDefinition, WorkflowSummary
from pgflow_prefect.render import describe_graph, draw_mermaid, draw_text
from pgflow_prefect.settings import Settings


def list_(*, json: AsJson = False, dsn: Dsn = None) -> None:
    """List the workflows that the database defines, with the number of their steps and runs.

    The last column tells whether workers and bridges take a workflow's runs.

    Example: `pgflow-prefect list --json`
    """
    workflows = anyio.run(_list_workflows, make_settings(dsn))
    if json:
        print_json(workflows)
    elif workflows:
        columns = ("workflow", "steps", "deps", "pending", "completed", "failed", "enabled")
        print_table(columns, [_describe(each) for each in workflows])
    else:
        out.print("the database defines no workflow: insert one into pgflow.workflows, pgflow.steps and pgflow.deps")


def validate(workflow: str, /, *, handlers: Handlers = None, json: AsJson = False, dsn: Dsn = None) -> int:
    """Check a workflow and its handlers, and name every problem; the exit code is 1 where there is one.

    Example: `pgflow-prefect validate email_campaign`

    Parameters
    ----------
    workflow
        The workflow's slug.
    """
    from pgflow_prefect.deployment.handler_files import load_workflow  # noqa: PLC0415  imports Prefect

    definition = anyio.run(_load_definition, make_settings(dsn), workflow)
    loaded, source = load_workflow(workflow, handlers)
    problems = loaded.find_problems(definition)
    if json:
        print_json(
            {
                "workflow": workflow,
                "handlers": source,
                "definition_hash": definition.definition_hash,
                "problems": problems,
            }
        )
        return 1 if problems else 0  # cyclopts takes True for success
    out.print(f"handlers: {source}", markup=False)
    if problems:
        out.print(str(InvalidDefinitionError(workflow, problems)), markup=False)
        return 1
    out.print(f"workflow {workflow!r} is valid: {describe_graph(build_graph(definition))}", markup=False)
    return 0


def graph(workflow: str, /, *, format: Literal["text", "mermaid"] = "text", dsn: Dsn = None) -> None:  # noqa: A002
    """Draw a workflow.

    Example: `pgflow-prefect graph email_campaign --format mermaid`

    Parameters
    ----------
    workflow
        The workflow's slug.
    format
        A tree of lines for the terminal, or a Mermaid flowchart for documents.
    """
    definition = anyio.run(_load_definition, make_settings(dsn), workflow)
    if problems := find_problems(definition):
        raise InvalidDefinitionError(workflow, problems)
    built = build_graph(definition)
    if format == "mermaid":
        sys.stdout.write(draw_mermaid(built) + "\n")
        return
    out.print(draw_text(built), markup=False)
    out.print(describe_graph(built), markup=False)


def _describe(workflow: WorkflowSummary) -> tuple[str, ...]:
    enabled = {True: "yes", False: "no", None: "-"}[workflow.enabled]
    counts = workflow.model_dump(exclude={"slug", "enabled"}).values()
    return workflow.slug, *map(str, counts), enabled


async def _list_workflows(settings: Settings) -> list[WorkflowSummary]:
    async with open_store(settings, size=1) as store:
        return await store.list_workflows()


async def _load_definition(settings: Settings, workflow: str) -> WorkflowDefinition:
    async with open_store(settings, size=1) as store:
        return await store.load_definition(workflow)
