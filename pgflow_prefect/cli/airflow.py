"""`airflow`."""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

from pgflow_prefect.cli.console import err
from pgflow_prefect.cli.options import Dsn, make_settings
from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from uuid import UUID

    from pgflow_prefect.settings import Settings

_NEXT = """\
put it as pgflow_policy.py into Airflow's folder config, and this line into airflow_local_settings.py there:
    from pgflow_policy import task_policy
then restart Airflow's scheduler, workers and triggerer. `pgflow-prefect guide airflow-tasks` has the rest"""


def airflow(
    what: Literal["dump", "policy"],
    /,
    *dags: str,
    connection: str = "pgflow",
    wait: Literal["deferrable", "reschedule"] = "deferrable",
    longest_wait: float = 86400.0,
    dsn: Dsn = None,
) -> None:
    """Print a file for where Airflow runs: the script that writes serialized DAGs, or the policy that lets tasks move.

    `dump` prints a script that needs the standard library and Airflow. It reads Airflow's database and executes no DAG
    file. `python dump.py etl > etl.json` writes a DAG, and `python dump.py --help` shows the options.

    `policy` prints a task policy. It lets the tasks of these DAGs ask this database who does them, and the database
    answer. It needs Airflow, and psycopg2 or psycopg.

    Example: `pgflow-prefect airflow policy etl > pgflow_policy.py`

    Parameters
    ----------
    what
        dump or policy.
    dags
        The DAGs of the policy, by their ids.
    connection
        With policy: the id of the Airflow Connection that has this database's address.
    wait
        With policy: how a task waits. deferrable needs Airflow's triggerer, and reschedule none.
    longest_wait
        With policy: seconds that a task without an execution_timeout waits.
    """
    import anyio

    if what == "dump":
        if dags:
            raise UsageError(f"`airflow dump` names no DAG: give {dags[0]!r} to the script that it prints")
        sys.stdout.write(files("pgflow_prefect.airflow").joinpath("dump_script.py").read_text(encoding="utf-8"))
        return
    from pgflow_prefect.airflow.policy import write_policy

    if not dags:
        raise UsageError("which DAGs? name them after `airflow policy`")
    if not longest_wait > 0 or longest_wait == float("inf"):
        raise UsageError(f"--longest-wait is {longest_wait:g}: give the seconds that a task may wait, more than 0")
    installation = anyio.run(_name_dags, make_settings(dsn), dags)
    sys.stdout.write(
        write_policy(dags, installation, connection=connection, wait=wait, longest_wait=longest_wait),
    )
    err.print(_NEXT, markup=False)


async def _name_dags(settings: Settings, dags: tuple[str, ...]) -> UUID:
    """Let the tasks of these DAGs ask, and return the id of the database."""
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        for slug in dags:  # all of them, before the first one may ask
            await store.load_definition(slug)
        await store.name_airflow_dags(dags)
        return await store.read_installation()
