"""The texts by which Prefect knows our schedules of a deployment, and which of them has created a flow run."""

import re
from uuid import UUID

from prefect.client.schemas.objects import FlowRun

DEFAULT = "default"
"""The name of the schedule of a command without `--schedule-name`."""

_OWN = "pgflow"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,49}")
_OWN_SLUG = re.compile(rf"{_OWN}(?: ({_NAME.pattern}))?(?:: .*)?")
_KEY = re.compile(r"scheduled [0-9a-f-]{36} ([0-9a-f-]{36}) .+")
"""The idempotency key that Prefect's server gives the flow runs of a schedule: deployment, schedule, time."""


def is_schedule_name(name: str) -> bool:
    """Tell whether a schedule of ours may have this name."""
    return _NAME.fullmatch(name) is not None


def make_schedule_slug(name: str, rule: str) -> str:
    """Return the text by which Prefect knows a schedule of ours.

    It contains the rule, because Prefect's UI shows the text in its place.
    """
    return f"{_OWN if name == DEFAULT else f'{_OWN} {name}'}: {rule}"


def read_schedule_name(slug: str | None) -> str | None:
    """Return the name of a schedule of ours; None for one that is not ours."""
    own = _OWN_SLUG.fullmatch(slug or "")
    return (own[1] or DEFAULT) if own is not None else None


def find_creator(flow_run: FlowRun) -> UUID | None:
    """Return Prefect's id of the schedule that has created a flow run; None if no schedule has."""
    found = _KEY.fullmatch(flow_run.idempotency_key or "")
    try:
        return UUID(found[1]) if found is not None else None
    except ValueError:
        return None
