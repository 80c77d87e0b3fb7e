"""`bridge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pgflow_prefect.cli.console import err, log_to_console
from pgflow_prefect.cli.deploy import check_server
from pgflow_prefect.cli.options import Dsn, Flag, HealthFile, HealthPort, make_settings

if TYPE_CHECKING:
    from pgflow_prefect.execution.process.signals import Switch


def bridge(
    *,
    adopt: Annotated[bool, Flag] = False,
    health_port: HealthPort = None,
    health_file: HealthFile = None,
    dsn: Dsn = None,
) -> int:
    """Submit the runs that SQL starts to Prefect: each becomes a flow run of its workflow's deployment.

    Prefect's own workers execute them, on any number of machines. You can run several bridges at once.
    After SIGTERM or Ctrl-C, the bridge finishes the submissions under way and ends.

    Example: `pgflow-prefect bridge`

    Parameters
    ----------
    adopt
        Also take pending runs that began before their workflow was enabled.
    """
    from pgflow_prefect.database.connection import find_dsn
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.execution.process.signals import run_service
    from pgflow_prefect.execution.step_writer import persist
    from pgflow_prefect.prefect_api.client import connect_to_prefect
    from pgflow_prefect.services.bridge import IN_FLIGHT, Bridge
    from pgflow_prefect.services.health import Health, open_health

    check_server()
    settings = make_settings(dsn)
    log_to_console()

    async def serve(switch: Switch) -> None:
        health = Health(settings.statement_bound)
        async with (
            open_health(health, port=health_port, file=health_file),
            open_store(settings, size=max(settings.pool_size, IN_FLIGHT), executes_moved=True) as store,
            connect_to_prefect() as client,
        ):
            await persist(store, settings.report_timeout, store.check_writable, "the database")
            service = Bridge(store, client, settings, find_dsn(settings), adopt)
            switch.attach(drain=health.drains(service.stop), stop=health.drains(service.stop))
            await service.register()
            await service.refresh()
            err.print(f"ready: {', '.join(service.deployments) or 'no workflow has a deployment yet'}", markup=False)
            async with health.watched(store, lambda: service.fetcher.passed_at):
                await service.run()
            if service.failure is not None:
                raise service.failure

    return run_service(serve)
