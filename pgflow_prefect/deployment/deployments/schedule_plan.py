"""Plans the changes of our schedules of one deployment, and of the rows with their payloads; changes nothing.

PostgreSQL has the payload of a schedule. Prefect's schedule has the id of that row as a parameter of its flow runs. So
every user of Prefect sees the id, and none of them the payload.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID, uuid5

from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import SCHEDULE_TYPES
from pydantic import JsonValue

from pgflow_prefect.database.schedules import ScheduledPayload
from pgflow_prefect.deployment.deployments.change import Change
from pgflow_prefect.deployment.deployments.schedules import (
    ScheduleWish,
    describe_schedule,
    is_same,
    name_field,
)
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.redaction import redact
from pgflow_prefect.prefect_api.ids import SCHEDULE_ID, parse_schedule_id
from pgflow_prefect.prefect_api.schedule_names import DEFAULT, make_schedule_slug
from pgflow_prefect.raw_json import RawJson, UnreadableJsonError

_LONGEST = 60  # characters of a payload that people read in a change


@dataclass(frozen=True)
class SentSchedule:
    """One of our schedules as it is to be in Prefect.

    Attributes:
        schedule: when it starts runs; None to delete it.
        slug: the text by which Prefect knows it.
        parameters: of its flow runs. Prefect's server forgets those that a change of the schedule does not name.
        id: Prefect's id of the schedule that there is.
    """

    schedule: SCHEDULE_TYPES | None
    slug: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    id: UUID | None = None


@dataclass(frozen=True)
class SchedulePlan:
    """The planned changes of the schedules of one deployment.

    Attributes:
        changes: the differences, for people.
        troubles: what is wrong with other schedules of ours, a sentence each.
        sent: the schedules to create, change or delete in Prefect.
        written: the rows to write before that.
        deleted: the rows to delete after that.
        shown: the schedule of the command afterwards, or the one without a name, in a few words.
    """

    changes: tuple[Change, ...] = ()
    troubles: tuple[str, ...] = ()
    sent: tuple[SentSchedule, ...] = ()
    written: tuple[ScheduledPayload, ...] = ()
    deleted: tuple[UUID, ...] = ()
    shown: str | None = None


@dataclass(frozen=True)
class ScheduleRows:
    """The rows of one workflow, by the names of their schedules.

    Attributes:
        workflow_slug: the workflow.
        installation: the database, whose id the ids of new rows are made of.
        rows: that there are; None if they are not known.
    """

    workflow_slug: str = ""
    installation: UUID | None = None
    rows: Mapping[str, ScheduledPayload] | None = None

    def find(self, name: str) -> ScheduledPayload | None:
        """Return the row of a schedule."""
        return (self.rows or {}).get(name)

    def make(self, name: str, payload: RawJson) -> ScheduledPayload:
        """Return the row of a schedule with another payload. It keeps its id."""
        if (former := self.find(name)) is not None:
            return replace(former, payload=payload)
        made = uuid5(self.installation or UUID(int=0), f"{name}/{self.workflow_slug}")
        return ScheduledPayload(made, self.workflow_slug, name, payload)


def plan_schedules(
    wish: ScheduleWish | None, rows: ScheduleRows, existing: Mapping[str, DeploymentSchedule], *, prune: bool = False
) -> SchedulePlan:
    """Compare our schedules in Prefect, and the rows with their payloads, with the wish of a command.

    Args:
        wish: the wanted state of one schedule.
        rows: of the workflow.
        existing: our schedules in Prefect, by name.
        prune: delete schedules whose row is gone, and rows whose schedule is gone.
    """
    wished = _plan_wish(wish, rows, existing.get(wish.name)) if wish is not None else SchedulePlan()
    others = {name: each for name, each in existing.items() if wish is None or name != wish.name}
    rest = _Rest(rows, others, wish.name if wish is not None else None)
    shown = wished.shown if wish is not None else _describe(existing[DEFAULT].schedule if DEFAULT in existing else None)
    if not prune:
        return SchedulePlan(wished.changes, (*rest.tell(),), wished.sent, wished.written, wished.deleted, shown)
    return SchedulePlan(
        (*wished.changes, *rest.list_changes()),
        (),
        (*wished.sent, *rest.list_deleted_schedules()),
        wished.written,
        (*wished.deleted, *rest.list_deleted_rows()),
        shown,
    )


def _plan_wish(wish: ScheduleWish, rows: ScheduleRows, existing: DeploymentSchedule | None) -> SchedulePlan:
    former, name = rows.find(wish.name), name_field(wish.name)
    before, after = existing.schedule if existing is not None else None, wish.schedule
    changes: list[Change] = []
    if not (before is after is None or (before and after and is_same(before, after))):
        changes.append(Change(name, _describe(before), _describe(after)))
    if after is None:
        removed = SentSchedule(None, "", id=existing.id) if existing is not None else None
        if former is not None:
            changes.append(Change(f"payload of {name}", _describe_payload(former) or "a row", None))
        return SchedulePlan(
            tuple(changes),
            sent=(removed,) if removed is not None else (),
            deleted=(former.id,) if former is not None else (),
        )
    row = former if wish.payload is None else rows.make(wish.name, wish.payload)
    is_written = wish.payload is not None and not _is_same_payload(former, wish.payload)
    if is_written:
        changes.append(Change(f"payload of {name}", _describe_payload(former), _describe_payload(row)))
    former_parameters = dict(existing.parameters or {}) if existing is not None else {}
    parameters = former_parameters if row is None else {**former_parameters, SCHEDULE_ID: str(row.id)}
    is_renamed = existing is not None and parameters != former_parameters
    if is_renamed and not is_written:
        changes.append(Change(f"payload of {name}", "not named by the schedule", "its row"))
    slug = make_schedule_slug(wish.name, describe_schedule(after))
    sent = SentSchedule(after, slug, parameters, existing.id if existing is not None else None)
    is_sent = is_renamed or any(each.field == name for each in changes)
    return SchedulePlan(
        tuple(changes),
        sent=(sent,) if is_sent else (),
        written=(row,) if is_written and row is not None else (),
        shown=describe_schedule(after),
    )


@dataclass(frozen=True)
class _Rest:
    """Our schedules and rows that a command does not name."""

    rows: ScheduleRows
    schedules: Mapping[str, DeploymentSchedule]
    besides: str | None
    _ids: frozenset[UUID] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", frozenset(each.id for each in (self.rows.rows or {}).values()))

    @property
    def _dangling(self) -> dict[str, DeploymentSchedule]:
        """The schedules that name a row that is gone."""
        if self.rows.rows is None:
            return {}
        return {
            name: each
            for name, each in self.schedules.items()
            if (found := read_schedule_id(each.parameters)) is not None and found not in self._ids
        }

    @property
    def _orphans(self) -> dict[str, ScheduledPayload]:
        """The rows that belong to no schedule in Prefect."""
        return {
            name: row
            for name, row in (self.rows.rows or {}).items()
            if name not in self.schedules and name != self.besides
        }

    def tell(self) -> Iterator[str]:
        slug = self.rows.workflow_slug
        prune = "`pgflow-prefect deploy --all --prune` deletes"
        for name in self._dangling:
            yield (
                f"the payload of its {name_field(name)} is gone from the database, so its runs fail. {prune} the "
                f"schedule. `pgflow-prefect deploy {slug} --schedule-name {name} --cron … --payload …` sets it again"
            )
        for name in self._orphans:
            yield f"Prefect no longer has its {name_field(name)}, whose payload is in the database. {prune} the row"

    def list_changes(self) -> Iterator[Change]:
        for name, each in self._dangling.items():
            yield Change(name_field(name), describe_schedule(each.schedule), None)
        for name, row in self._orphans.items():
            yield Change(f"payload of {name_field(name)}", _describe_payload(row), None)

    def list_deleted_schedules(self) -> Iterator[SentSchedule]:
        for each in self._dangling.values():
            yield SentSchedule(None, "", id=each.id)

    def list_deleted_rows(self) -> Iterator[UUID]:
        for row in self._orphans.values():
            yield row.id


def read_schedule_id(parameters: Mapping[str, Any] | None) -> UUID | None:
    """Return the row that a schedule's parameters name; None if they name none, or not by a UUID."""
    try:
        return parse_schedule_id((parameters or {}).get(SCHEDULE_ID))
    except UsageError:
        return None


def _is_same_payload(row: ScheduledPayload | None, payload: RawJson) -> bool:
    if row is None or row.payload is None:
        return False
    try:
        return row.payload.decode() == payload.decode()
    except UnreadableJsonError:
        return row.payload.text == payload.text


def _describe_payload(row: ScheduledPayload | None) -> str | None:
    """Return a payload on one line, shortened and without its secrets."""
    if row is None or row.payload is None:
        return None
    try:
        value: JsonValue = redact(row.payload.decode())
    except UnreadableJsonError:
        return f"{len(row.payload.text):,} characters of JSON"
    text = RawJson.of(value).text
    return f"{text[: _LONGEST - 1]}…" if len(text) > _LONGEST else text


def _describe(schedule: SCHEDULE_TYPES | None) -> str | None:
    return describe_schedule(schedule) if schedule is not None else None
