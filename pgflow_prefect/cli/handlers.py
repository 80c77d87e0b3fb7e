"""`import`."""

from pathlib import Path
from typing import Annotated

import anyio
from cyclopts import Parameter

from pgflow_prefect.cli.console import out, print_json
from pgflow_prefect.cli.options import AsJson, Dsn, make_settings
from pgflow_prefect.database.store import open_store
from pgflow_prefect.deployment.code_generation import ImportReport, import_workflow
from pgflow_prefect.deployment.handler_files import DIRECTORY, default_path
from pgflow_prefect.errors import InvalidDefinitionError, UsageError
from pgflow_prefect.graph import find_problems
from pgflow_prefect.models import WorkflowDefinition
from pgflow_prefect.settings import Settings


def import_(
    *workflows: str,
    all_: Annotated[bool, Parameter(name="--all", negative="", show_default=False)] = False,
    directory: Path = DIRECTORY,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Write a Python file with a stub for each step of a workflow.

    Again: adds stubs for the steps that are new, names those that are gone, and leaves everything else as it is.

    Example: `pgflow-prefect import email_campaign` writes flows/email_campaign.py

    Parameters
    ----------
    workflows
        The workflows' slugs.
    all_
        All workflows that the database defines.
    directory
        Where the files are.
    """
    if not workflows and not all_:
        raise UsageError("which workflow? name it, or say --all")
    definitions = anyio.run(_load_definitions, make_settings(dsn), None if all_ else workflows)
    for definition in definitions:  # all are looked at before the first file is written
        if problems := find_problems(definition):
            raise InvalidDefinitionError(definition.slug, problems)
    reports = [import_workflow(each, default_path(each.slug, directory)) for each in definitions]
    if json:
        print_json([vars(each) | {"path": str(each.path)} for each in reports])
        return
    for report in reports:
        _print_report(report)


def _print_report(report: ImportReport) -> None:
    if report.created:
        out.print(f"wrote {report.path}: {len(report.added)} stubs to fill in", markup=False)
    elif report.added:
        out.print(f"added to {report.path}: {', '.join(report.added)}", markup=False)
    else:
        out.print(f"{report.path} has a handler for every step: nothing added", markup=False)
    if report.gone:
        out.print(f"gone from the database, still in {report.path}: {', '.join(report.gone)}", markup=False)


async def _load_definitions(settings: Settings, slugs: tuple[str, ...] | None) -> list[WorkflowDefinition]:
    async with open_store(settings, size=1) as store:
        wanted = dict.fromkeys(await store.list_slugs() if slugs is None else slugs)
        return [await store.load_definition(slug) for slug in wanted]
