"""`airflow`, and its commands `dump`, `policy` and `mirror`."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from pgflow_prefect.cli.console import err, log_to_console, out
from pgflow_prefect.cli.deploy import check_server
from pgflow_prefect.cli.options import Dsn, Flag, HealthFile, HealthPort, make_settings
from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from uuid import UUID

    from pgflow_prefect.database.airflow_task_statements import RemovedDag
    from pgflow_prefect.execution.process.signals import Switch
    from pgflow_prefect.settings import Settings

_NEXT = """\
put it as pgflow_policy.py into Airflow's folder config, and this line into airflow_local_settings.py there:
    from pgflow_policy import task_policy
then restart Airflow's scheduler, workers and triggerer. `pgflow-prefect guide airflow-tasks` has the rest"""

_LONGEST_WAIT = 366 * 86400  # seconds

app = App(name="airflow")


@app.default
def show() -> None:
    """Follow the runs of Airflow, or print what reads DAGs or moves tasks there.

    Each of the commands below has a help of its own.

    Example: `pgflow-prefect airflow policy etl > pgflow_policy.py`
    """
    app.help_print([])


@app.command
def dump() -> None:
    """Print the Python script that writes serialized DAGs as JSON. It runs where Airflow does.

    The script needs the standard library and that Airflow. It reads Airflow's database and executes no DAG file.
    `python dump.py etl > etl.json` writes a DAG, and `python dump.py --help` shows the options.

    Example: `pgflow-prefect airflow dump > dump.py`
    """
    sys.stdout.write(files("pgflow_prefect.airflow").joinpath("dump_script.py").read_text(encoding="utf-8"))


@app.command
def policy(
    *dags: str,
    connection: str = "pgflow",
    wait: Literal["deferrable", "reschedule"] = "deferrable",
    longest_wait: float = 86400.0,
    remove: Annotated[bool, Flag] = False,
    dsn: Dsn = None,
) -> None:
    """Print the task policy that lets tasks move. It runs where Airflow does.

    It lets the tasks of these DAGs ask this database who does them, and the database answer. It needs Airflow, and
    psycopg2 or psycopg. From then on, mirrors of Airflow begin no run of these DAGs: their tasks report them.

    Example: `pgflow-prefect airflow policy etl > pgflow_policy.py`

    Parameters
    ----------
    dags
        The DAGs of the policy, by their ids.
    connection
        The id of the Airflow Connection that has this database's address.
    wait
        How a task waits. deferrable needs Airflow's triggerer, and reschedule none.
    longest_wait
        Seconds that a task without an execution_timeout waits, at most those of 366 days.
    remove
        Print nothing. The tasks of these DAGs ask no more, but for those of runs that go on: Airflow does all of them.
    """
    import anyio

    from pgflow_prefect.airflow.policy import write_policy

    if not dags:
        raise UsageError("which DAGs? name them after `airflow policy`")
    if not 0 < longest_wait <= _LONGEST_WAIT:
        raise UsageError(
            f"--longest-wait is {longest_wait:g}: give the seconds that a task may wait, more than 0 and at most "
            f"{_LONGEST_WAIT}, which is 366 days"
        )
    if remove:
        anyio.run(_remove_dags, make_settings(dsn), dags)
        return
    installation, followed = anyio.run(_name_dags, make_settings(dsn), dags)
    sys.stdout.write(
        write_policy(dags, installation, connection=connection, wait=wait, longest_wait=longest_wait),
    )
    err.print(_NEXT, markup=False)
    if followed:
        err.print(
            f"mirrors of Airflow follow {', '.join(followed)} no more. They go on with the runs that they have begun, "
            "and report the tasks that the policy does not see: keep `airflow mirror` running, or a worker with "
            "PGFLOW_AIRFLOW_DSN",
            markup=False,
        )


async def _remove_dags(settings: Settings, dags: tuple[str, ...]) -> None:
    """Let the tasks of these DAGs ask no more.

    Raises:
        UsageError: the tasks of one of them do not ask.
    """
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.wording import suggest

    async with open_store(settings, size=1) as store:
        asking = await store.list_asking_dags(dags)
        if missing := [slug for slug in dags if slug not in asking]:
            raise UsageError(
                f"the tasks of {missing[0]!r} do not ask this database{suggest(missing[0], asking)}: "
                "there is nothing to remove"
            )
        for each in await store.remove_airflow_dags(dags):
            err.print(_describe_removed(each), markup=False)


def _describe_removed(dag: RemovedDag) -> str:
    moved = f" That is true of {', '.join(dag.moved)}, too, though bound here." if dag.moved else ""
    going_on = f" {dag.going_on} runs go on as they began." if dag.going_on else ""
    return (
        f"the tasks of DAG {dag.workflow_slug!r} ask no more: Airflow executes those of new runs.{moved}{going_on} "
        "Once none of its runs goes on, leave the DAG out of pgflow_policy.py"
    )


