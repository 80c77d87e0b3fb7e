"""The line of the ledger about when a DAG runs."""

import shlex

from pgflow_prefect.definitions.airflow.dag import AirflowDag
from pgflow_prefect.definitions.airflow.schedule import ScheduleKind
from pgflow_prefect.definitions.origin import LedgerLine
from pgflow_prefect.errors import UsageError
from pgflow_prefect.wording import write_code


def describe_schedule(dag: AirflowDag) -> LedgerLine:
    """Return when a DAG runs, and the command that deploys that here."""
    schedule, slug = dag.schedule, shlex.quote(dag.dag_id)
    zone = "" if schedule.timezone == "UTC" else f" --timezone {shlex.quote(schedule.timezone)}"
    period = (
        " Airflow's logical date is the beginning of the data interval. Here it is the end, when the run is due."
        if schedule.has_interval
        else ""
    )
    match schedule.kind:
        case ScheduleKind.NONE:
            says, is_done = "None: a run is started by hand or by a program.", True
        case ScheduleKind.CRON:
            command = f"pgflow-prefect deploy {slug} --cron {shlex.quote(schedule.cron or '')}{zone}"
            says, is_done = (
                f"{write_code(schedule.cron or '')}. When the steps are yours: {write_code(command)}.{period}",
                False,
            )
        case ScheduleKind.INTERVAL:
            command = f"pgflow-prefect deploy {slug} --interval {write_interval(schedule.seconds or 0)}{zone}"
            says, is_done = (
                f"Every {schedule.seconds:g} seconds. When the steps are yours: {write_code(command)}.{period}",
                False,
            )
        case ScheduleKind.ONCE:
            says, is_done = f"Once. Start the run: {write_code(f'pgflow-prefect run {slug}')}.", False
        case ScheduleKind.CONTINUOUS:
            says, is_done = "A run follows the other. Let the last step start the next run in SQL.", False
        case ScheduleKind.ASSETS:
            says, is_done = (
                f"By assets: {write_code(schedule.text)}. Let what updates them start a run in SQL.",
                False,
            )
        case _:
            named = write_code(schedule.name or "unknown")
            says, is_done = (
                f"The timetable {named} can't be read: {write_code(schedule.text)}. Write its schedule by hand.",
                False,
            )
    return LedgerLine(None, "schedule", says, is_done)


def find_options(dag: AirflowDag) -> tuple[str | None, str | None, str]:
    """Return when a DAG runs, as the options of `deploy` and `backfill` have it: cron, interval and timezone.

    Without a schedule, there is neither cron nor interval.

    Raises:
        UsageError: it runs by something else than the time.
    """
    schedule = dag.schedule
    match schedule.kind:
        case ScheduleKind.NONE:
            return None, None, schedule.timezone
        case ScheduleKind.CRON:
            return schedule.cron, None, schedule.timezone
        case ScheduleKind.INTERVAL:
            return None, write_interval(schedule.seconds or 0), schedule.timezone
    raise UsageError(
        f"the schedule of DAG {dag.dag_id!r} can't be taken over: {describe_schedule(dag).says} "
        "Deploy it without --as-in-airflow"
    )


def write_interval(seconds: float) -> str:
    """Return a time as options have it, such as 4h."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"
