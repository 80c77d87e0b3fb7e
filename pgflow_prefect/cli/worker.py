"""`worker`."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from pgflow_prefect.cli.console import err, log_to_console
from pgflow_prefect.cli.deploy import check_server
from pgflow_prefect.cli.options import Dsn, Flag, HealthFile, HealthPort, make_settings
from pgflow_prefect.errors import InvalidDefinitionError, UsageError

if TYPE_CHECKING:
    from pgflow_prefect.execution.process.host import Host
    from pgflow_prefect.execution.process.signals import Switch
    from pgflow_prefect.workflow import Workflow

_CONNECTIONS_PER_RUN = 2


def worker(
    *sources: str,
    workflow: Annotated[list[str] | None, Parameter(show_default=False)] = None,
    concurrency: Annotated[int, Parameter(validator=Number(gte=1))] = 10,
    adopt: Annotated[bool, Flag] = False,
    health_port: HealthPort = None,
    health_file: HealthFile = None,
    dsn: Dsn = None,
) -> int:
    """Execute runs that SQL or Prefect starts, each as a Prefect flow run in this process.

    After the first SIGTERM or Ctrl-C, working steps finish and the rest is handed back. A second signal stops at once.

    Example: `pgflow-prefect worker flows/email_campaign.py --concurrency 20`

    Parameters
    ----------
    sources
        Files or modules with handlers. The default is all of flows/*.py, and all enabled workflows whose steps are all
        bound by rows (`pgflow-prefect bind`).
    workflow
        A workflow whose steps are bound by rows. You can give it several times.
    concurrency
        How many runs execute at the same time.
    adopt
        Also take pending runs that began before their workflow was enabled.
    """
    from pgflow_prefect.deployment.handler_files import load_directory, load_workflows
    from pgflow_prefect.execution.process.host import open_host
    from pgflow_prefect.execution.process.signals import run_service
    from pgflow_prefect.execution.step_writer import persist
    from pgflow_prefect.prefect_api.client import connect_to_prefect
    from pgflow_prefect.services.health import Health, open_health
    from pgflow_prefect.services.maintenance import name_older_runs
    from pgflow_prefect.services.worker import Worker

    named = bool(sources or workflow)
    workflows = load_workflows(sources) if named else load_directory()
    check_server()
    settings = make_settings(dsn)
    log_to_console()

    async def serve(switch: Switch) -> None:
        size = max(settings.pool_size, min(_CONNECTIONS_PER_RUN * concurrency, 20))
        health = Health(settings.statement_bound)
        async with (
            open_health(health, port=health_port, file=health_file),
            open_host(settings, pool_size=size, is_service=True) as host,
        ):
            await persist(host.store, settings.report_timeout, host.store.check_writable, "the database")
            await _add_bound(host, workflows, workflow or [], all_enabled=not named)
            await host.store.refuse_unmoved(workflows)
            await _check(host, workflows)
            async with connect_to_prefect() as client:
                service = Worker(host, client, workflows, concurrency, adopt)
                switch.attach(drain=health.drains(service.drain), stop=health.drains(service.stop))
                await service.register()
                if not adopt:
                    await name_older_runs(host.store, workflows)
                err.print(f"ready: {', '.join(workflows)}; {concurrency} runs at a time", markup=False)
                async with health.watched(host.store, lambda: service.fetcher.passed_at):
                    await service.run()

    return run_service(serve)


async def _add_bound(
    host: Host, workflows: dict[str, tuple[Workflow, str]], named: Collection[str], *, all_enabled: bool
) -> None:
    """Add workflows that need no Python: the named ones, or all that are enabled.

    Raises:
        UsageError: there is no workflow to execute.
    """
    from pgflow_prefect.deployment.handler_files import BY_ROWS, DIRECTORY
    from pgflow_prefect.workflow import Workflow

    if all_enabled:
        enabled = await host.store.list_enabled()
        named = [slug for slug in await host.store.list_bound_workflows() if slug in enabled and enabled[slug].enabled]
    for slug in named:
        workflows.setdefault(slug, (Workflow(slug), BY_ROWS))
    if not workflows:
        raise UsageError(
            f"no handlers: name a file or module, or write one into {DIRECTORY}/; or name a workflow of which rows say "
            "who does its steps, with --workflow"
        )


async def _check(host: Host, workflows: dict[str, tuple[Workflow, str]]) -> None:
    from pgflow_prefect.bindings import Kind
    from pgflow_prefect.definitions.graph import order_steps
    from pgflow_prefect.deployment.binding_problems import (
        find_all_problems,
        find_doers,
        find_missing_functions,
        find_missing_here,
        find_refused_rows,
    )

    for slug, (workflow, _) in workflows.items():
        definition = await host.store.load_definition(slug)
        rows = await host.store.list_bindings(slug)
        if problems := await find_all_problems(
            host.store, workflow, definition, rows, others_have_functions=True, judge_rows=False
        ):
            raise InvalidDefinitionError(slug, problems)
        if slug in host.settings.recordings and (problems := workflow.find_recording_problems()):
            raise InvalidDefinitionError(slug, problems)
        for refused in find_refused_rows(definition, rows, host.toolbox.rows):
            err.print(f"{slug}: {refused}", markup=False)  # only this step fails: a wrong row must not stop the worker
        doers = find_doers(workflow, definition, rows)
        for problem in find_missing_here(workflow, rows, host.settings):  # only those steps fail
            err.print(f"{slug}: {problem}", markup=False)
        if external := [step for step in order_steps(definition) if doers[step] == Kind.EXTERNAL]:
            err.print(f"{slug}: external workers have to complete {', '.join(external)}", markup=False)
        for step, child in definition.children.items():
            if child.workflow not in workflows:
                err.print(
                    f"{slug}: step {step} is a run of workflow {child.workflow}, which another worker has to execute",
                    markup=False,
                )
        if missing := find_missing_functions(workflow, doers):
            named = ", ".join(missing)
            err.print(f"{slug}: bound to Python, and has no handler here, so runs wait there: {named}", markup=False)
