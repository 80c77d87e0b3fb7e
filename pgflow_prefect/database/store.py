"""What the rest of the package asks of the database: definitions, runs, claims, reports."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

from pydantic import JsonValue

from pgflow_prefect.database.connection import Pool, Row, find_dsn, open_pool
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.schema import check_schema
from pgflow_prefect.database.translation import translate_errors
from pgflow_prefect.errors import UnknownRunError, UnknownWorkflowError
from pgflow_prefect.graph import suggest
from pgflow_prefect.models import Claim, Report, Run, Status, StepState, WorkflowDefinition, WorkflowSummary
from pgflow_prefect.settings import Settings


class Store:
    """pgflow's tables and functions, one method a statement.

    Every method raises `SchemaMissingError` where the schema is not there and `TransientError` where the same call
    may succeed a moment later.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def _fetch(self, query: str, *, run_id: UUID | None = None, **parameters: object) -> list[Row]:
        with translate_errors(run_id):
            async with self._pool.connection() as connection:
                cursor = await connection.execute(QUERIES[query], {"run_id": run_id, **parameters})
                return await cursor.fetchall()

    async def drop_broken_connections(self) -> None:
        """Close the idle connections that no longer answer, so that the next statement does not meet one."""
        await self._pool.check()

    # Definitions

    async def list_workflows(self) -> list[WorkflowSummary]:
        """Return every workflow with its size and the number of its runs."""
        return [WorkflowSummary.model_validate(row) for row in await self._fetch("list_workflows")]

    async def list_slugs(self) -> list[str]:
        """Return the slugs of all workflows, by alphabet."""
        return [str(row["slug"]) for row in await self._fetch("list_slugs")]

    async def load_definition(self, workflow_slug: str) -> WorkflowDefinition:
        """Return a workflow as it is defined now.

        Raises:
            UnknownWorkflowError: with the nearest slug that exists.
        """
        rows = await self._fetch("load_definition", workflow_slug=workflow_slug)
        if not rows:
            await self._raise_unknown_workflow(workflow_slug)
        return WorkflowDefinition.model_validate(rows[0])

    async def load_run_definition(self, run_id: UUID) -> WorkflowDefinition:
        """Return the definition that a run began with, whatever was edited since.

        Raises:
            UnknownRunError: there is no run of this id.
        """
        rows = await self._fetch("load_run_definition", run_id=run_id)
        if not rows:
            raise _unknown_run(run_id)
        return WorkflowDefinition.model_validate(rows[0])

    async def _raise_unknown_workflow(self, workflow_slug: str) -> None:
        known = await self.list_slugs()
        hint = suggest(workflow_slug, known) or (
            "; `pgflow-prefect list` shows all" if known else "; there is none yet"
        )
        raise UnknownWorkflowError(f"unknown workflow {workflow_slug!r}{hint}")

    # Runs

    async def create_run(self, workflow_slug: str, payload: str, run_id: UUID | None = None) -> UUID:
        """Start a run and its root steps, and return its id; the same id again changes nothing.

        Args:
            workflow_slug: the workflow.
            payload: JSON text.
            run_id: made here where it is not given.

        Raises:
            UsageError: unknown workflow, no steps, a cycle.
        """
        run_id = run_id or uuid4()
        await self._fetch("create_run", run_id=run_id, workflow_slug=workflow_slug, payload=payload)
        return run_id

    async def take_run(self, run_id: UUID, flow_run_id: UUID) -> int:
        """Make a flow run the owner of a pending run and return the new epoch.

        Raises:
            RunNotPendingError: the run has ended.
            UsageError: there is no such run.
        """
        rows = await self._fetch("take_run", run_id=run_id, flow_run_id=flow_run_id)
        return int(str(rows[0]["epoch"]))

    async def read_run(self, run_id: UUID) -> Run:
        """Return a run as it is now.

        Raises:
            UnknownRunError: there is none of this id.
        """
        rows = await self._fetch("read_run", run_id=run_id)
        if not rows:
            raise _unknown_run(run_id)
        return Run.model_validate(rows[0])

    async def list_runs(
        self, *, workflow_slug: str | None = None, status: Status | None = None, limit: int = 20
    ) -> list[Run]:
        """Return the newest runs first, at most `limit`, of one workflow or status or of all."""
        rows = await self._fetch("list_runs", workflow_slug=workflow_slug, status=status, limit=limit)
        return [Run.model_validate(row) for row in rows]

    async def reopen_run(self, run_id: UUID) -> None:
        """Make a failed run pending again with its failed steps; a pending one stays as it is."""
        await self._fetch("reopen_run", run_id=run_id)

    async def repair_run(self, run_id: UUID) -> None:
        """Start what is ready and was not started, end what is done."""
        await self._fetch("repair_run", run_id=run_id)

    async def cancel_run(self, run_id: UUID, reason: str) -> None:
        """Fail a run and all its pending steps; a finished run stays as it is."""
        await self._fetch("cancel_run", run_id=run_id, reason=reason)

    # Steps

    async def list_step_states(self, run_id: UUID) -> list[StepState]:
        """Return the steps of a run that have started, in the order of their start."""
        return [StepState.model_validate(row) for row in await self._fetch("list_step_states", run_id=run_id)]

    async def read_results(self, run_id: UUID, step_slugs: Iterable[str]) -> dict[str, JsonValue]:
        """Return the results of those of these steps that are completed, by slug."""
        rows = await self._fetch("read_results", run_id=run_id, step_slugs=list(step_slugs))
        results: Any = rows[0]["results"]
        return dict(results)

    async def claim_step(
        self,
        run_id: UUID,
        step_slug: str,
        *,
        epoch: int,
        task_run_id: UUID,
        upstream: list[str] | None,
        with_payload: bool,
    ) -> Claim:
        """Count an attempt of a step and return its input; of a completed step, that it is completed.

        Args:
            run_id: the run.
            step_slug: the step.
            epoch: what `take_run` returned.
            task_run_id: Prefect's task run of this step.
            upstream: the upstream steps whose results are wanted, None for all.
            with_payload: whether the run's payload is wanted.

        Raises:
            SupersededError: another owner has taken the run.
            RunNotPendingError: the run has ended.
        """
        rows = await self._fetch(
            "claim_step",
            run_id=run_id,
            step_slug=step_slug,
            epoch=epoch,
            task_run_id=task_run_id,
            upstream=upstream,
            with_payload=with_payload,
        )
        return Claim.model_validate(rows[0])

    async def complete_step(self, run_id: UUID, step_slug: str, result: str, **fence: object) -> Report:
        """Store a step's result and start what became ready.

        Args:
            run_id: the run.
            step_slug: the step.
            result: JSON text.
            fence: `epoch`, `attempt` and `task_run_id` of the claim.

        Returns:
            The step's state afterwards: not `completed` where the report came too late.

        Raises:
            ResultInvalidError: jsonb can't hold the result.
        """
        rows = await self._fetch("complete_step", run_id=run_id, step_slug=step_slug, result=result, **fence)
        return Report.model_validate(rows[0])

    async def fail_step(
        self, run_id: UUID, step_slug: str, error_message: str, *, state_name: str, **fence: object
    ) -> Report:
        """Fail a step and its run; arguments and return value as of `complete_step`."""
        rows = await self._fetch(
            "fail_step",
            run_id=run_id,
            step_slug=step_slug,
            error_message=error_message,
            state_name=state_name,
            **fence,
        )
        return Report.model_validate(rows[0])

    async def note_state(
        self, run_id: UUID, step_slug: str, *, task_run_id: UUID, state_name: str, message: str
    ) -> None:
        """Note the state that Prefect shows a task run in."""
        await self._fetch(
            "note_state",
            run_id=run_id,
            step_slug=step_slug,
            task_run_id=task_run_id,
            state_name=state_name,
            message=message,
        )


def _unknown_run(run_id: UUID) -> UnknownRunError:
    return UnknownRunError(f"unknown run {run_id}; `pgflow-prefect runs` shows the newest")


@asynccontextmanager
async def open_store(settings: Settings, *, size: int | None = None) -> AsyncIterator[Store]:
    """Open the database that the settings name.

    Raises:
        DatabaseUnavailableError: it can't be reached.
        SchemaMissingError: it has no pgflow schema, or an old one.
    """
    dsn = find_dsn(settings)
    async with open_pool(dsn, size=size or settings.pool_size, timeout=settings.connect_timeout) as pool:
        async with pool.connection() as connection:
            await check_schema(connection)
        yield Store(pool)
