"""The classes of Prefect's server that know the dates of a schedule: those of its client don't.

`tests/unit/test_internals.py` compares them with the installed Prefect. Their import takes a while, and only what asks
for dates needs them.
"""

from typing import TypeAlias

from prefect.client.schemas.schedules import SCHEDULE_TYPES
from prefect.client.schemas.schedules import CronSchedule as ClientCronSchedule
from prefect.client.schemas.schedules import IntervalSchedule as ClientIntervalSchedule
from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule

__all__ = ["CronSchedule", "IntervalSchedule", "RRuleSchedule"]

DatedSchedule: TypeAlias = CronSchedule | IntervalSchedule | RRuleSchedule


def make_dated(schedule: SCHEDULE_TYPES) -> DatedSchedule:
    """Return the same schedule as one that knows its dates."""
    values = schedule.model_dump(exclude_none=True)
    if isinstance(schedule, ClientCronSchedule):
        return CronSchedule.model_validate(values)
    if isinstance(schedule, ClientIntervalSchedule):
        return IntervalSchedule.model_validate(values)
    return RRuleSchedule.model_validate(values)
