"""Writes the runs that Airflow executes, and says which service follows them."""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from uuid import UUID

from pydantic import BaseModel, ConfigDict, JsonValue
from pydantic_core import to_json

from pgflow_prefect.database.statements import Statements
from pgflow_prefect.models import StepInput
from pgflow_prefect.raw_json import RawJson


class Mirror(BaseModel):
    """A workflow whose runs Airflow executes.

    Attributes:
        workflow_slug: the workflow, and the id of its DAG.
        enabled: its new runs are followed.
        held_by: the service that follows it, or did so last.
        is_held: a service does so now.
        looked_at: when that one's latest look was finished.
        since: when the workflow was first observed.
    """

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    enabled: bool
    held_by: str | None
    is_held: bool
    looked_at: datetime | None
    since: datetime


class TakenMirror(BaseModel):
    """A workflow that this service follows.

    Attributes:
        workflow_slug: the workflow.
        epoch: in which this service has taken it.
        read_to: Airflow's runs up to this id were looked at; None if none was.
    """

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    epoch: int
    read_to: int | None


class MirroredRun(BaseModel):
    """A run of Airflow that has rows here.

    Attributes:
        run_id: the run here.
        workflow_slug: its workflow.
        source_id: Airflow's `dag_run.id`.
        source_run_id: Airflow's `dag_run.run_id`.
        source_mark: changes with Airflow's row.
        status: of the run here.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    workflow_slug: str
    source_id: int
    source_run_id: str
    source_mark: str
    status: str


class Written(BaseModel):
    """What became of a run that was to be written.

    Attributes:
        run_id: the run.
        status: of the run now.
        changed: something is not as it was.
        left_out: tasks that are no steps here.
        problems: results that are beyond the limits, by step.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    status: str
    changed: bool
    left_out: list[str] | None
    problems: dict[str, str] | None


