"""`import`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from pgflow_prefect.cli.console import out, print_json
from pgflow_prefect.cli.deploy import Done, check_events, check_server, deploy_all
from pgflow_prefect.cli.deploy_options import NO_FLAGS, DeployFlags
from pgflow_prefect.cli.export import load_definitions
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, make_settings
from pgflow_prefect.errors import InvalidDefinitionError, UsageError

if TYPE_CHECKING:
    from pgflow_prefect.cli.candidates import Candidate
    from pgflow_prefect.definitions.model import WorkflowDefinition
    from pgflow_prefect.deployment.code_generation import ImportReport
    from pgflow_prefect.deployment.deployments.wanted import Options
    from pgflow_prefect.settings import Settings


def import_(
    *workflows: str,
    all_: Annotated[bool, Parameter(name="--all", negative="", show_default=False)] = False,
    from_: Annotated[Literal["airflow", "dbt"] | None, Parameter(name="--from", show_default=False)] = None,
    airflow_dsn: Annotated[str | None, Parameter(show_default=False)] = None,
    json_file: Annotated[Path | None, Parameter(show_default=False)] = None,
    history: Annotated[str | None, Parameter(show_default=False)] = None,
    directory: Path | None = None,
    deploy: Annotated[bool, Flag] = False,
    flags: DeployFlags = NO_FLAGS,
    code_directory: str | None = None,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Write a Python file with a stub for each step of a workflow.

    A second import adds stubs for new steps, names removed steps, and leaves everything else as it is.

    With --from, the workflow is defined elsewhere. Its steps are written into the database, and a ledger beside the
    file names every difference in meaning. See `pgflow-prefect guide airflow`.

    Example: `pgflow-prefect import email_campaign` writes flows/email_campaign.py

    Parameters
    ----------
    workflows
        The workflows' slugs; with --from airflow the ids of DAGs, with --from dbt the file manifest.json.
    all_
        All workflows that the database defines; with --from airflow, all DAGs.
    from_
        Where the workflow is defined: airflow, or dbt.
    airflow_dsn
        With --from airflow: Airflow's metadata database, for a role that may read it: postgresql://USER@HOST/DATABASE.
        The default is PGFLOW_AIRFLOW_DSN.
    json_file
        With --from airflow: the file that the script of `pgflow-prefect airflow dump` has written. --json FILE is the
        same.
    history
        With --from airflow: also write the past runs that ended since then, 90d or a date. They are never executed
        here.
    directory
        The directory of the files. The default is flows.
    deploy
        Also create or update each workflow's Prefect deployment, and enable it. A stub is an external step: Prefect
        shows it and waits for its report.
    code_directory
        The directory on the workers' machine, or in the image, that corresponds to the current one. With --source:
        the directory in the repository.
    """
    if from_ is not None or airflow_dsn is not None or json_file is not None or history is not None:
        from pgflow_prefect.cli.import_foreign import Source, import_foreign

        if deploy or flags.name_given():
            raise UsageError("--deploy does not go with --from: import first, and deploy when the steps are yours")
        source = Source(from_, workflows, every=all_, airflow_dsn=airflow_dsn, json_file=json_file, history=history)
        import_foreign(make_settings(dsn), source, directory, as_json=json)
        return
    if not workflows and not all_:
        raise UsageError("which workflow? name it, or say --all")
    options = _check_flags(deploy, flags, code_directory)
    _import(make_settings(dsn), None if all_ else workflows, directory, options if deploy else None, json=json)


def _import(
    settings: Settings, slugs: Collection[str] | None, directory: Path | None, options: Options | None, *, json: bool
) -> None:
    """Write the files of workflows that the database defines, and deploy them with these options, if there are some."""
    import anyio

    from pgflow_prefect.cli.candidates import collect, raise_all
    from pgflow_prefect.cli.deploy_report import print_found
    from pgflow_prefect.definitions.graph import find_problems
    from pgflow_prefect.deployment.code_generation import import_workflow
    from pgflow_prefect.deployment.handler_files import DIRECTORY, default_path, refuse_shadowing
    from pgflow_prefect.execution.process.signals import run_event_loop

    definitions = anyio.run(load_definitions, settings, slugs)
    for definition in definitions:  # all are checked before the first file is written
        if problems := find_problems(definition):
            raise InvalidDefinitionError(definition.slug, problems)
    for definition in definitions:
        refuse_shadowing(definition.slug, default_path(definition.slug, directory or DIRECTORY))
    reports = [import_workflow(each, default_path(each.slug, directory or DIRECTORY)) for each in definitions]
    if not json:
        for report in reports:
            _print_report(report)
    written = [vars(each) | {"path": str(each.path)} for each in reports]
    done = Done([], [])
    if options is not None:
        pairs = zip(definitions, reports, strict=True)
        candidates, errors = collect(lambda each: _load_candidate(*each), pairs)
        raise_all(errors)
        done = run_event_loop(_deploy, settings, candidates, options, json)
    if json:
        deployed = {each.deployed.workflow_slug: {"deployed": each.to_json()} for each in done.reports}
        print_json([each | deployed.get(of.slug, {}) for each, of in zip(written, definitions, strict=True)])
    else:
        print_found([*done.reports, *done.automations], [], json=False)
    raise_all(done.failures)


def _check_flags(deploy: bool, flags: DeployFlags, code_directory: str | None) -> Options:
    if deploy:
        check_server()
    elif given := [*flags.name_given(), *(["--code-directory"] if code_directory is not None else [])]:
        raise UsageError(f"{', '.join(given)} goes with --deploy")
    return flags.parse(code_directory)


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
    from pgflow_prefect.cli.candidates import Candidate
    from pgflow_prefect.deployment.handler_files import load_workflow

    workflow, source = load_workflow(definition.slug, str(report.path))
    return Candidate(workflow, source, definition)


async def _deploy(settings: Settings, candidates: list[Candidate], options: Options, quiet: bool) -> Done:
    from pgflow_prefect.cli.candidates import CONNECTIONS, examine
    from pgflow_prefect.database.store import open_store

    check_events(settings, options)
    async with open_store(settings, size=CONNECTIONS) as store:
        return await deploy_all(store, await examine(store, candidates), options, quiet=quiet)
