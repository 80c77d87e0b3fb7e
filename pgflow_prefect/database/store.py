"""What the rest of the package asks of the database: definitions, runs, claims, reports."""

import os
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic_core import to_json

from pgflow_prefect.database.binding_statements import BindingStatements
from pgflow_prefect.database.connection import Row, find_dsn, open_pool
from pgflow_prefect.database.definition_edit import replace_definition
from pgflow_prefect.database.deployment_statements import DeploymentStatements
from pgflow_prefect.database.holder_statements import HolderStatements
from pgflow_prefect.database.process_identity import find_identity
from pgflow_prefect.database.pruning import PruningStatements
from pgflow_prefect.database.run_names import RunName
from pgflow_prefect.database.schema import check_schema, has_other_isolation
from pgflow_prefect.database.statements import LeaseTerms
from pgflow_prefect.database.translation import translate_errors
from pgflow_prefect.database.unsettled import UnsettledStatements
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.errors import (
    PgflowPrefectError,
    RunNotPendingError,
    SupersededError,
    UnknownRunError,
    UnknownWorkflowError,
    UsageError,
)
from pgflow_prefect.models import (
    Claim,
    ClaimRequest,
    Completion,
    Enabled,
    Ending,
    Failure,
    LinkedRun,
    LinkRequest,
    Report,
    Run,
    RunEnd,
    Status,
    StepState,
    TakenRun,
    TaskElement,
    TaskKey,
    WorkflowSummary,
)
from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.settings import Settings
from pgflow_prefect.wording import suggest

_DOING = {Completion: "complete", Failure: "fail", ClaimRequest: "claim"}

_SIMILAR_SHOWN = 5
"""Ids that an error shows of the runs that a person may mean."""


