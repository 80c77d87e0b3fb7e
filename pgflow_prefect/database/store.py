"""What the rest of the package asks of the database: definitions, runs, claims, reports."""

import os
import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from pydantic import JsonValue
from pydantic_core import to_json

from pgflow_prefect.database.connection import Pool, Row, find_dsn, open_pool
from pgflow_prefect.database.definition_edit import replace_definition
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.schema import check_schema
from pgflow_prefect.database.translation import translate_errors
from pgflow_prefect.database.unsettled import UnsettledRun, UnsettledStep
from pgflow_prefect.errors import SupersededError, UnknownRunError, UnknownWorkflowError
from pgflow_prefect.graph import suggest
from pgflow_prefect.models import (
    AwaitedStep,
    BindingChange,
    Claim,
    Enabled,
    Report,
    Run,
    ShadowSummary,
    Status,
    StepBinding,
    StepEnd,
    StepState,
    TakenRun,
    WorkflowDefinition,
    WorkflowSummary,
)
from pgflow_prefect.settings import Settings


class Tenure(NamedTuple):
    """On which terms this process holds the runs that it takes.

    Attributes:
        held_by: who, for people.
        lease: in seconds.
        max_recoveries: owners in a row that may vanish while no further step completes.
    """

    held_by: str
    lease: float
    max_recoveries: int


