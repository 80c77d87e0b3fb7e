"""The dates of a schedule, as Prefect's own scheduler computes them."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import SCHEDULE_TYPES

from pgflow_prefect.prefect_api.client import ask_prefect

if TYPE_CHECKING:
    from pgflow_prefect.prefect_api.schedule_internals import DatedSchedule

_PAGE = 500
"""The dates that are asked for at once: Prefect looks at a thousand candidates at most."""

_SHORTEST_LOOK, _LONGEST_LOOK = timedelta(minutes=2), timedelta(days=3660)
"""How far back the date before another one is looked for."""

_TICK = timedelta(microseconds=1)


async def list_dates(schedule: SCHEDULE_TYPES, first: datetime, last: datetime, *, at_most: int) -> list[datetime]:
    """Return the dates of a schedule between two moments, both included, in UTC and in their order.

    Args:
        schedule: when runs are due. The dates of an interval are counted from its anchor.
        first: the earliest date.
        last: the latest date.
        at_most: stop after so many dates.
    """
    known = _make_dated(schedule)
    found: list[datetime] = []
    while len(found) < at_most and first <= last:
        if not (page := await _ask(known, first, last)):
            break
        found += page
        first = page[-1] + _TICK
    return found[:at_most]


async def find_previous(schedule: SCHEDULE_TYPES, date: datetime) -> datetime | None:
    """Return the last date of a schedule before another one, in UTC; None if there is none in ten years."""
    known, look = _make_dated(schedule), _SHORTEST_LOOK
    # The shortest look that finds any date finds few.
    while not (found := await _ask(known, date - look, date - _TICK)):
        if look >= _LONGEST_LOOK:
            return None
        look = min(2 * look, _LONGEST_LOOK)
    return max(found)


async def _ask(schedule: "DatedSchedule", first: datetime, last: datetime) -> list[datetime]:
    try:
        return [_to_utc(each) for each in await schedule.get_dates(n=_PAGE, start=first, end=last)]
    except ValueError:  # a cron expression that has no date at all, such as the 31st of February
        return []


async def find_due_before(client: PrefectClient, flow_run: FlowRun) -> datetime | None:
    """Return when the schedule of a scheduled flow run was due before it; None if that is not known.

    Raises:
        PrefectUnavailableError: Prefect does not answer.
        PrefectRefusedError: Prefect refuses to show the deployment.
    """
    due, maker = flow_run.expected_start_time, flow_run.created_by
    if due is None or flow_run.deployment_id is None or maker is None or maker.id is None:
        return None
    with ask_prefect(f"the schedule of flow run {flow_run.id}"):
        deployment = await client.read_deployment(flow_run.deployment_id)
    known = next((each.schedule for each in deployment.schedules if each.id == maker.id), None)
    return None if known is None else await find_previous(known, due)


def find_logical_date(flow_run: FlowRun) -> datetime | None:
    """Return when the schedule of a flow run was due; None if no schedule has made the flow run."""
    if not flow_run.auto_scheduled or flow_run.expected_start_time is None:
        return None
    return _to_utc(flow_run.expected_start_time)


def _make_dated(schedule: SCHEDULE_TYPES) -> "DatedSchedule":
    # Here, because a flow run that no schedule has made must not wait for this import.
    from pgflow_prefect.prefect_api.schedule_internals import make_dated  # noqa: PLC0415

    return make_dated(schedule)


def _to_utc(moment: datetime) -> datetime:
    # Prefect's own dates are of a class that not every library takes for a datetime.
    return datetime.fromtimestamp(moment.timestamp(), UTC)
