"""Items of maps: claims, reports, and how a map stands."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from pgflow_prefect.models.reports import Report
from pgflow_prefect.models.status import Status
from pgflow_prefect.raw_json import RawJson


@dataclass(frozen=True, slots=True)
class ClaimedItem:
    """An item of a map that this process has claimed.

    Attributes:
        index: its place in the array.
        attempt: which execution of it this is.
        item: its value.
    """

    index: int
    attempt: int
    item: RawJson


class Doing(StrEnum):
    """What is reported of an item of a map."""

    COMPLETE = "complete"
    SKIP = "skip"
    """It is left out of the map's result."""
    FAIL = "fail"
    RETRY = "retry"
    """It is to be claimed again, after a pause."""
    DEFER = "defer"
    """Another program reports it; it is to be claimed again after the pause, if there is one."""


class ItemReport(NamedTuple):
    """The report on one item of a map.

    Attributes:
        item_index: its place in the array.
        attempt: from the claim.
        doing: what is reported.
        result: JSON text, of a completed item.
        message: why it failed, or is left out, for people.
        pause: in seconds.
    """

    item_index: int
    attempt: int
    doing: Doing
    result: str | None = None
    message: str | None = None
    pause: float | None = None


class MapState(BaseModel):
    """How a map stands, after reports on items of it.

    Attributes:
        report: the state of its step.
        run_status: of the run.
        total: how many items it has; None for a map that has ended without items.
        remaining: how many have not ended.
        failed: how many have failed.
        next_due: in how many seconds an item can be claimed again; None where none has such a time, or was asked for.
        items: what was claimed.
    """

    model_config = ConfigDict(frozen=True)

    report: Report
    run_status: Status
    total: int | None
    remaining: int | None
    failed: int | None
    next_due: float | None
    items: tuple[ClaimedItem, ...]
