"""Our own schedules of a deployment; schedules that users add stay as they are."""

from dataclasses import dataclass, replace
from datetime import timedelta

from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import SCHEDULE_TYPES, CronSchedule, IntervalSchedule
from pydantic import ValidationError

from pgflow_prefect.errors import UsageError
from pgflow_prefect.prefect_api.schedule_names import DEFAULT, is_schedule_name, read_schedule_name
from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.wording import parse_duration

_UTC = "UTC"


@dataclass(frozen=True)
class ScheduleWish:
    """The wanted state of one of our schedules.

    Attributes:
        schedule: Prefect's schedule; None to delete it.
        name: of the schedule.
        payload: of the runs that it starts; None: the former one stays.
    """

    schedule: CronSchedule | IntervalSchedule | None
    name: str = DEFAULT
    payload: RawJson | None = None


def parse_schedule(
    cron: str | None,
    interval: str | None,
    timezone: str | None,
    remove: bool,
    *,
    name: str | None = None,
    payload: str | None = None,
) -> ScheduleWish | None:
    """Return the wanted state of one of our schedules; None without an option for it.

    Args:
        cron: a cron expression.
        interval: such as 30s, 15m, 2h, 1d, 1h30m.
        timezone: an IANA name; by default UTC.
        remove: delete it.
        name: of the schedule; by default `DEFAULT`.
        payload: JSON text.

    Raises:
        UsageError: one of them is wrong, or they contradict each other.
    """
    if sum((cron is not None, interval is not None, remove)) > 1:
        raise UsageError("--cron, --interval and --no-schedule exclude each other: name one")
    made = ScheduleWish(None, _check_name(name), RawJson(payload) if payload is not None else None)
    if cron is not None:
        return replace(made, schedule=_make_cron(cron, _check_timezone(timezone)))
    if interval is not None:
        return replace(made, schedule=_make_interval(interval, _check_timezone(timezone)))
    for option, value in (("--timezone", timezone), ("--payload", payload)):
        if value is not None:
            raise UsageError(f"{option} goes with --cron or --interval")
    if remove:
        return made
    if name is not None:
        raise UsageError("--schedule-name goes with --cron, --interval or --no-schedule")
    return None


def list_own(deployment: DeploymentResponse) -> dict[str, DeploymentSchedule]:
    """Return our schedules of a deployment, by their names."""
    found: dict[str, DeploymentSchedule] = {}
    for each in deployment.schedules:
        if (name := read_schedule_name(each.slug)) is not None:
            found.setdefault(name, each)
    return found


def name_field(name: str) -> str:
    """Return how people read of one of our schedules."""
    return "schedule" if name == DEFAULT else f"schedule {name}"


def is_same(one: SCHEDULE_TYPES, other: SCHEDULE_TYPES) -> bool:
    """Tell whether two schedules mean the same; the start of an interval makes no difference."""
    return _describe_rule(one) == _describe_rule(other) and _find_timezone(one) == _find_timezone(other)


def describe_schedule(schedule: SCHEDULE_TYPES) -> str:
    """Return when a schedule starts runs, in a few words."""
    return f"{_describe_rule(schedule)} ({_find_timezone(schedule)})"


def _describe_rule(schedule: SCHEDULE_TYPES) -> str:
    if isinstance(schedule, CronSchedule):
        return f"cron {schedule.cron}"
    if isinstance(schedule, IntervalSchedule):
        return f"every {schedule.interval}"
    return str(getattr(schedule, "rrule", "no schedule"))


def _find_timezone(schedule: SCHEDULE_TYPES) -> str:
    return getattr(schedule, "timezone", None) or _UTC


def _check_name(name: str | None) -> str:
    if name is None:
        return DEFAULT
    if not is_schedule_name(name):
        raise UsageError(
            f"--schedule-name {name!r} is no name of a schedule: take up to 50 letters, digits, dots, dashes and "
            "underscores, as in nightly"
        )
    return name


def _check_timezone(timezone: str | None) -> str:
    try:
        return CronSchedule(cron="* * * * *", timezone=timezone or _UTC).timezone or _UTC
    except ValidationError:
        raise UsageError(
            f"--timezone {timezone!r} is no time zone that Prefect knows: write it as Europe/Berlin or UTC"
        ) from None


def _make_cron(cron: str, timezone: str) -> CronSchedule:
    try:
        return CronSchedule(cron=cron, timezone=timezone)
    except ValidationError:
        raise UsageError(
            f"--cron {cron!r} is no cron expression: minute, hour, day, month, weekday, as in '0 9 * * 1-5'"
        ) from None


def _make_interval(interval: str, timezone: str) -> IntervalSchedule:
    length = parse_duration(interval, "smhd")
    try:
        return IntervalSchedule(interval=length or timedelta(), timezone=timezone)
    except ValidationError:
        raise UsageError(
            f"--interval {interval!r} is no length of time: write it as 30s, 15m, 2h, 1d or 1h30m"
        ) from None
