"""`worker`."""

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from pgflow_prefect.cli.console import err, log_to_console
from pgflow_prefect.cli.deployments import check_server
from pgflow_prefect.cli.options import Dsn, make_settings
from pgflow_prefect.deployment.handler_files import DIRECTORY, load_workflows
from pgflow_prefect.deployment.upkeep import name_older_runs
from pgflow_prefect.deployment.worker import Worker
from pgflow_prefect.errors import InvalidDefinitionError, UsageError
from pgflow_prefect.execution.host import Host, open_host
from pgflow_prefect.execution.in_process import connect_to_prefect
from pgflow_prefect.execution.service import Switch, run_service
from pgflow_prefect.workflow import Workflow

_CONNECTIONS_PER_RUN = 2


def worker(
    *sources: str,
    concurrency: Annotated[int, Parameter(validator=Number(gte=1))] = 10,
    adopt: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    dsn: Dsn = None,
) -> int:
    """Execute runs as they come, each as a Prefect flow run in this process: those that SQL starts, and Prefect's.

    The first SIGTERM or Ctrl-C drains: steps that work finish, the rest is handed back. A second one stops at once.

    Example: `pgflow-prefect worker flows/email_campaign.py --concurrency 20`

    Parameters
    ----------
    sources
        Files or modules with handlers; all of flows/*.py where none is given.
    concurrency
        Runs at the same time.
    adopt
        Take pending runs, too, that were begun before their workflow was enabled.
    """
    found = sources or tuple(str(path) for path in sorted(DIRECTORY.glob("*.py")))
    if not found:
        raise UsageError(f"no handlers: name a file or module, or write one into {DIRECTORY}/")
    workflows = load_workflows(found)
    check_server()
    settings = make_settings(dsn)
    log_to_console()

    async def serve(switch: Switch) -> None:
        size = max(settings.pool_size, min(_CONNECTIONS_PER_RUN * concurrency, 20))
        async with open_host(settings, pool_size=size) as host:
            await _check(host, workflows)
            async with connect_to_prefect() as client:
                service = Worker(host, client, workflows, concurrency, adopt)
                switch.attach(drain=service.drain, stop=service.stop)
                await service.register()
                if not adopt:
                    await name_older_runs(host.store, workflows)
                err.print(f"ready: {', '.join(workflows)}; {concurrency} runs at a time", markup=False)
                await service.run()

    return run_service(serve)


async def _check(host: Host, workflows: dict[str, tuple[Workflow, str]]) -> None:
    for slug, (workflow, _) in workflows.items():
        if problems := workflow.find_problems(await host.store.load_definition(slug)):
            raise InvalidDefinitionError(slug, problems)