class DueShadow(BaseModel):
    """A step that Airflow has completed, and beside which a handler is to be executed.

    Attributes:
        run_id: the run.
        workflow_slug: its workflow.
        step_slug: the step.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    workflow_slug: str
    step_slug: str


class BegunShadow(StepInput):
    """The input of a step that Airflow has completed, and what it has come to there.

    Attributes:
        result: its result as JSON; None if it was not copied.
        attempt: Airflow's try.
        began_at: when Airflow began it.
        ended_at: when Airflow ended it.
        task_run_id: its task run in Prefect.
        flow_run_id: the flow run that shows the run; None if none does yet.
        notes: what is not as in Airflow, by step; `''` for the run.
        unread: the step, and the steps above it, whose results were not copied.
    """

    result: RawJson | None
    attempt: int
    began_at: datetime | None
    ended_at: datetime | None
    task_run_id: UUID
    flow_run_id: UUID | None
    notes: dict[str, str]
    unread: list[str]


class MirrorStatements(Statements):
    """The part of the store for runs that Airflow executes."""

    async def add_mirror(self, workflow_slug: str) -> bool:
        """Let mirrors follow the DAG of a workflow; False if they do so already.

        Raises:
            UnknownWorkflowError: there is no such workflow.
        """
        [row] = await self._fetch("add_mirror", workflow_slug=workflow_slug)
        return bool(row["added"])

    async def list_mirrors(self) -> list[Mirror]:
        """Return the workflows whose runs Airflow executes."""
        return [Mirror.model_validate(row) for row in await self._fetch("list_mirrors")]

    async def take_mirrors(self, holder: UUID, lease: float) -> list[TakenMirror]:
        """Take the mirrors that no other service holds, and extend those that this one holds.

        Args:
            holder: this service.
            lease: seconds for which no other service takes them.
        """
        rows = await self._fetch("take_mirrors", holder=holder, held_by=self.lease_terms.held_by, lease=lease)
        return [TakenMirror.model_validate(row) for row in rows]

    async def release_mirrors(self, holder: UUID) -> None:
        """Let another service take this one's mirrors at once."""
        await self._fetch("release_mirrors", holder=holder)

    async def note_look(self, holder: UUID, workflow_slugs: Collection[str], read_to: int) -> None:
        """Note that all runs of these workflows up to an id of Airflow's have rows here, if this service holds them."""
        await self._fetch("note_look", holder=holder, workflow_slugs=[*workflow_slugs], read_to=read_to)

    async def find_mirrored(self, runs: Iterable[tuple[str, str]]) -> list[MirroredRun]:
        """Return those of these runs of Airflow that have rows here, each given by its workflow and its id there."""
        workflow_slugs, source_run_ids = zip(*runs, strict=True)
        rows = await self._fetch("find_mirrored", workflow_slugs=[*workflow_slugs], source_run_ids=[*source_run_ids])
        return [MirroredRun.model_validate(row) for row in rows]

    async def list_mirrored(
        self, workflow_slugs: Collection[str], *, only_pending: bool, after: int, limit: int
    ) -> list[MirroredRun]:
        """Return mirrored runs behind an id of Airflow's, in the order of these ids.

        Args:
            workflow_slugs: of these workflows.
            only_pending: without those that have ended here.
            after: the id.
            limit: the greatest number of runs.
        """
        slugs = [*workflow_slugs]
        rows = await self._fetch(
            "list_mirrored", workflow_slugs=slugs, only_pending=only_pending, after=after, limit=limit
        )
        return [MirroredRun.model_validate(row) for row in rows]

    async def find_executed_elsewhere(self, run_ids: Iterable[UUID]) -> frozenset[UUID]:
        """Return those of these runs that Airflow executes, or has executed."""
        rows = await self._fetch("find_executed_elsewhere", run_ids=[*run_ids])
        return frozenset(UUID(str(row["run_id"])) for row in rows)

    async def mirror_run(self, epoch: int | None, found: dict[str, JsonValue], results: Sequence[str]) -> Written:
        """Write how a run of Airflow stands. The same again changes nothing.

        Args:
            epoch: in which this service has taken the mirror; None for an import.
            found: the run, and its steps that have changed.
            results: JSON texts that `found` refers to.

        Raises:
            SupersededError: another service follows the workflow now.
            PgflowPrefectError: the rows can't be written.
        """
        [row] = await self._fetch("mirror_run", epoch=epoch, found=to_json(found).decode(), results=[*results])
        return Written.model_validate(row)

    async def execute_mirrored_run(self, run_id: UUID) -> bool:
        """Make a run of Airflow one of this database, which no mirror moves; False if it was none."""
        [row] = await self._fetch("execute_mirrored_run", run_id=run_id)
        return bool(row["was_mirrored"])

    async def list_airflow_shadows(self, steps: Iterable[tuple[str, str]], *, limit: int) -> list[DueShadow]:
        """Return those of these steps that Airflow has completed, and whose shadow is due.

        Args:
            steps: each by workflow and slug: those that have a handler here.
            limit: the greatest number.
        """
        workflow_slugs, step_slugs = zip(*steps, strict=True)
        rows = await self._fetch(
            "list_airflow_shadows", workflow_slugs=[*workflow_slugs], step_slugs=[*step_slugs], limit=limit
        )
        return [DueShadow.model_validate(row) for row in rows]

    async def begin_airflow_shadow(
        self, run_id: UUID, step_slug: str, upstream: list[str] | None
    ) -> BegunShadow | None:
        """Take the shadow of a step; None if another process has begun it.

        Args:
            run_id: the run.
            step_slug: the step.
            upstream: the steps whose results the handler takes; None for all.
        """
        rows = await self._fetch("begin_airflow_shadow", run_id=run_id, step_slug=step_slug, upstream=upstream)
        return BegunShadow.model_validate(rows[0]) if rows else None

    async def release_airflow_shadow(self, run_id: UUID, step_slug: str) -> None:
        """Let another process begin a shadow that this one has not ended."""
        await self._fetch("release_airflow_shadow", run_id=run_id, step_slug=step_slug)
