"""The questions of `pgflow-prefect doctor` to PostgreSQL, with or without our schemas."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from pgflow_prefect.database.connection import connect, open_pool
from pgflow_prefect.database.implementations import FoundSchema, read_schema
from pgflow_prefect.database.installation import InstallationStatements
from pgflow_prefect.database.moving_statements import LostMessage, MovedStep, StalledTask
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.recording import RecordingStatements
from pgflow_prefect.database.store import make_lease_terms
from pgflow_prefect.database.translation import translate_errors
from pgflow_prefect.models import Enabled
from pgflow_prefect.settings import Settings


class Server(BaseModel):
    """A PostgreSQL server, and who is connected to it.

    Attributes:
        version: as people write it.
        number: the server's number: 130004 is 13.4.
        database: the database.
        user: the current user.
        now: its clock.
    """

    model_config = ConfigDict(frozen=True)

    version: str
    number: int
    database: str
    user: str
    now: datetime


class UntakenRuns(BaseModel):
    """Pending runs of a workflow that no process executes.

    Attributes:
        workflow_slug: the workflow.
        runs: begun since it was enabled.
        older: begun before.
    """

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    runs: int
    older: int


class SetAsideRun(BaseModel):
    """A pending run that workers and bridges could not take.

    Attributes:
        run_id: the run.
        workflow_slug: its workflow.
        reason: the error.
        runs: how many runs are set aside in all.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    workflow_slug: str
    reason: str
    runs: int


class Released(BaseModel):
    """The released pgflow in a database.

    Attributes:
        version: the first version that has what is there.
        requeues: it puts tasks back whose worker has vanished.
        unknown: columns that this program does not know.
    """

    model_config = ConfigDict(frozen=True)

    version: str
    requeues: bool
    unknown: tuple[str, ...]


class FlowQueue(BaseModel):
    """The tasks and the workers of a flow of the released pgflow. Times are the database's.

    Attributes:
        workflow_slug: the flow.
        queued: tasks that wait for a worker, those that wait for their next attempt included.
        oldest: since when the oldest of them waits.
        started: tasks that a worker has begun.
        live_workers: workers that have given a sign of life in the last 30 s, and take tasks.
        last_heartbeat_at: the latest sign of life.
        functions: the Edge Functions that have ever worked on it.
    """

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    queued: int
    oldest: datetime | None
    started: int
    live_workers: int
    last_heartbeat_at: datetime | None
    functions: tuple[str, ...]


class DisabledTrigger(BaseModel):
    """A trigger of ours that does not fire in every session.

    Attributes:
        trigger: its name, and its table.
        command: enables it again.
        sees_edits: it notices edits of definitions.
    """

    model_config = ConfigDict(frozen=True)

    trigger: str
    command: str
    sees_edits: bool


