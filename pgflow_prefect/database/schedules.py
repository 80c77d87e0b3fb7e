"""The part of the store for the payloads of schedules."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from uuid import UUID

from pgflow_prefect.database.statements import Statements
from pgflow_prefect.raw_json import RawJson


@dataclass(frozen=True)
class ScheduledPayload:
    """The payload with which a schedule starts runs.

    Attributes:
        id: of its row. Prefect's schedule has it.
        workflow_slug: the workflow.
        name: of the schedule; unique within the workflow.
        payload: of the runs; None for one beyond the limits.
    """

    id: UUID
    workflow_slug: str
    name: str
    payload: RawJson | None


class ScheduleStatements(Statements):
    """The payloads of schedules."""

    async def write_schedule(self, scheduled: ScheduledPayload) -> UUID:
        """Store the payload of a schedule, and return the id of its row. A schedule that has a row keeps its id.

        Raises:
            PgflowPrefectError: there is no such workflow, or the payload is beyond the limits.
        """
        assert scheduled.payload is not None
        [row] = await self._fetch(
            "write_schedule",
            id=scheduled.id,
            workflow_slug=scheduled.workflow_slug,
            name=scheduled.name,
            payload=scheduled.payload.text,
        )
        return UUID(str(row["id"]))

    async def delete_schedules(self, ids: Iterable[UUID]) -> None:
        """Delete the payloads of schedules; those that are gone already make no difference."""
        await self._fetch("delete_schedules", ids=[*ids])

    async def list_schedules(self, workflow_slugs: Collection[str] | None = None) -> list[ScheduledPayload]:
        """Return the payloads of the schedules of these workflows, or of all."""
        slugs = None if workflow_slugs is None else [*workflow_slugs]
        return [_read(row) for row in await self._fetch("list_schedules", workflow_slugs=slugs)]

    async def read_schedule(self, schedule_id: UUID) -> ScheduledPayload | None:
        """Return the payload of a schedule; None if there is no such row.

        Raises:
            PgflowPrefectError: the payload is beyond the limits.
        """
        rows = await self._fetch("read_schedule", id=schedule_id)
        return _read({"id": schedule_id, **rows[0]}) if rows else None


def _read(row: dict[str, object]) -> ScheduledPayload:
    payload = row["payload"]
    return ScheduledPayload(
        UUID(str(row["id"])),
        str(row["workflow_slug"]),
        str(row["name"]),
        RawJson(str(payload)) if payload is not None else None,
    )