class Store(BindingStatements, DeploymentStatements, HolderStatements, PruningStatements, UnsettledStatements):
    """pgflow's tables and functions, one method a statement.

    Every method raises `SchemaMissingError` where the schema is not there and `TransientError` where the same call
    may succeed a moment later.
    """

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
            RunHeldError: it exists, and another process holds it.
        """
        rows = await self._fetch(
            "create_run",
            run_id=run_id,
            workflow_slug=workflow_slug,
            payload=payload,
            flow_run_id=flow_run_id,
            **self.lease_terms._asdict(),
        )
        return _find_epoch(rows)

    async def take_run(self, run_id: UUID, flow_run_id: UUID | None = None, *, force: bool = False) -> int | None:
        """Make a flow run the owner of a pending run and return the new epoch; None where the run has ended.

        Args:
            run_id: the run.
            flow_run_id: the owner; without one, the run is reserved for a flow run that is about to be created.
            force: take it from the process that holds it.

        Raises:
            RunHeldError: another process holds it.
            UsageError: there is no such run.
        """
        rows = await self._fetch(
            "take_run", run_id=run_id, flow_run_id=flow_run_id, force=force, **self.lease_terms._asdict()
        )
        return _find_epoch(rows)

    async def take_runs(
        self, workflow_slugs: Iterable[str], wanted: int, *, adopt: bool = False, besides: Iterable[UUID] = ()
    ) -> list[TakenRun]:
        """Reserve pending runs that no process holds, the oldest of each workflow first.

        Args:
            workflow_slugs: of these workflows, as far as they are enabled.
            wanted: so many at most.
            adopt: those that were begun before their workflow was enabled, too.
            besides: not these, which this process executes, even where it could not extend their leases.
        """
        rows = await self._fetch(
            "take_runs",
            workflow_slugs=list(workflow_slugs),
            wanted=wanted,
            adopt=adopt,
            besides=list(besides),
            **self.lease_terms._asdict(),
        )
        return [TakenRun.model_validate(row) for row in rows]

    async def link_flow_run(self, run_id: UUID, epoch: int, flow_run_id: UUID, *, queued: bool) -> bool:
        """Name the flow run that a run was reserved for; False where another process has taken the run meanwhile.

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
            held_by=self.lease_terms.held_by,
            queued=queued,
        )
        return bool(rows[0]["linked"])

    async def link_flow_runs(
        self, links: Sequence[LinkRequest], *, lock_timeout: float | None = None
    ) -> list[LinkedRun]:
        """Name the flow runs that runs were reserved for, all in one statement.

        Args:
            links: of each run one.
            lock_timeout: seconds to wait for each lock; None for what the database says.

        Returns:
            What is known of each run, in the order of `links`.
        """
        rows = await self._fetch(
            "link_flow_runs",
            run_ids=[each.run_id for each in links],
            epochs=[each.epoch for each in links],
            flow_run_ids=[each.flow_run_id for each in links],
            held_by=self.lease_terms.held_by,
            lock_timeout=_to_setting(lock_timeout),
        )
        found = {each.run_id: each for each in map(LinkedRun.model_validate, rows)}
        return [found[each.run_id] for each in links]

    async def is_made_for(self, run_id: UUID, flow_run_id: UUID) -> bool:
        """Tell whether a flow run that Prefect started may take a run.

        It may where it was made for the run, or where the run was never taken and its workflow is enabled.
        """
        [row] = await self._fetch("is_made_for", run_id=run_id, flow_run_id=flow_run_id)
        return bool(row["made"])

    async def release_run(self, run_id: UUID, epoch: int) -> None:
        """Hand a run back, for its next owner."""
        await self._fetch("release_run", run_id=run_id, epoch=epoch)

    async def release_reservation(self, run_id: UUID, epoch: int) -> None:
        """Hand a run back that this process has reserved, and linked to no flow run.

        The next process that reserves the run does so in the same epoch: what that one has, stays as it is.
        """
        await self._fetch("release_reservation", run_id=run_id, epoch=epoch, held_by=self.lease_terms.held_by)

    async def list_older_runs(self, workflow_slugs: Iterable[str]) -> list[tuple[str, UUID]]:
        """Return workflow and id of the pending runs that only `adopt` takes: older than their workflow's enabling."""
        rows = await self._fetch("list_older_runs", workflow_slugs=list(workflow_slugs), lease=self.lease_terms.lease)
        return [(str(row["workflow_slug"]), UUID(str(row["id"]))) for row in rows]

    async def list_waiting_runs(self) -> dict[str, tuple[int, UUID]]:
        """Return how many pending runs no process has ever taken, and the oldest, by workflow; not of disabled ones."""
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

    async def read_run(self, run_id: UUID, *, with_payload: bool = False) -> Run:
        """Return a run as it is now, its payload only where that is asked for.

        Raises:
            UnknownRunError: there is none of this id.
        """
        rows = await self._fetch("read_run", run_id=run_id, lease=self.lease_terms.lease, with_payload=with_payload)
        if not rows:
            raise _unknown_run(run_id)
        return Run.model_validate(rows[0])

    async def find_run_id(self, name: RunName) -> UUID:
        """Return the id of the run that a person means; a whole id is returned without a look.

        Raises:
            UnknownRunError: no run's id begins so, or there is no run at all.
            UsageError: the ids of several runs begin so.
        """
        if name.run_id is not None:
            return name.run_id
        if name.first is None:
            found = await self._fetch("find_latest_run")
            if not found:
                raise UnknownRunError(f"there is no run yet: {self.implementation.how_to_start}")
            return UUID(str(found[0]["id"]))
        found = await self._fetch("find_runs_between", first=name.first, last=name.last, limit=_SIMILAR_SHOWN + 1)
        if not found:
            raise UnknownRunError(f"unknown run {name.text!r}; `pgflow-prefect runs` shows the newest")
        ids = [str(row["id"]) for row in found]
        if len(ids) > 1:
            listed = ", ".join(ids[:_SIMILAR_SHOWN]) + (", …" if len(ids) > _SIMILAR_SHOWN else "")
            raise UsageError(f"run {name.text!r} is not unique: {listed}. Type more of the id")
        return UUID(ids[0])

    async def read_end(self, run_id: UUID, step_slugs: Iterable[str]) -> RunEnd:
        """Return how a run stands, and the results of these steps if it is completed.

        Raises:
            UnknownRunError: there is none of this id.
        """
        rows = await self._fetch("read_end", run_id=run_id, step_slugs=[*step_slugs])
        if not rows:
            raise _unknown_run(run_id)
        return RunEnd.model_validate(rows[0])

    async def read_ends(self, asked: Sequence[tuple[UUID, Sequence[str]]]) -> list[RunEnd]:
        """Return how several runs stand, as `read_end` does, all in one statement.

        Args:
            asked: runs and the steps whose results are wanted; each run once.

        Raises:
            UnknownRunError: there is none of one of these ids.
        """
        elements = [{"run_id": run_id, "step_slugs": [*slugs]} for run_id, slugs in asked]
        rows = await self._fetch("read_ends", asked=to_json(elements).decode())
        found = {each.id: each for each in map(RunEnd.model_validate, rows)}
        for run_id, _ in asked:
            if run_id not in found:
                raise _unknown_run(run_id)
        return [found[run_id] for run_id, _ in asked]

    async def read_clock(self) -> datetime:
        """Return the database's time, which those of runs and steps are from."""
        [row] = await self._fetch("read_clock")
        return datetime.fromisoformat(str(row["now"]))

    async def list_runs(
        self,
        *,
        workflow_slug: str | None = None,
        status: Status | Literal[Ending.CANCELLED] | None = None,
        since: datetime | None = None,
        limit: int = 20,
        with_payload: bool = False,
    ) -> list[Run]:
        """Return the newest runs first, at most `limit`: of one workflow, in one status, begun since then, or all.

        Cancelled runs are failed ones, too. Payloads are only read where they are asked for.
        """
        rows = await self._fetch(
            "list_runs",
            workflow_slug=workflow_slug,
            status=Status.FAILED if status is Ending.CANCELLED else status,
            ended_as=status if status is Ending.CANCELLED else None,
            since=since,
            limit=limit,
            lease=self.lease_terms.lease,
            with_payload=with_payload,
        )
        return [Run.model_validate(row) for row in rows]

    async def reopen_run(self, run_id: UUID) -> None:
        """Make a failed run pending again with its failed steps; a pending one stays as it is."""
        await self._fetch("reopen_run", run_id=run_id)

    async def repair_run(self, run_id: UUID) -> None:
        """Start what is ready and was not started, end what is done."""
        await self._fetch("repair_run", run_id=run_id)

    async def cancel_run(self, run_id: UUID, reason: str) -> None:
        """End a run and all its pending steps as cancelled; a finished run stays as it is."""
        await self._fetch_telling("cancel_run", {"reason": reason}, run_id=run_id)

    async def fail_run(self, run_id: UUID, reason: str) -> None:
        """Fail a run that can't go on, and its pending steps; unlike a cancelled one, Prefect's Retry may reopen it."""
        await self._fetch_telling("fail_run", {"reason": reason}, run_id=run_id)

    # Steps

    async def list_step_states(self, run_id: UUID) -> list[StepState]:
        """Return the steps of a run that have started, in the order of their start."""
        return [StepState.model_validate(row) for row in await self._fetch("list_step_states", run_id=run_id)]

    async def list_step_ends(self, run_id: UUID, step_slugs: Iterable[str]) -> list[StepState]:
        """Return how these steps of a run ended, those that have started, without their results."""
        rows = await self._fetch("list_step_ends", run_id=run_id, step_slugs=[*step_slugs])
        return [StepState.model_validate(row) for row in rows]

    async def read_results(self, run_id: UUID, step_slugs: Iterable[str]) -> dict[str, RawJson]:
        """Return the results of those of these steps that are completed, by slug."""
        rows = await self._fetch("read_results", run_id=run_id, step_slugs=list(step_slugs))
        return RawJson(str(rows[0]["results"])).split()

    async def claim_step(self, run_id: UUID, epoch: int, request: ClaimRequest) -> Claim:
        """Count an attempt of a step and return its input; of a step that is completed or external, that.

        Args:
            run_id: the run.
            epoch: what `take_run` returned.
            request: the step, and what is wanted.

        Raises:
            SupersededError: another owner has taken the run.
            RunNotPendingError: the run has ended.
        """
        [row] = await self._fetch("claim_step", run_id=run_id, epoch=epoch, **request.as_parameters())
        claim = _to_claim(row)
        if claim is None:
            raise SupersededError(run_id)
        return claim

    async def complete_step(self, run_id: UUID, epoch: int, completion: Completion) -> Report:
        """Store a step's result and start what became ready.

        Args:
            run_id: the run.
            epoch: what `take_run` returned.
            completion: the step and its result.

        Returns:
            The step's state afterwards: not `completed` where the report came too late.

        Raises:
            ResultInvalidError: jsonb can't hold the result.
        """
        [row] = await self._fetch("complete_step", run_id=run_id, epoch=epoch, **completion.as_parameters())
        return Report.model_validate(row)

    async def perform_tasks(
        self, elements: Sequence[TaskElement], *, lock_timeout: float | None = None
    ) -> list[Report | Claim | PgflowPrefectError | None]:
        """Complete, fail and claim tasks of several runs, in this order: all in one transaction, or nothing.

        Args:
            elements: those of one run together, and the runs by id.
            lock_timeout: seconds to wait for each lock; None for what the database says.

        Returns:
            What each of them alone would return. An error where its run is gone; for a claim of a former owner, or of
            a run that has ended, what it alone would raise. None where, of several runs, another transaction has
            locked this one: then nothing was done for this run.

        Raises:
            PgflowPrefectError: what one of them alone would raise.
        """
        runs = {each.run_id for each in elements}
        rows = await self._fetch(
            "perform_tasks",
            run_id=elements[0].run_id if len(runs) == 1 else None,
            elements=f"[{','.join(map(_to_element, elements))}]",
            lock_timeout=_to_setting(lock_timeout),
        )
        return [_to_answer(element, row) for element, row in zip(elements, rows, strict=True)]

    async def fail_step(
        self, run_id: UUID, task: TaskKey, error_message: str, *, state_name: str, **fence: object
    ) -> Report:
        """Fail a task, its step and the run; arguments and return value as of `complete_step`."""
        rows = await self._fetch_telling(
            "fail_step",
            {"error_message": error_message},
            run_id=run_id,
            state_name=state_name,
            **task.as_parameters(),
            **fence,
        )
        return Report.model_validate(rows[0])

    async def note_state(
        self, run_id: UUID, task: TaskKey, *, task_run_id: UUID, state_name: str, message: str
    ) -> None:
        """Note the state that Prefect shows a task run in."""
        await self._fetch_telling(
            "note_state",
            {"message": message},
            run_id=run_id,
            task_run_id=task_run_id,
            state_name=state_name,
            **task.as_parameters(),
        )


