"""`observe`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pgflow_prefect.cli.console import err, log_to_console, out, print_json
from pgflow_prefect.cli.deploy import check_server
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, HealthFile, HealthPort, make_settings
from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from pgflow_prefect.execution.process.signals import Switch
    from pgflow_prefect.settings import Settings


def observe(
    workflow: str,
    /,
    *more: str,
    adopt: Annotated[bool, Flag] = False,
    airflow_dsn: Annotated[str | None, Parameter(show_default=False)] = None,
    health_port: HealthPort = None,
    health_file: HealthFile = None,
    json: AsJson = False,
    dsn: Dsn = None,
) -> int:
    """Show a workflow in Prefect that external workers execute: make all its steps external, and enable it.

    Nothing is executed here. A worker or a bridge takes each run, waits for its steps, and shows them in Prefect with
    PostgreSQL's times. Later, `bind` moves the work step by step, and `bind … --undo` moves it back.

    On a database of the released pgflow (pgflow.dev), the command itself shows the runs that pgflow's workers execute,
    until SIGTERM or Ctrl-C. The next one goes on from there.

    Of a workflow that is a DAG of Airflow, Airflow executes the runs: `pgflow-prefect airflow mirror` follows them. So
    does a worker or a bridge with PGFLOW_AIRFLOW_DSN.

    Example: `pgflow-prefect observe email_campaign`

    Parameters
    ----------
    workflow
        The workflow's slug.
    more
        The slugs of further workflows.
    adopt
        On the released pgflow: also show runs that go on, and began before their flow was observed.
    airflow_dsn
        The workflows are DAGs of this Airflow: its metadata database, postgresql://USER@HOST/DATABASE. The default is
        PGFLOW_AIRFLOW_DSN; then those count that Airflow knows.
    """
    import anyio

    settings = make_settings(dsn)
    workflows = (workflow, *more)
    dags = anyio.run(_find_dags, settings, workflows, airflow_dsn)
    changed = anyio.run(_make_external, settings, workflows, dags)
    if changed is None:
        return _show_runs(settings, workflows, adopt, health_port, health_file)
    if json:
        done = [{"workflow": slug, "changed": number, "airflow": slug in dags} for slug, number in changed.items()]
        print_json(done if more else done[0])
        return 0
    for slug, number in changed.items():
        if slug in dags:
            out.print(
                f"workflow {slug!r} is observed: Airflow executes its steps ({number} changed), and its runs are "
                "followed by `pgflow-prefect airflow mirror`, or by a worker or a bridge with PGFLOW_AIRFLOW_DSN",
                markup=False,
            )
            continue
        out.print(
            f"workflow {slug!r} is observed: its steps are external ({number} changed), and its runs are shown by a "
            f"worker (`pgflow-prefect worker --workflow {slug}`) or, with `pgflow-prefect deploy {slug}`, a bridge",
            markup=False,
        )
    return 0


async def _find_dags(settings: Settings, workflows: tuple[str, ...], airflow_dsn: str | None) -> frozenset[str]:
    """Return those of these workflows that are DAGs of Airflow.

    Raises:
        UsageError: the command names an Airflow that has not all of them.
    """
    from pgflow_prefect.database.airflow.reader import open_airflow
    from pgflow_prefect.wording import suggest

    secret = settings.airflow_dsn.get_secret_value() if settings.airflow_dsn is not None else None
    if not (source := airflow_dsn or secret):
        return frozenset()
    async with open_airflow(source, timeout=settings.connect_timeout) as airflow:
        known = await airflow.list_dags()
    for slug in workflows:
        if airflow_dsn and slug not in known:
            raise UsageError(f"Airflow's database has no DAG {slug!r}{suggest(slug, known)}")
    return frozenset(workflows) & frozenset(known)


async def _make_external(settings: Settings, workflows: tuple[str, ...], dags: frozenset[str]) -> dict[str, int] | None:
    """Make the steps of workflows external, and return how many were not; None where pgflow's own workers do them."""
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1, only_reads=True) as store:
        for slug in workflows:  # all of them, before the first one is changed
            await store.load_definition(slug)
        if not store.implementation.executes:
            return None
        changed = {}
        for slug in workflows:
            changed[slug] = await store.observe_workflow(slug)
            await store.enable_workflow(slug)
            if slug in dags:
                await store.add_mirror(slug)
        return changed


def _show_runs(
    settings: Settings, workflows: tuple[str, ...], adopt: bool, health_port: HealthPort, health_file: HealthFile
) -> int:
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.execution.process.signals import run_service
    from pgflow_prefect.prefect_api.client import connect_to_prefect
    from pgflow_prefect.services.health import Health, open_health
    from pgflow_prefect.services.observer import Observer

    check_server()
    log_to_console()

    async def serve(switch: Switch) -> None:
        health = Health(settings.statement_bound)
        async with (
            open_health(health, port=health_port, file=health_file),
            open_store(settings, only_reads=True) as store,
            connect_to_prefect() as client,
        ):
            service = Observer(store, client, settings, workflows, adopt)
            switch.attach(drain=health.drains(service.stop), stop=health.drains(service.stop))
            await service.register()
            err.print(f"ready: shows what pgflow's workers execute of {', '.join(workflows)}", markup=False)
            async with health.watched(store, lambda: service.passed_at):
                await service.run()

    return run_service(serve)
