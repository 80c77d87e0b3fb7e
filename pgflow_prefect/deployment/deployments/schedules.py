"""Our own schedule of a deployment; schedules that users add stay as they are."""

import re
from dataclasses import dataclass
from datetime import timedelta

from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import SCHEDULE_TYPES, CronSchedule, IntervalSchedule
from pydantic import ValidationError

from pgflow_prefect.errors import UsageError
from pgflow_prefect.wording import parse_duration

_OWN = "pgflow"
_OWN_NAME = re.compile(rf"{_OWN}(?:: .*)?")

_UTC = "UTC"


@dataclass(frozen=True)
class ScheduleWish:
    """The wanted state of our schedule.

    Attributes:
        schedule: Prefect's schedule; None to delete it.
    """

    schedule: CronSchedule | IntervalSchedule | None


def parse_schedule(cron: str | None, interval: str | None, timezone: str | None, remove: bool) -> ScheduleWish | None:
    """Return the wanted state of our schedule; None without an option for it.

    Args:
        cron: a cron expression.
        interval: such as 30s, 15m, 2h, 1d, 1h30m.
        timezone: an IANA name; by default UTC.
        remove: delete it.

    Raises:
        UsageError: one of them is wrong, or they contradict each other.
    """
    if sum((cron is not None, interval is not None, remove)) > 1:
        raise UsageError("--cron, --interval and --no-schedule exclude each other: name one")
    if remove:
        if timezone is not None:
            raise UsageError("--timezone goes with --cron or --interval")
        return ScheduleWish(None)
    if cron is not None:
        return ScheduleWish(_make_cron(cron, _check_timezone(timezone)))
    if interval is not None:
        return ScheduleWish(_make_interval(interval, _check_timezone(timezone)))
    if timezone is not None:
        raise UsageError("--timezone goes with --cron or --interval")
    return None


def find_own(deployment: DeploymentResponse) -> DeploymentSchedule | None:
    """Return our schedule of a deployment."""
    return next((each for each in deployment.schedules if _OWN_NAME.fullmatch(each.slug or "")), None)


def name_schedule(schedule: SCHEDULE_TYPES) -> str:
    """Return the name of our schedule. It contains the rule, because Prefect's UI shows the name in its place."""
    return f"{_OWN}: {describe_schedule(schedule)}"


def is_same(one: SCHEDULE_TYPES, other: SCHEDULE_TYPES) -> bool:
    """Tell whether two schedules mean the same; the start of an interval makes no difference."""
    return _describe_rule(one) == _describe_rule(other) and _find_timezone(one) == _find_timezone(other)


def describe_schedule(schedule: SCHEDULE_TYPES | None) -> str | None:
    """Return when a schedule starts runs, in a few words."""
    if schedule is None:
        return None
    return f"{_describe_rule(schedule)} ({_find_timezone(schedule)})"


def _describe_rule(schedule: SCHEDULE_TYPES) -> str:
    if isinstance(schedule, CronSchedule):
        return f"cron {schedule.cron}"
    if isinstance(schedule, IntervalSchedule):
        return f"every {schedule.interval}"
    return str(getattr(schedule, "rrule", "no schedule"))


def _find_timezone(schedule: SCHEDULE_TYPES) -> str:
    return getattr(schedule, "timezone", None) or _UTC


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
