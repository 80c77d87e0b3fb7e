"""The part of the store for backfills: runs of a workflow for dates of the past."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from pgflow_prefect.database.link import without_bound
from pgflow_prefect.database.statements import Statements
from pgflow_prefect.errors import UnknownBackfillError
from pgflow_prefect.models import EndedAs, Shown, Status

MOST_DATES = 10_000
"""The most dates of a backfill, as `pgflow.check_backfill` has it."""

PORTION = 200
"""The most dates of a backfill that one statement decides."""


class OnExisting(StrEnum):
    """What a backfill does with a date that has a run."""

    NONE = "none"
    """It leaves the run as it is."""

    FAILED = "failed"
    """It reopens the run if that has failed."""

    ALL = "all"
    """It starts another run if the latest one has ended."""


class BackfillStatus(StrEnum):
    """The status of a backfill."""

    RUNNING = "running"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    COMPLETED = "completed"


class DateState(StrEnum):
    """The state of a date of a backfill."""

    PLANNED = "planned"
    STARTED = "started"
    ENDED = "ended"
    LEFT = "left"


class Action(StrEnum):
    """What a backfill would do with a date."""

    START = "start"
    REOPEN = "reopen"
    LEAVE = "leave"


class WantedBackfill(BaseModel):
    """A backfill that is to be started.

    Attributes:
        workflow_slug: the workflow.
        dates: the logical dates of its runs.
        interval_starts: for each date, where its data interval begins; None where that is not known.
        payload: a JSON object as text; each run finds its date in it.
        max_active: the most runs under way at once.
        on_existing: what becomes of a date that has a run.
        newest_first: begins with the latest date.
        stop_on_failure: a run that fails pauses the backfill.
        schedule: which made the dates, for people.
    """

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    dates: tuple[datetime, ...]
    interval_starts: tuple[datetime | None, ...] | None = None
    payload: str = "{}"
    max_active: int = 1
    on_existing: OnExisting = OnExisting.NONE
    newest_first: bool = False
    stop_on_failure: bool = False
    schedule: str | None = None


class PreviewedDate(BaseModel):
    """What a backfill would do with a date, and the run that the date has."""

    model_config = ConfigDict(frozen=True)

    logical_date: datetime
    action: Action
    run_id: UUID | None
    status: Status | None


class Backfill(BaseModel):
    """A backfill, with the number of its dates in each state, and of its ended runs that have failed."""

    model_config = ConfigDict(frozen=True)

    id: int
    workflow_slug: str
    status: BackfillStatus
    note: Shown | None
    """Why it is paused, or was cancelled."""
    schedule: Shown | None
    max_active: int
    on_existing: OnExisting
    newest_first: bool
    stop_on_failure: bool
    created_by: Shown
    created_at: datetime
    finished_at: datetime | None
    first: datetime | None
    last: datetime | None
    planned: int
    started: int
    ended: int
    left_out: int
    failed: int


class BackfillDate(BaseModel):
    """A date of a backfill, and its run; `status` is None where the run was deleted, or is still to be started."""

    model_config = ConfigDict(frozen=True)

    logical_date: datetime
    interval_start: datetime | None
    interval_end: datetime | None
    state: DateState
    run_id: UUID | None
    status: Status | None
    ended_as: EndedAs = Field(default=None, validate_default=True)
    note: Shown | None
    """Why it was left."""


class AdvancedBackfill(BaseModel):
    """What a look at a backfill has done.

    Attributes:
        backfill_id: the backfill.
        decided: how many of its dates were decided.
        problem: the error that kept a run from being started.
        is_paused: the backfill waits for a person because of that.
    """

    model_config = ConfigDict(frozen=True)

    backfill_id: int
    decided: int
    problem: Shown | None
    is_paused: bool


class BackfillStatements(Statements):
    """Starts, shows and moves backfills."""

    async def start_backfill(self, wanted: WantedBackfill) -> int:
        """Plan a run for each date, start the first ones, and return the id of the backfill.

        Raises:
            UsageError: there is no such workflow, or it can't run; or a date, the payload or a number is refused.
        """
        with without_bound():
            [row] = await self._fetch(
                "start_backfill",
                **wanted.model_dump(exclude={"dates", "interval_starts"}),
                dates=[*wanted.dates],
                interval_starts=None if wanted.interval_starts is None else [*wanted.interval_starts],
            )
        return int(str(row["id"]))

    async def preview_backfill(
        self, workflow_slug: str, dates: Sequence[datetime], on_existing: OnExisting
    ) -> list[PreviewedDate]:
        """Return what a backfill would do with each of these dates, in their order.

        Raises:
            UsageError: there is no such workflow, or a date is refused.
        """
        rows = await self._fetch(
            "preview_backfill", workflow_slug=workflow_slug, dates=[*dates], on_existing=on_existing
        )
        return [PreviewedDate.model_validate(row) for row in rows]

    async def find_latest_date(self, workflow_slug: str) -> datetime | None:
        """Return the latest date of a workflow that has a run, of a schedule or a backfill; None if none has."""
        [row] = await self._fetch("find_latest_date", workflow_slug=workflow_slug)
        found = row["latest"]
        assert found is None or isinstance(found, datetime)
        return found

    async def list_backfills(self, workflow_slug: str | None = None, *, limit: int = 20) -> list[Backfill]:
        """Return the newest backfills first, at most `limit`: of one workflow, or all."""
        rows = await self._fetch("list_backfills", backfill_id=None, workflow_slug=workflow_slug, limit=limit)
        return [Backfill.model_validate(row) for row in rows]

    async def read_backfill(self, backfill_id: int) -> Backfill:
        """Return a backfill.

        Raises:
            UnknownBackfillError: there is none of this id.
        """
        rows = await self._fetch("list_backfills", backfill_id=backfill_id, workflow_slug=None, limit=1)
        if not rows:
            raise UnknownBackfillError(
                f"unknown backfill {backfill_id}; `pgflow-prefect backfill list` shows the newest"
            )
        return Backfill.model_validate(rows[0])

    async def list_backfill_dates(self, backfill_id: int, state: DateState | None = None) -> list[BackfillDate]:
        """Return the dates of a backfill in their order: all, or those in this state."""
        rows = await self._fetch("list_backfill_dates", backfill_id=backfill_id, state=state)
        return [BackfillDate.model_validate(row) for row in rows]

    async def pause_backfill(self, backfill_id: int, reason: str | None) -> None:
        """Start no further date; runs under way go on. A paused backfill stays as it is.

        Raises:
            PgflowPrefectError: there is no such backfill, or it has ended.
        """
        await self._fetch_telling("pause_backfill", _tell(reason), backfill_id=backfill_id)

    async def resume_backfill(self, backfill_id: int) -> None:
        """Let a paused backfill go on; a running one stays as it is.

        Raises:
            PgflowPrefectError: there is no such backfill, it has ended, or its next run can't be started.
        """
        await self._fetch("resume_backfill", backfill_id=backfill_id)

    async def cancel_backfill(self, backfill_id: int, reason: str | None, *, cancel_runs: bool = False) -> None:
        """Leave the planned dates for good; runs under way go on, or are cancelled.

        Raises:
            PgflowPrefectError: there is no such backfill, or it is completed.
        """
        with without_bound():
            await self._fetch_telling(
                "cancel_backfill", _tell(reason), backfill_id=backfill_id, cancel_runs=cancel_runs
            )

    async def advance_backfills(self) -> list[AdvancedBackfill]:
        """Go on with each backfill that can; decides at most `PORTION` dates of each."""
        rows = await self._fetch("advance_backfills", at_most=PORTION)
        return [AdvancedBackfill.model_validate(row) for row in rows]

    async def prune_backfills(self, older_than: timedelta, workflow_slugs: Sequence[str] | None = None) -> int:
        """Delete backfills that ended longer ago than that and have no run left, and return how many."""
        with without_bound():
            [row] = await self._fetch(
                "prune_backfills",
                older_than=older_than,
                workflow_slugs=None if workflow_slugs is None else [*workflow_slugs],
            )
        return int(str(row["pruned"]))


def _tell(reason: str | None) -> dict[str, str]:
    """Return a text for people as a parameter; without one, the database says that it was requested."""
    return {"reason": reason or "as requested"}