def _to_setting(seconds: float | None) -> str | None:
    """Return a time-out as the server reads it; None for what the database says."""
    return None if seconds is None else f"{seconds * 1000:.0f}ms"


def _find_epoch(rows: list[Row]) -> int | None:
    epoch = rows[0]["epoch"]
    return None if epoch is None else int(str(epoch))


def _to_claim(row: Row) -> Claim | None:
    return None if row["status"] is None else Claim.model_validate(row)


def _to_answer(element: TaskElement, row: Row) -> Report | Claim | PgflowPrefectError | None:
    if row["outcome"] == "locked":
        return None
    if row["outcome"] == "gone":
        return _unknown_run(element.run_id)
    if not isinstance(element.asked, ClaimRequest):
        return Report.model_validate(row)
    if row["outcome"] == "ended":
        return RunNotPendingError(str(row["error_message"]))
    return _to_claim(row) or SupersededError(element.run_id)


def _to_element(element: TaskElement) -> str:
    """Return what is to be done to a task as JSON text; a result is that already."""
    asked = element.asked
    fields = {"do": _DOING[type(asked)], "run_id": element.run_id, "epoch": element.epoch} | asked.as_parameters()
    result = fields.pop("result", None)
    text = to_json(fields).decode()
    return text if result is None else f'{text.removesuffix("}")},"result":{result}}}'


