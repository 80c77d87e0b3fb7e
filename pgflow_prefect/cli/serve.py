"""`serve`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from pgflow_prefect.cli.console import err, is_debugging, log_to_console
from pgflow_prefect.cli.deploy import check_server
from pgflow_prefect.cli.options import Dsn, Flag, HealthFile, HealthPort, make_settings
from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.execution.process.signals import Switch
    from pgflow_prefect.services.serve import Served
    from pgflow_prefect.settings import Settings
    from pgflow_prefect.workflow import Workflow


def serve(
    *sources: str,
    limit: Annotated[int, Parameter(validator=Number(gte=1))] = 10,
    cron: str | None = None,
    interval: str | None = None,
    timezone: str | None = None,
    grace: Annotated[float, Parameter(validator=Number(gte=0))] = 30.0,
    adopt: Annotated[bool, Flag] = False,
    health_port: HealthPort = None,
    health_file: HealthFile = None,
    dsn: Dsn = None,
) -> int:
    """Deploy workflows and execute their flow runs on this machine, each in its own process.

    A Run button, a schedule or SQL starts them. `serve` combines `deploy`, `bridge` and Prefect's runner. After the
    first SIGTERM or Ctrl-C, flow runs under way finish and no other one begins. A second signal stops them at once, and
    hands their runs back.

    Example: `pgflow-prefect serve flows/greeting.py --cron "0 9 * * 1-5"`

    Parameters
    ----------
    sources
        Files or modules with handlers. The default is all of flows/*.py.
    limit
        How many flow runs execute at the same time. Further ones wait in Prefect. A run that waits for a run of
        another workflow counts.
    cron
        "0 9 * * 1-5": start a run of each workflow at these times.
    interval
        Start a run of each workflow every 30s, 15m, 2h, 1d.
    timezone
        The time zone of --cron or --interval, such as Europe/Berlin.
    grace
        Seconds that flow runs get to finish after the first signal. Then they are stopped.
    adopt
        Also take pending runs that began before their workflow was enabled.
    """
    from pgflow_prefect.database.connection import find_dsn
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.deployment.deployments.schedules import parse_schedule
    from pgflow_prefect.deployment.deployments.wanted import Options
    from pgflow_prefect.deployment.handler_files import DIRECTORY, load_directory, load_workflows
    from pgflow_prefect.execution.process.signals import run_service
    from pgflow_prefect.execution.step_writer import persist
    from pgflow_prefect.prefect_api.client import connect_to_prefect
    from pgflow_prefect.services.bridge import IN_FLIGHT, Bridge
    from pgflow_prefect.services.flow_run_logs import handlers_logging
    from pgflow_prefect.services.flow_run_processes import FlowRunProcesses
    from pgflow_prefect.services.health import Health, open_health
    from pgflow_prefect.services.serve import ServedDeployments, Serving

    options = Options(schedule=parse_schedule(cron, interval, timezone, remove=False))
    check_server()
    workflows = load_workflows(sources) if sources else load_directory()
    if not workflows:
        raise UsageError(f"no handlers: name a file or module, or write one into {DIRECTORY}/")
    settings = make_settings(dsn)
    if dsn is not None:
        os.environ["PGFLOW_DSN"] = (
            dsn  # flow runs find it in the environment: all users of the machine can read a command line
        )
    log_to_console()

    async def work(switch: Switch) -> None:
        size = max(settings.pool_size, IN_FLIGHT)
        health = Health(settings.statement_bound)
        async with (
            open_health(health, port=health_port, file=health_file),
            open_store(settings, size=size, executes_moved=True) as store,
        ):
            await store.refuse_unmoved(workflows)
            async with connect_to_prefect() as client:
                await persist(store, settings.report_timeout, store.check_writable, "the database")
                deployments = ServedDeployments(
                    store, client, await _load_served(store, workflows, settings, limit), options
                )
                bridge = Bridge(store, client, settings, find_dsn(settings), adopt, only=[*workflows])
                await bridge.register()
                await deployments.deploy()
                processes = FlowRunProcesses(store, deployments.flows, limit, environment)
                service = Serving(bridge, deployments, processes, grace)
                switch.attach(drain=health.drains(service.drain), stop=health.drains(service.stop))
                await bridge.refresh()
                err.print(f"ready: {', '.join(workflows)}; {limit} flow runs at a time", markup=False)
                async with health.watched(store, lambda: bridge.fetcher.passed_at):
                    await service.run()

    # With --debug, flow runs write all of Prefect's messages.
    with nullcontext[Mapping[str, str | None]]({}) if is_debugging() else handlers_logging() as environment:
        return run_service(work)


async def _load_served(
    store: Store, workflows: Mapping[str, tuple[Workflow, str]], settings: Settings, limit: int
) -> list[Served]:
    """Return the workflows with their definitions.

    Raises:
        UsageError: with everything that is wrong with any of them.
    """
    from pgflow_prefect.cli.candidates import Candidate, Chosen, examine
    from pgflow_prefect.deployment.binding_problems import find_missing_here
    from pgflow_prefect.deployment.child_workflows import refuse_few_places
    from pgflow_prefect.services.serve import Served

    definitions = {slug: await store.load_definition(slug) for slug in workflows}
    refuse_few_places(definitions, limit)
    candidates = [Candidate(workflow, source, definitions[slug]) for slug, (workflow, source) in workflows.items()]
    chosen = Chosen(await examine(store, candidates))
    chosen.check()
    for each in chosen.candidates:
        for problem in find_missing_here(each.workflow, each.rows, settings):  # only those steps fail
            err.print(f"{each.slug}: {problem}", markup=False)
    return [Served(each.workflow, each.source, each.definition) for each in chosen.candidates]