class Store:
    """pgflow's tables and functions, one method a statement.

    Every method raises `SchemaMissingError` where the schema is not there and `TransientError` where the same call
    may succeed a moment later.
    """

    def __init__(self, pool: Pool, tenure: Tenure) -> None:
        self._pool = pool
        self.tenure = tenure

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

    async def replace_definition(self, old: WorkflowDefinition | None, new: WorkflowDefinition) -> None:
        """Make a workflow's definition another one: all that differs, in one transaction, or nothing.

        Args:
            old: what `load_definition` returned; None for a workflow that the database does not know.
            new: of the same slug; the same definition: nothing is sent.

        Raises:
            DefinitionChangedError: the database does not have `old` any more.
            UsageError: the new deps make a cycle.
            PgflowPrefectError: a run needs a step that is to go, or the workflow stays locked.
        """
        with translate_errors():
            async with self._pool.connection() as connection:
                await replace_definition(connection, old, new)

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

    async def create_run(
        self, workflow_slug: str, payload: str, run_id: UUID, flow_run_id: UUID | None = None
    ) -> int | None:
        """Start a run and its root steps, and take it at once; the same id again finds the run that exists.

        Args:
            workflow_slug: the workflow.
            payload: JSON text.
            run_id: the run's id.
            flow_run_id: its owner; without one, it is reserved for a flow run that is about to be created.

        Returns:
            The epoch, or None where the run has ended.

        Raises:
            UsageError: unknown workflow, no steps, a cycle.
            RunHeldError: it exists, and somebody else holds it.
        """
        rows = await self._fetch(
            "create_run",
            run_id=run_id,
            workflow_slug=workflow_slug,
            payload=payload,
            flow_run_id=flow_run_id,
            **self.tenure._asdict(),
        )
        return _find_epoch(rows)

    async def take_run(self, run_id: UUID, flow_run_id: UUID | None = None, *, force: bool = False) -> int | None:
        """Make a flow run the owner of a pending run and return the new epoch; None where the run has ended.

        Args:
            run_id: the run.
            flow_run_id: the owner; without one, the run is reserved for a flow run that is about to be created.
            force: take it from whoever holds it.

        Raises:
            RunHeldError: somebody else holds it.
            UsageError: there is no such run.
        """
        rows = await self._fetch(
            "take_run", run_id=run_id, flow_run_id=flow_run_id, force=force, **self.tenure._asdict()
        )
        return _find_epoch(rows)

    async def take_runs(self, workflow_slugs: Iterable[str], wanted: int, *, adopt: bool = False) -> list[TakenRun]:
        """Reserve pending runs that nobody holds, the oldest of each workflow first.

        Args:
            workflow_slugs: of these workflows, as far as they are enabled.
            wanted: so many at most.
            adopt: those that were begun before their workflow was enabled, too.
        """
        rows = await self._fetch(
            "take_runs", workflow_slugs=list(workflow_slugs), wanted=wanted, adopt=adopt, **self.tenure._asdict()
        )
        return [TakenRun.model_validate(row) for row in rows]

    async def link_flow_run(self, run_id: UUID, epoch: int, flow_run_id: UUID, *, queued: bool) -> bool:
        """Name the flow run that a run was reserved for; False where somebody else has taken the run meanwhile.

        Args:
            run_id: the run.
            epoch: in which it was reserved.
            flow_run_id: what was created for it.
            queued: Prefect decides when it starts, and there is no lease until then.
        """
        rows = await self._fetch(
            "link_flow_run",
            run_id=run_id,
            epoch=epoch,
            flow_run_id=flow_run_id,
            held_by=self.tenure.held_by,
            queued=queued,
        )
        return bool(rows[0]["linked"])

    async def release_run(self, run_id: UUID, epoch: int) -> None:
        """Hand a run back, for whoever takes it next."""
        await self._fetch("release_run", run_id=run_id, epoch=epoch)

    async def list_older_runs(self, workflow_slugs: Iterable[str]) -> list[tuple[str, UUID]]:
        """Return workflow and id of the pending runs that only `adopt` takes: older than their workflow's enabling."""
        rows = await self._fetch("list_older_runs", workflow_slugs=list(workflow_slugs))
        return [(str(row["workflow_slug"]), UUID(str(row["id"]))) for row in rows]

    async def list_waiting_runs(self) -> dict[str, tuple[int, UUID]]:
        """Return how many pending runs nobody has ever taken, and the oldest, by workflow; not of disabled ones."""
        rows = await self._fetch("list_waiting_runs")
        return {str(row["workflow_slug"]): (int(str(row["runs"])), UUID(str(row["first"]))) for row in rows}

    async def enable_workflow(self, workflow_slug: str, *, enabled: bool = True) -> Enabled:
        """Let workers and bridges take a workflow's new runs, or no runs at all; again: changes nothing.

        Raises:
            UnknownWorkflowError: with the nearest slug that exists.
        """
        await self.load_definition(workflow_slug)
        [row] = await self._fetch("enable_workflow", workflow_slug=workflow_slug, enabled=enabled)
        return Enabled.model_validate(row)

    async def list_enabled(self) -> dict[str, Enabled]:
        """Return the workflows that were enabled or disabled, by slug."""
        found = [Enabled.model_validate(row) for row in await self._fetch("list_enabled")]
        return {each.workflow_slug: each for each in found}

    async def read_run(self, run_id: UUID) -> Run:
        """Return a run as it is now.

        Raises:
            UnknownRunError: there is none of this id.
        """
        rows = await self._fetch("read_run", run_id=run_id, lease=self.tenure.lease)
        if not rows:
            raise _unknown_run(run_id)
        return Run.model_validate(rows[0])

    async def list_runs(
        self,
        *,
        workflow_slug: str | None = None,
        status: Status | None = None,
        since: datetime | None = None,
        limit: int = 20,
    ) -> list[Run]:
        """Return the newest runs first, at most `limit`: of one workflow, in one status, begun since then, or all."""
        rows = await self._fetch(
            "list_runs",
            workflow_slug=workflow_slug,
            status=status,
            since=since,
            limit=limit,
            lease=self.tenure.lease,
        )
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
        bound: str,
        has_function: bool,
        handler: str,
    ) -> Claim:
        """Count an attempt of a step and return its input; of a step that is completed or somebody else's, that.

        Args:
            run_id: the run.
            step_slug: the step.
            epoch: what `take_run` returned.
            task_run_id: Prefect's task run of this step.
            upstream: the upstream steps whose results are wanted, None for all.
            with_payload: whether the run's payload is wanted.
            bound: the kind of its handler, where no row says otherwise.
            has_function: whether this process could do it in Python.
            handler: who does it in words, where no row says otherwise, for `status`.

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
            bound=bound,
            has_function=has_function,
            handler=handler,
        )
        if rows[0]["status"] is None:
            raise SupersededError(run_id)
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

    async def watch_steps(self, awaited: Iterable[AwaitedStep]) -> list[StepEnd]:
        """Return those of the steps that others do which need not be waited for any more."""
        run_ids, step_slugs, epochs, task_run_ids, bound, have = (list(each) for each in zip(*awaited, strict=True))
        rows = await self._fetch(
            "watch_steps",
            run_ids=run_ids,
            step_slugs=step_slugs,
            epochs=epochs,
            task_run_ids=task_run_ids,
            bound=bound,
            have_function=have,
        )
        return [StepEnd.model_validate(row) for row in rows]

    async def read_input(
        self, run_id: UUID, step_slug: str, upstream: list[str] | None
    ) -> tuple[JsonValue, dict[str, JsonValue]]:
        """Return the run's payload and the results of a step's upstream steps, of these or of all, without claiming."""
        [row] = await self._fetch("read_input", run_id=run_id, step_slug=step_slug, upstream=upstream)
        found: Any = row
        return found["payload"], dict(found["upstream_results"])

    async def report_shadow(
        self, run_id: UUID, step_slug: str, *, outcome: str, details: list[str], seconds: float
    ) -> None:
        """Note what came of a handler that ran beside somebody else's work: same, different or failed."""
        await self._fetch(
            "report_shadow", run_id=run_id, step_slug=step_slug, outcome=outcome, details=details, seconds=seconds
        )

    # Bindings

    async def list_bindings(self, workflow_slug: str) -> dict[str, StepBinding]:
        """Return what a workflow's steps are bound to, by slug; only of those that have a row."""
        rows = await self._fetch("list_bindings", workflow_slug=workflow_slug)
        found = [StepBinding.model_validate(row) for row in rows]
        return {each.step_slug: each for each in found}

    async def list_bound_workflows(self) -> list[str]:
        """Return the slugs of the workflows that need no Python: rows say who does each of their steps."""
        return [str(row["slug"]) for row in await self._fetch("list_bound_workflows")]

    async def bind_step(
        self,
        workflow_slug: str,
        step_slug: str,
        kind: str | None,
        target: str | None = None,
        options: Mapping[str, JsonValue] | None = None,
    ) -> bool:
        """Say who does a step from its next claim on, or without a kind that no row does; False where it was so.

        Raises:
            UsageError: there is no such step, or there is a secret in it.
        """
        [row] = await self._fetch(
            "bind_step",
            workflow_slug=workflow_slug,
            step_slug=step_slug,
            kind=kind,
            target=target,
            options=to_json(options or {}).decode(),
        )
        return bool(row["changed"])

    async def undo_binding(self, workflow_slug: str, step_slug: str) -> bool:
        """Take back the last change of a step's binding that was not taken back yet; False where there is none."""
        [row] = await self._fetch("undo_binding", workflow_slug=workflow_slug, step_slug=step_slug)
        return bool(row["changed"])

    async def observe_workflow(self, workflow_slug: str) -> int:
        """Bind all steps of a workflow to others, and return how many were bound otherwise."""
        [row] = await self._fetch("observe_workflow", workflow_slug=workflow_slug)
        return int(str(row["changed"]))

    async def list_binding_changes(
        self, workflow_slug: str, step_slug: str | None = None, *, limit: int = 50
    ) -> list[BindingChange]:
        """Return who changed which binding of a workflow, or of a step of it, the latest first."""
        rows = await self._fetch("list_binding_changes", workflow_slug=workflow_slug, step_slug=step_slug, limit=limit)
        return [BindingChange.model_validate(row) for row in rows]

    async def find_functions(self, names: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        """Return what functions that take one jsonb return, such as `jsonb`; of one that does not exist, nothing.

        Args:
            names: schema and name of each, by whatever it is called in the answer.
        """
        schemas = [schema for schema, _ in names.values()]
        functions = [function for _, function in names.values()]
        rows = await self._fetch("find_functions", names=list(names), schemas=schemas, functions=functions)
        return {str(row["name"]): str(row["returns"]) for row in rows}

    async def list_shadows(self, workflow_slug: str) -> list[ShadowSummary]:
        """Return what came of the shadows of a workflow's steps, by slug."""
        rows = await self._fetch("list_shadows", workflow_slug=workflow_slug)
        return [ShadowSummary.model_validate(row) for row in rows]

    # Comparing with Prefect

    async def list_unsettled(self, *, after: UUID | None, limit: int, everything: bool = False) -> list[UUID]:
        """Return runs that somebody has taken and that Prefect was not yet seen to agree on, by id.

        Args:
            after: those behind this one; from the first one where not given.
            limit: so many at most.
            everything: settled ones, too.
        """
        rows = await self._fetch("list_unsettled", after=after, limit=limit, everything=everything)
        return [UUID(str(row["run_id"])) for row in rows]

    async def read_unsettled(self, run_ids: Iterable[UUID]) -> list[UnsettledRun]:
        """Return those of these runs that somebody has taken, as they are now."""
        rows = await self._fetch("read_unsettled", run_ids=list(run_ids), lease=self.tenure.lease)
        return [UnsettledRun.model_validate(row) for row in rows]

    async def list_unsettled_steps(self, run_ids: Iterable[UUID]) -> list[UnsettledStep]:
        """Return the steps of these runs that a task run has claimed."""
        rows = await self._fetch("list_unsettled_steps", run_ids=list(run_ids))
        return [UnsettledStep.model_validate(row) for row in rows]

    async def settle_runs(self, runs: Iterable[UnsettledRun]) -> None:
        """Look no further at runs that have ended; one that was taken again meanwhile stays as it is."""
        seen = list(runs)
        await self._fetch("settle_runs", run_ids=[run.id for run in seen], epochs=[run.epoch for run in seen])

    async def find_known(
        self, run_ids: Iterable[UUID], flow_run_ids: Iterable[UUID]
    ) -> tuple[frozenset[UUID], frozenset[UUID]]:
        """Return which of these runs exist, and which of these flow runs have ever taken one."""
        [row] = await self._fetch("find_known", run_ids=list(run_ids), flow_run_ids=list(flow_run_ids))
        known: Any = row
        return frozenset(known["run_ids"]), frozenset(known["flow_run_ids"])


def _find_epoch(rows: list[Row]) -> int | None:
    epoch = rows[0]["epoch"]
    return None if epoch is None else int(str(epoch))


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
        yield Store(pool, make_tenure(settings))


def make_tenure(settings: Settings) -> Tenure:
    """Return the terms on which this process holds runs."""
    return Tenure(f"{socket.gethostname()}:{os.getpid()}", settings.lease, settings.max_recoveries)