def _unknown_run(run_id: UUID) -> UnknownRunError:
    return UnknownRunError(f"unknown run {run_id}; `pgflow-prefect runs` shows the newest")


@asynccontextmanager
async def open_store(settings: Settings, *, size: int | None = None, only_reads: bool = False) -> AsyncIterator[Store]:
    """Open the database that the settings name.

    Args:
        settings: name the database.
        size: connections at most.
        only_reads: the caller only looks at definitions and runs, which works on every schema that this package knows.

    Raises:
        DatabaseUnavailableError: it can't be reached.
        SchemaMissingError: it has no pgflow schema, or an old one.
        PgflowPrefectError: runs of the schema that it has can't be executed yet.
        HiddenRowsError: row-level security hides rows from this role.
    """
    dsn = find_dsn(settings)
    async with open_pool(
        dsn, size=size or settings.pool_size, timeout=settings.connect_timeout, bound=settings.statement_bound
    ) as pool:
        async with pool.connection() as connection:
            implementation = await check_schema(connection, only_reads=only_reads)
            in_blocks = await has_other_isolation(connection)
        yield Store(pool, make_lease_terms(settings), in_blocks=in_blocks, implementation=implementation)


def make_lease_terms(settings: Settings) -> LeaseTerms:
    """Return the terms on which this process holds runs."""
    identity = find_identity()
    holder = identity.model_dump_json() if identity is not None else None
    return LeaseTerms(f"{socket.gethostname()}:{os.getpid()}", settings.lease, settings.max_recoveries, holder)
