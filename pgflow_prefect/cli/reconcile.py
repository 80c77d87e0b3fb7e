"""`reconcile`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pgflow_prefect.cli.console import err, out, print_error, print_json, print_table
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, make_settings
from pgflow_prefect.errors import PrefectUnavailableError

if TYPE_CHECKING:
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.deployment.reconciliation.disagreements import Disagreement
    from pgflow_prefect.settings import Settings


def reconcile(
    *,
    apply: Annotated[bool, Flag] = False,
    everything: Annotated[bool, Parameter(name="--all", negative="", show_default=False)] = False,
    json: AsJson = False,
    dsn: Dsn = None,
) -> int:
    """Compare PostgreSQL with Prefect. Name every disagreement and its repair.

    With PGFLOW_AIRFLOW_DSN, also compare the runs that Airflow executes with Airflow's database.

    PostgreSQL is the truth, except for Cancel in Prefect, and for what Airflow executes. Changes of the last seconds
    are left alone. The exit code is 1 if a disagreement is left, or if Prefect can't be asked.

    Example: `pgflow-prefect reconcile --apply`

    Parameters
    ----------
    apply
        Repair the disagreements. This also ends flow runs of this installation, and of none, that have no run in the
        database. Flow runs of another installation stay as they are.
    everything
        Also look at ended runs that agreed at an earlier look.
    """
    import anyio

    found, unavailable, without_airflow = anyio.run(_reconcile, make_settings(dsn), apply, everything)
    if json:
        print_json(found)
    elif found:
        print_table(
            ("class", "run", "workflow", "what is", "repair"), [_describe(each) for each in found], whole=("run",)
        )
    elif not (unavailable or without_airflow):
        out.print("PostgreSQL and Prefect agree")
    if without_airflow:
        print_error(
            without_airflow,
            hint="Its runs were not compared with Airflow. All others were compared with Prefect",
            code=1,
        )
    if unavailable:
        return print_error(
            unavailable, hint="Prefect could not be asked. These disagreements follow from the rows alone", code=1
        )
    return _conclude(found, apply=apply) or int(without_airflow is not None)


def _conclude(found: Sequence[Disagreement], *, apply: bool) -> int:
    left = sum(not each.repaired for each in found)
    if left and apply:
        return print_error(f"{left} of {len(found)} repairs failed", hint="they are named above", code=1)
    if left:
        err.print("pgflow-prefect reconcile --apply repairs this", markup=False)
    return int(left > 0)


def _describe(each: Disagreement) -> tuple[str, ...]:
    repair = f"{each.repair}; failed: {each.error}" if each.error else each.repair
    return (each.kind, str(each.run_id or "-"), each.workflow_slug, each.found, repair)


async def _reconcile(
    settings: Settings, apply: bool, everything: bool
) -> tuple[list[Disagreement], str | None, str | None]:
    """Return the disagreements, the reason if Prefect could not be asked, and that if Airflow could not."""
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.deployment.reconciliation.given_up import end_given_up
    from pgflow_prefect.deployment.reconciliation.lost_messages import restore_lost_messages
    from pgflow_prefect.prefect_api.client import has_server

    if not has_server():
        err.print(
            "PREFECT_API_URL is not set. Prefect starts a temporary server, which takes some seconds", markup=False
        )
    async with open_store(settings, size=1, executes_moved=True) as store:
        lost = await restore_lost_messages(store, apply=apply)
        given_up = await end_given_up(store, apply=apply)
        of_airflow, without_airflow = await _compare_with_airflow(store, settings, apply, everything)
        found, unavailable = await _compare(store, settings, apply, everything)
        return [*lost, *given_up, *of_airflow, *found], unavailable, without_airflow


async def _compare_with_airflow(
    store: Store, settings: Settings, apply: bool, everything: bool
) -> tuple[list[Disagreement], str | None]:
    """Return the disagreements, and the reason if Airflow could not be asked: Prefect is compared all the same."""
    from pgflow_prefect.errors import PgflowPrefectError
    from pgflow_prefect.services.airflow_comparison import compare_with_airflow

    try:
        return await compare_with_airflow(store, settings, apply=apply, everything=everything), None
    except PgflowPrefectError as error:
        await store.drop_broken_connections()  # if it was this database, the next statement says so
        return [], str(error)


async def _compare(
    store: Store, settings: Settings, apply: bool, everything: bool
) -> tuple[list[Disagreement], str | None]:
    from pgflow_prefect.deployment.reconciliation.failures import make_teller
    from pgflow_prefect.deployment.reconciliation.reconcile import GRACE, list_without_prefect
    from pgflow_prefect.deployment.reconciliation.reconcile import reconcile as compare
    from pgflow_prefect.prefect_api.client import connect_to_prefect
    from pgflow_prefect.services.heartbeat import Heartbeat

    try:
        async with connect_to_prefect() as client:
            if apply:
                await Heartbeat(store, client).register()
            tell = make_teller(settings.events)
            found = await compare(
                store, client, apply=apply, everything=everything, strangers=True, lag=GRACE, tell=tell
            )
            return found, None
    except PrefectUnavailableError as error:
        return await list_without_prefect(store, everything=everything), str(error)
