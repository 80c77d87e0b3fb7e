"""The dates of a backfill, from what a user types."""

from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from pgflow_prefect.deployment.deployments.schedules import describe_schedule, parse_schedule
from pgflow_prefect.errors import UsageError
from pgflow_prefect.prefect_api.schedules import find_previous, list_dates
from pgflow_prefect.wording import parse_duration, write_moment

_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Range:
    """Which dates a user asks for, as typed.

    Attributes:
        first: a day, or a moment.
        last: a day, which counts as a whole, or a moment.
        cron: a cron expression.
        every: the time from one date to the next; a backfill has one of the two.
        timezone: an IANA name.
    """

    first: str
    last: str
    cron: str | None
    every: str | None
    timezone: str


@dataclass(frozen=True)
class PlannedDates:
    """The dates of a backfill, in UTC and in their order.

    Attributes:
        dates: the logical dates.
        interval_starts: for each, the date before it on the schedule; None if there is none.
        description: the schedule, for people.
    """

    dates: tuple[datetime, ...]
    interval_starts: tuple[datetime | None, ...]
    description: str

    def keep_latest(self) -> "PlannedDates":
        """Return the latest date alone."""
        return replace(self, dates=self.dates[-1:], interval_starts=self.interval_starts[-1:])


class NoDatesError(UsageError):
    """A schedule has no date in a range."""


async def plan_dates(wanted: Range, at_most: int) -> PlannedDates:
    """Return the dates that a schedule has in a range.

    Args:
        wanted: the range.
        at_most: the most dates that there may be.

    Raises:
        UsageError: a part of the range is wrong, or it has no dates, too many, or dates of the future.
    """
    schedule = _make_schedule(wanted)
    zone = ZoneInfo(schedule.timezone or "UTC")
    first, last = _read_moment(wanted.first, "--from", zone), _read_moment(wanted.last, "--to", zone, is_end=True)
    if first > last:
        raise UsageError(f"--from {wanted.first} is later than --to {wanted.last}: exchange them")
    if isinstance(schedule, IntervalSchedule):
        schedule = schedule.model_copy(update={"anchor_date": first})
    dates = await list_dates(schedule, first, last, at_most=at_most + 1)
    described = describe_schedule(schedule) or ""
    if not dates:
        raise NoDatesError(f"the schedule {described} has no date from {wanted.first} to {wanted.last}")
    if len(dates) > at_most:
        raise UsageError(
            f"the schedule {described} has more than {at_most:,} dates from {wanted.first} to {wanted.last}: "
            "start several backfills, one after the other"
        )
    if dates[-1] > datetime.now(UTC):
        raise UsageError(
            f"the date {write_moment(dates[-1])} lies in the future: choose an earlier --to. "
            "A schedule starts a run when its date has come"
        )
    before = await find_previous(schedule, dates[0])
    return PlannedDates(tuple(dates), (before, *dates[:-1]), described)


def _make_schedule(wanted: Range) -> CronSchedule | IntervalSchedule:
    if (wanted.cron is None) == (wanted.every is None):
        raise UsageError('which dates? give one of --cron "0 9 * * 1-5" and --every 1d')
    length = None
    if wanted.every is not None:
        length = parse_duration(wanted.every)
        if length is None or length < timedelta(minutes=1):
            raise UsageError(f"--every {wanted.every!r} is no time of a minute or more: write it as 15m, 6h, 1d or 1w")
    wish = parse_schedule(
        wanted.cron, None if length is None else f"{length.total_seconds():.0f}s", wanted.timezone, False
    )
    assert wish is not None
    assert wish.schedule is not None
    return wish.schedule


def _read_moment(text: str, option: str, zone: ZoneInfo, *, is_end: bool = False) -> datetime:
    """Return the moment that a user means, in UTC: a day begins at midnight, and ends with its last moment."""
    try:
        if len(text) <= len("2026-01-01"):
            day = date.fromisoformat(text)
            moment = datetime.combine(day + _DAY if is_end else day, time(), zone)
            return moment.astimezone(UTC) - (timedelta(microseconds=1) if is_end else timedelta())
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=zone)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise UsageError(
            f"{option} {text!r} is neither a day like 2026-01-31 nor a moment like 2026-01-31T09:30"
        ) from None
