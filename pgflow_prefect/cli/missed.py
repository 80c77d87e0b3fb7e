"""`backfill --missed`: the dates of a schedule since the latest one that has a run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from pgflow_prefect.definitions.airflow.dag import AirflowDag
    from pgflow_prefect.deployment.backfill_dates import PlannedDates
    from pgflow_prefect.settings import Settings


@dataclass(frozen=True)
class MissedDates:
    """Which dates are looked for, as typed.

    Attributes:
        workflow: its slug, and the id of its DAG.
        cron: a cron expression; without it and `every`, the DAG's schedule counts.
        every: the time from one date to the next.
        timezone: an IANA name.
        airflow_dsn: Airflow's database.
        dag_file: a file of DAGs.
    """

    workflow: str
    cron: str | None
    every: str | None
    timezone: str
    airflow_dsn: str | None
    dag_file: Path | None


async def find_missed(settings: Settings, wanted: MissedDates) -> PlannedDates | None:
    """Return the dates since the latest one that has a run; None if there are none.

    Raises:
        UsageError: there is no schedule, or nothing says where to begin.
    """
    from pgflow_prefect.airflow.schedule import find_options
    from pgflow_prefect.cli.import_foreign import read_one_dag
    from pgflow_prefect.database.store import open_store

    dag: AirflowDag | None = None
    cron, every, timezone = wanted.cron, wanted.every, wanted.timezone
    if cron is None and every is None:
        dag = await read_one_dag(settings, wanted.workflow, wanted.airflow_dsn, wanted.dag_file)
        cron, every, timezone = find_options(dag)
        if cron is None and every is None:
            raise UsageError(f"DAG {dag.dag_id!r} has no schedule, so it has no dates: name them by --cron or --every")
    elif wanted.airflow_dsn is not None or wanted.dag_file is not None:
        raise UsageError("--cron and --every name the schedule: leave out --airflow-dsn and --dag-file")
    async with open_store(settings, size=1) as store:
        await store.load_definition(wanted.workflow)
        latest = await store.find_latest_date(wanted.workflow)
    return await _plan(dag, latest, cron, every, timezone)


async def _plan(
    dag: AirflowDag | None, latest: datetime | None, cron: str | None, every: str | None, timezone: str
) -> PlannedDates | None:
    from pgflow_prefect.database.backfill_statements import MOST_DATES
    from pgflow_prefect.deployment.backfill_dates import NoDatesError, Range, plan_dates
    from pgflow_prefect.wording import parse_duration

    if latest is None:
        first = _find_start(dag)
    else:  # dates of an interval are counted from the latest one
        step = parse_duration(every) if every is not None else None
        first = latest + (step or timedelta(seconds=1))
    now = datetime.now(UTC)
    if first > now:
        return None
    try:
        found = await plan_dates(Range(first.isoformat(), now.isoformat(), cron, every, timezone), MOST_DATES)
    except NoDatesError:
        return None
    if dag is not None and dag.said.get("catchup") is not True:  # Airflow starts a run for the latest date alone
        return found.keep_latest()
    return found


def _find_start(dag: AirflowDag | None) -> datetime:
    """Return when a DAG that has no run yet begins.

    Raises:
        UsageError: that is not known.
    """
    start = None if dag is None else dag.said.get("start_date")
    if isinstance(start, int | float) and not isinstance(start, bool):
        try:
            return datetime.fromtimestamp(start, UTC)
        except (OverflowError, ValueError, OSError):
            pass
    raise UsageError("no run here has a date, so nothing says since when dates were missed: give --from and --to")