class DiagnosisStatements(InstallationStatements, RecordingStatements):
    """Questions about the server, the schemas and the rights; about runs if the schemas are installed."""

    async def read_server(self) -> Server:
        """Return which server this is."""
        [row] = await self._fetch("read_server")
        return Server.model_validate(row)

    async def find_versions(self) -> tuple[int | None, int | None]:
        """Return the installed versions of engine and adapter; None for one that is missing."""
        [row] = await self._fetch("find_versions")
        return _to_version(row["engine"]), _to_version(row["adapter"])

    async def find_schema(self) -> FoundSchema:
        """Return which program the schema pgflow belongs to."""
        [row] = await self._fetch("find_schema")
        return read_schema(row)

    async def read_released(self) -> Released:
        """Return which version of the released pgflow this is."""
        [row] = await self._fetch("read_released")
        return Released.model_validate(row)

    async def list_queues(self) -> list[FlowQueue]:
        """Return the flows of the released pgflow with their tasks and workers."""
        return [FlowQueue.model_validate(row) for row in await self._fetch("list_queues")]

    async def list_stalled_tasks(self, limit: int) -> list[StalledTask]:
        """Return tasks of the released pgflow whose time is over, those first that it has given up."""
        return [StalledTask.model_validate(row) for row in await self._fetch("list_stalled_tasks", limit=limit)]

    async def list_lost_messages(self, limit: int) -> list[LostMessage]:
        """Return tasks of the released pgflow whose message is in no queue."""
        return [LostMessage.model_validate(row) for row in await self._fetch("list_lost_messages", limit=limit)]

    async def list_moved_steps(self) -> list[MovedStep]:
        """Return the steps of the released pgflow that were moved alone."""
        return [MovedStep.model_validate(row) for row in await self._fetch("list_moved_steps")]

    async def list_missing_rights(self) -> list[str]:
        """Return the rights that the current user lacks to execute runs."""
        return [str(row["missing"]) for row in await self._fetch("list_missing_rights")]

    async def list_disabled_triggers(self) -> list[DisabledTrigger]:
        """Return our disabled triggers, first those that notice edits of definitions."""
        return [DisabledTrigger.model_validate(row) for row in await self._fetch("list_disabled_triggers")]

    async def list_unlike_snapshots(self) -> list[str]:
        """Return the workflows whose next run would begin with a former definition."""
        return [str(row["slug"]) for row in await self._fetch("list_unlike_snapshots")]

    async def find_power(self) -> str | None:
        """Return whether the current user is more than a worker needs: a superuser, or the owner of the tables."""
        [row] = await self._fetch("find_power")
        if row["is_superuser"]:
            return "a superuser"
        return "the owner of the tables" if row["is_owner"] else None

    async def has_work_role(self) -> bool:
        """Tell whether the role `pgflow_work` is there."""
        [row] = await self._fetch("find_work_role")
        return bool(row["found"])

    async def list_enabled(self) -> dict[str, Enabled]:
        """Return the workflows that were enabled or disabled, by slug."""
        found = [Enabled.model_validate(row) for row in await self._fetch("list_enabled")]
        return {each.workflow_slug: each for each in found}

    async def count_untaken_runs(self, seconds: float) -> list[UntakenRuns]:
        """Return how many pending runs of enabled workflows no process has taken for this time, by workflow."""
        rows = await self._fetch("count_untaken_runs", seconds=seconds, lease=self.lease_terms.lease)
        return [UntakenRuns.model_validate(row) for row in rows]

    async def list_set_aside(self, limit: int) -> list[SetAsideRun]:
        """Return runs that are set aside, those with the most tries first."""
        rows = await self._fetch("list_set_aside", limit=limit, lease=self.lease_terms.lease)
        return [SetAsideRun.model_validate(row) for row in rows]


@asynccontextmanager
async def open_diagnosis(dsn: str, settings: Settings) -> AsyncIterator[DiagnosisStatements]:
    """Open a database, with or without our schemas.

    Raises:
        DatabaseUnavailableError: it can't be reached.
    """
    async with open_pool(dsn, size=1, timeout=settings.connect_timeout) as pool:
        yield DiagnosisStatements(pool, make_lease_terms(settings))


async def hears_notifications(dsn: str, *, timeout: float, patience: float) -> bool:  # noqa: ASYNC109  libpq's own
    """Tell whether LISTEN works on a connection of this kind: behind a pooler in transaction mode, it does not.

    Args:
        dsn: from `find_dsn`.
        timeout: seconds to wait for a connection.
        patience: seconds to wait for the notification.
    """
    with translate_errors():
        async with (
            await connect(dsn, timeout=timeout) as listening,
            await connect(dsn, timeout=timeout) as sending,
        ):
            await listening.execute(QUERIES["listen_for_doctor"])
            try:
                await sending.execute(QUERIES["notify_doctor"])
                async for _ in listening.notifies(timeout=patience, stop_after=1):
                    return True
            finally:
                await listening.execute(QUERIES["unlisten_for_doctor"])
    return False


def _to_version(found: object) -> int | None:
    return None if found is None else int(str(found))
