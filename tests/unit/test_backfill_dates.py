"""The dates of a backfill are those of Prefect's own scheduler, across the changes of clocks, too."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from prefect.client.schemas.schedules import CronSchedule
from prefect.server.schemas.schedules import CronSchedule as ServerCronSchedule

from pgflow_prefect.deployment.backfill_dates import PlannedDates, Range, plan_dates
from pgflow_prefect.errors import UsageError
from pgflow_prefect.prefect_api.schedules import find_previous, list_dates

pytestmark = pytest.mark.anyio

BERLIN = "Europe/Berlin"


async def plan(
    first: str,
    last: str,
    *,
    cron: str | None = None,
    every: str | None = None,
    timezone: str = "UTC",
    most: int = 10_000,
) -> PlannedDates:
    return await plan_dates(Range(first, last, cron, every, timezone), most)


def local(dates: tuple[datetime, ...], timezone: str = BERLIN) -> list[str]:
    return [each.astimezone(ZoneInfo(timezone)).strftime("%m-%d %H:%M%z") for each in dates]


async def test_a_cron_expression_has_the_dates_of_its_weekdays() -> None:
    planned = await plan("2026-01-01", "2026-01-06", cron="0 9 * * 1-5")
    assert planned.dates == tuple(datetime(2026, 1, day, 9, tzinfo=UTC) for day in (1, 2, 5, 6))
    # The data of the first date begin with the date before it, which is none of the backfill's.
    assert planned.interval_starts == (datetime(2025, 12, 31, 9, tzinfo=UTC), *planned.dates[:-1])
    assert planned.description == "cron 0 9 * * 1-5 (UTC)"


async def test_a_local_time_stays_when_the_clocks_change() -> None:
    spring = await plan("2026-03-28", "2026-03-30", cron="0 9 * * *", timezone=BERLIN)
    assert local(spring.dates) == ["03-28 09:00+0100", "03-29 09:00+0200", "03-30 09:00+0200"]
    autumn = await plan("2025-10-25", "2025-10-27", every="1d", timezone=BERLIN)
    assert local(autumn.dates) == ["10-25 00:00+0200", "10-26 00:00+0200", "10-27 00:00+0100"]


async def test_a_time_that_the_clocks_skip_or_repeat_has_one_date() -> None:
    spring = await plan("2026-03-28", "2026-03-30", cron="30 2 * * *", timezone=BERLIN)
    assert len(spring.dates) == len(set(spring.dates)) == 3
    autumn = await plan("2025-10-25", "2025-10-27", cron="30 2 * * *", timezone=BERLIN)
    assert len(autumn.dates) == len(set(autumn.dates)) == 3


async def test_hours_are_hours_when_the_clocks_change() -> None:
    planned = await plan("2026-03-29", "2026-03-29", every="1h", timezone=BERLIN)
    assert len(planned.dates) == 23, "the day has an hour less"
    assert {later - earlier for earlier, later in zip(planned.dates, planned.dates[1:], strict=False)} == {
        timedelta(hours=1)
    }


@pytest.mark.parametrize("cron", ["0 9 * * *", "30 2 * * *", "*/20 * * * *", "0 0 1 * *", "0 12 29 2 *"])
@pytest.mark.parametrize("timezone", ["UTC", BERLIN, "America/New_York"])
async def test_the_dates_are_those_of_prefects_scheduler(cron: str, timezone: str) -> None:
    first, last = datetime(2025, 10, 20, tzinfo=UTC), datetime(2025, 11, 10, tzinfo=UTC)
    known = ServerCronSchedule(cron=cron, timezone=timezone)
    expected, start = [], first  # as its scheduler goes on: from the last date that it knows
    while page := await known.get_dates(n=10, start=start, end=last):
        expected += page
        start = page[-1] + timedelta(seconds=1)
    found = await list_dates(CronSchedule(cron=cron, timezone=timezone), first, last, at_most=10_000)
    assert found == [datetime.fromtimestamp(each.timestamp(), UTC) for each in expected]


async def test_the_date_before_another_one_is_found_years_back() -> None:
    leap = CronSchedule(cron="0 12 29 2 *", timezone="UTC")
    assert await find_previous(leap, datetime(2024, 2, 29, 12, tzinfo=UTC)) == datetime(2020, 2, 29, 12, tzinfo=UTC)
    assert await find_previous(CronSchedule(cron="0 0 31 2 *"), datetime(2024, 1, 1, tzinfo=UTC)) is None


async def test_a_moment_counts_to_the_second_and_a_day_as_a_whole() -> None:
    planned = await plan("2026-01-01T06:00", "2026-01-01T12:00", every="3h", timezone=BERLIN)
    assert local(planned.dates) == ["01-01 06:00+0100", "01-01 09:00+0100", "01-01 12:00+0100"]
    offset = await plan("2026-01-01T06:00+02:00", "2026-01-01T07:00+02:00", every="1h", timezone=BERLIN)
    assert offset.dates[0] == datetime(2026, 1, 1, 4, tzinfo=UTC)
    day = await plan("2026-01-01", "2026-01-01", cron="59 23 * * *")
    assert day.dates == (datetime(2026, 1, 1, 23, 59, tzinfo=UTC),)


async def test_more_than_a_thousand_dates_are_found() -> None:
    planned = await plan("2025-01-01", "2025-03-31", every="1h")
    assert len(planned.dates) == 90 * 24


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"cron": "0 9 * *"}, "--cron '0 9 \\* \\*' is no cron expression"),
        ({"cron": "0 9 * * *", "every": "1d"}, "give one of --cron"),
        ({}, "give one of --cron"),
        ({"every": "30s"}, "--every '30s' is no time of a minute or more"),
        ({"every": "often"}, "--every 'often' is no time"),
        ({"every": "1d", "timezone": "Mars/Olympus"}, "--timezone 'Mars/Olympus' is no time zone"),
        ({"every": "1d", "first": "2026-02-30"}, "--from '2026-02-30' is neither a day"),
        ({"every": "1d", "last": "soon"}, "--to 'soon' is neither a day"),
        ({"every": "1d", "first": "2026-02-01"}, "--from 2026-02-01 is later than --to 2026-01-31"),
        ({"cron": "0 0 31 2 *"}, "has no date from 2026-01-01 to 2026-01-31"),
        ({"every": "1h", "most": 10}, "has more than 10 dates"),
        ({"every": "1d", "last": "2999-01-01", "first": "2998-12-31"}, "lies in the future"),
    ],
)
async def test_a_range_that_can_not_be_meant_is_refused(options: dict[str, str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        await plan(**({"first": "2026-01-01", "last": "2026-01-31"} | options))  # type: ignore[arg-type]
