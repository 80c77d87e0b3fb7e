"""`import`."""

from pathlib import Path
from typing import Annotated

import anyio
from cyclopts import Parameter

from pgflow_prefect.cli.console import out, print_json
from pgflow_prefect.cli.definitions import load_definitions
from pgflow_prefect.cli.deployments import Candidate, Report, WorkPool, check_server, deploy_all
from pgflow_prefect.cli.options import AsJson, Dsn, make_settings
from pgflow_prefect.database.store import open_store
from pgflow_prefect.deployment.code_generation import ImportReport, import_workflow
from pgflow_prefect.deployment.handler_files import DIRECTORY, default_path, load_workflow
from pgflow_prefect.errors import InvalidDefinitionError, UsageError
from pgflow_prefect.execution.in_process import run_event_loop
from pgflow_prefect.graph import find_problems
from pgflow_prefect.models import WorkflowDefinition
from pgflow_prefect.settings import Settings


def import_(
    *workflows: str,
    all_: Annotated[bool, Parameter(name="--all", negative="", show_default=False)] = False,
    directory: Path = DIRECTORY,
    deploy: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    work_pool: WorkPool = None,
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
    deploy
        Create or update each workflow's Prefect deployment, too, and enable it. What is still a stub, somebody else
        does: Prefect waits for that, and shows it.
    """
    if not workflows and not all_:
        raise UsageError("which workflow? name it, or say --all")
    if deploy:
        check_server()
    elif work_pool is not None:
        raise UsageError("--work-pool goes with --deploy")
    definitions = anyio.run(load_definitions, make_settings(dsn), None if all_ else workflows)
    for definition in definitions:  # all are looked at before the first file is written
        if problems := find_problems(definition):
            raise InvalidDefinitionError(definition.slug, problems)
    reports = [import_workflow(each, default_path(each.slug, directory)) for each in definitions]
    if not json:
        for report in reports:
            _print_report(report)
    written: list[dict[str, object]] = [vars(each) | {"path": str(each.path)} for each in reports]
    if deploy:
        candidates = [_load_candidate(*each) for each in zip(definitions, reports, strict=True)]
        deployed = run_event_loop(_deploy, make_settings(dsn), candidates, work_pool, json)
        written = [each | {"deployed": done.to_json()} for each, done in zip(written, deployed, strict=True)]
    if json:
        print_json(written)


def _print_report(report: ImportReport) -> None:
    if report.created:
        out.print(f"wrote {report.path}: {len(report.added)} stubs to fill in", markup=False)
    elif report.added:
        out.print(f"added to {report.path}: {', '.join(report.added)}", markup=False)
    else:
        out.print(f"{report.path} has a handler for every step: nothing added", markup=False)
    if report.gone:
        out.print(f"gone from the database, still in {report.path}: {', '.join(report.gone)}", markup=False)


def _load_candidate(definition: WorkflowDefinition, report: ImportReport) -> Candidate:
    workflow, source = load_workflow(definition.slug, str(report.path))
    return Candidate(workflow, source, definition)


async def _deploy(settings: Settings, candidates: list[Candidate], work_pool: str | None, quiet: bool) -> list[Report]:
    async with open_store(settings, size=1) as store:
        return await deploy_all(store, candidates, work_pool, quiet)
