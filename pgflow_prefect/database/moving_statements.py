"""The part of the store for flows of the released pgflow that are moved to Prefect, as a whole."""

from collections.abc import Iterable
from datetime import datetime
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from pgflow_prefect.database.statements import Statements
from pgflow_prefect.errors import UsageError


class MovedFlow(BaseModel):
    """A flow that Prefect executes.

    Attributes:
        workflow_slug: the flow.
        moved_at: when it was moved.
        moved_by: the database user that moved it.
        functions: the Edge Functions that were switched off.
    """

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    moved_at: datetime
    moved_by: str
    functions: tuple[str, ...]


class Move(BaseModel):
    """What moving a flow has done, to Prefect or back.

    Attributes:
        changed: it was elsewhere before.
        workers: how many of pgflow's own workers were told to stop, or go on.
        functions: the Edge Functions that were switched off, or on again.
        has_functions: this version of pgflow starts Edge Functions itself, and has a switch for each.
        runs: how many runs of the flow go on.
    """

    model_config = ConfigDict(frozen=True)

    changed: bool
    workers: int
    functions: tuple[str, ...]
    has_functions: bool
    runs: int


class GivenUpTask(BaseModel):
    """A task that pgflow had given up, and that was failed.

    Attributes:
        workflow_slug: its flow.
        run_id: its run.
        step_slug: its step.
        task_index: its index.
        run_status: pgflow's status of the run afterwards.
    """

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    run_id: UUID
    step_slug: str
    task_index: int
    run_status: str


class MovedStep(BaseModel):
    """A step that Prefect executes, while pgflow's own workers do the others of its flow.

    Attributes:
        workflow_slug: its flow.
        step_slug: the step.
        moved_at: when it was moved.
        moved_by: the database user that moved it.
        waiting: how many of its tasks wait for a worker.
        has_triggers: the triggers are there that keep its messages from pgflow's workers.
    """

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    step_slug: str
    moved_at: datetime
    moved_by: str
    waiting: int
    has_triggers: bool


class LostMessage(BaseModel):
    """A task that waits or is under way, and whose message is in no queue. So no worker hears of it.

    Attributes:
        workflow_slug: its flow.
        run_id: its run.
        step_slug: its step.
        task_index: its number in the step.
    """

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    run_id: UUID
    step_slug: str
    task_index: int


class StalledTask(BaseModel):
    """A task that a worker has begun, and whose time is over.

    Attributes:
        workflow_slug: its flow.
        run_id: its run.
        step_slug: its step.
        task_index: its number in the step.
        started_at: when its latest attempt began.
        requeued: how often pgflow has put it back.
        is_given_up: pgflow puts it back no more, so its run hangs.
        tasks: how many such tasks there are in all.
    """

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    run_id: UUID
    step_slug: str
    task_index: int
    started_at: datetime | None
    requeued: int
    is_given_up: bool
    tasks: int


class MovingStatements(Statements):
    """Which flows of the released pgflow Prefect executes, and what repairs them."""

    async def move_flow(self, workflow_slug: str) -> Move:
        """Move a whole flow to Prefect. Again: stop the workers of pgflow's that have begun since.

        Raises:
            UsageError: there is no such flow.
            PgflowPrefectError: this version of pgflow has no switch, or an Edge Function has other flows, too.
        """
        [row] = await self._fetch("move_flow", workflow_slug=workflow_slug)
        return Move.model_validate(row)

    async def move_flow_back(self, workflow_slug: str) -> Move:
        """Give a flow back to pgflow's own workers.

        Raises:
            UsageError: there is no such flow.
        """
        [row] = await self._fetch("move_flow_back", workflow_slug=workflow_slug)
        return Move.model_validate(row)

    async def list_moved_flows(self) -> dict[str, MovedFlow]:
        """Return the flows that were moved to Prefect, by slug; none on the classic schema, where none needs it."""
        if not self.implementation.moves_flows:
            return {}
        found = [MovedFlow.model_validate(row) for row in await self._fetch("list_moved_flows")]
        return {each.workflow_slug: each for each in found}

    async def list_moved_steps(self) -> list[MovedStep]:
        """Return the steps that were moved alone; none on the classic schema."""
        if not self.implementation.moves_flows:
            return []
        return [MovedStep.model_validate(row) for row in await self._fetch("list_moved_steps")]

    async def refuse_unmoved(self, workflow_slugs: Iterable[str]) -> None:
        """Refuse flows that pgflow's own workers execute.

        Raises:
            UsageError: one of them was not moved.
        """
        if not self.implementation.moves_flows:
            return
        moved = await self.list_moved_flows()
        if unmoved := [slug for slug in workflow_slugs if slug not in moved]:
            raise UsageError(
                f"pgflow's own workers execute flow {unmoved[0]!r}. Move it first: "
                f"`pgflow-prefect bind {unmoved[0]} --python`"
            )

    async def list_given_up_tasks(self, *, limit: int) -> list[StalledTask]:
        """Return tasks that pgflow has given up, at most so many. None on the classic schema."""
        if not self.implementation.moves_flows:
            return []
        found = [StalledTask.model_validate(row) for row in await self._fetch("list_stalled_tasks", limit=limit)]
        return [each for each in found if each.is_given_up]

    async def end_given_up_tasks(self, *, limit: int) -> list[GivenUpTask]:
        """Fail tasks that pgflow has given up, at most so many; return them. None on the classic schema."""
        if not self.implementation.moves_flows:
            return []
        return [GivenUpTask.model_validate(row) for row in await self._fetch("end_given_up_tasks", limit=limit)]

    async def list_lost_messages(self, *, limit: int) -> list[LostMessage]:
        """Return tasks whose message is nowhere, at most so many. None on the classic schema."""
        if not self.implementation.moves_flows:
            return []
        return [LostMessage.model_validate(row) for row in await self._fetch("list_lost_messages", limit=limit)]

    async def restore_messages(self, *, limit: int) -> list[LostMessage]:
        """Rebuild messages that are nowhere, at most so many; return their tasks. None on the classic schema."""
        if not self.implementation.moves_flows:
            return []
        return [LostMessage.model_validate(row) for row in await self._fetch("restore_messages", limit=limit)]