async def _name_dags(settings: Settings, dags: tuple[str, ...]) -> tuple[UUID, list[str]]:
    """Let the tasks of these DAGs ask; return the id of the database, and those DAGs that mirrors have followed."""
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        for slug in dags:  # all of them, before the first one may ask
            await store.load_definition(slug)
        named = await store.name_airflow_dags(dags)
        mirrors = {each.workflow_slug for each in await store.list_mirrors()}
        return await store.read_installation(), [slug for slug in dags if slug in named and slug in mirrors]


@app.command
def ledger(dag: str, /, *, directory: Path | None = None, dsn: Dsn = None) -> None:
    """Write into a DAG's ledger which of its tasks Airflow still executes, and print that.

    The part "Left in Airflow" of flows/DAG.ledger.md is written anew each time. All other lines stay as they are.

    Example: `pgflow-prefect airflow ledger etl`

    Parameters
    ----------
    dag
        The DAG's id, and the workflow's slug.
    directory
        The directory of the files. The default is flows.
    """
    import anyio

    from pgflow_prefect.airflow.left import replace_left
    from pgflow_prefect.deployment.code_generation import replace_file
    from pgflow_prefect.deployment.handler_files import DIRECTORY, default_path

    path = default_path(dag, directory or DIRECTORY).with_suffix(".ledger.md")
    lines = anyio.run(_describe_left, make_settings(dsn), dag)
    try:
        page = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UsageError(
            f"{path} can't be read: {reason}. `pgflow-prefect import --from airflow {dag}` writes it"
        ) from error
    replace_file(path, replace_left(page, f"pgflow-prefect airflow ledger {dag}", lines).encode())
    for line in lines:
        out.print(line, markup=False)


async def _describe_left(settings: Settings, dag: str) -> list[str]:
    from pgflow_prefect.airflow.left import describe_left
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.definitions.graph import build_graph, sort_steps

    async with open_store(settings, size=1) as store:
        definition = await store.load_definition(dag)
        rows = await store.list_bindings(dag)
        followed = {each.workflow_slug for each in await store.list_mirrors() if each.enabled}
        asks = dag in await store.list_asking_dags([dag])
    unnamed = "external" if asks or dag in followed else "as its file says"  # a row moves a step, and nothing else
    kinds = {
        step: "child" if step in definition.children else str(rows[step].kind) if step in rows else unnamed
        for step in sort_steps(build_graph(definition))
    }
    return describe_left(dag, kinds, asks=asks, is_followed=dag in followed)


@app.command
def mirror(
    *,
    airflow_dsn: Annotated[str | None, Parameter(show_default=False)] = None,
    health_port: HealthPort = None,
    health_file: HealthFile = None,
    dsn: Dsn = None,
) -> int:
    """Follow the runs of observed DAGs in Airflow's database: write them here, and show them in Prefect.

    It changes nothing in Airflow and executes nothing. `pgflow-prefect observe DAG` says which DAGs are followed. A
    worker or a bridge with PGFLOW_AIRFLOW_DSN does the same. Of several, one follows a DAG at a time. It ends after
    SIGTERM or Ctrl-C, and the next one goes on from there.

    Example: `pgflow-prefect airflow mirror --airflow-dsn postgresql://reader@airflow-db/airflow`

    Parameters
    ----------
    airflow_dsn
        Airflow's metadata database, for a role that may read it: postgresql://USER@HOST/DATABASE. The default is
        PGFLOW_AIRFLOW_DSN.
    """
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.execution.process.signals import run_service
    from pgflow_prefect.prefect_api.client import connect_to_prefect
    from pgflow_prefect.services.airflow import AirflowObserver
    from pgflow_prefect.services.health import Health, open_health

    check_server()
    settings = make_settings(dsn)
    secret = settings.airflow_dsn.get_secret_value() if settings.airflow_dsn is not None else None
    source = airflow_dsn or secret
    if not source:
        raise UsageError("where are the runs? give Airflow's database as --airflow-dsn, or as PGFLOW_AIRFLOW_DSN")
    log_to_console()

    async def serve(switch: Switch) -> None:
        health = Health(settings.statement_bound)
        async with (
            open_health(health, port=health_port, file=health_file),
            open_store(settings) as store,
            connect_to_prefect() as client,
        ):
            service = AirflowObserver(store, client, settings, source)
            switch.attach(drain=health.drains(service.stop), stop=health.drains(service.stop))
            await service.register()
            followed = [each.workflow_slug for each in await store.list_mirrors() if each.enabled]
            names = ", ".join(followed) or "no DAG yet: `pgflow-prefect observe DAG` names one"
            err.print(f"ready: follows {names}", markup=False)
            async with health.watched(store, lambda: service.passed_at):
                await service.run()

    return run_service(serve)
