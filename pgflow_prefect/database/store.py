"""The statements of the rest of the package: definitions, runs, claims, reports."""

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
from pgflow_prefect.database.recording import RecordingStatements
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
"""The number of ids in an error that lists the runs that a person may mean."""


class Store(
    BindingStatements,
    DeploymentStatements,
    HolderStatements,
    PruningStatements,
    RecordingStatements,
    UnsettledStatements,
):
    """pgflow's tables and functions, one method a statement.

    Every method raises `SchemaMissingError` if there is no schema, and `TransientError` if the same call may succeed
    a moment later.
    """

    # Definitions

    async def list_workflows(self) -> list[WorkflowSummary]:
        """Return every workflow with its size and the number of its runs."""
        return [WorkflowSummary.model_validate(row) for row in await self._fetch("list_workflows")]

    async def list_slugs(self) -> list[str]:
        """Return the slugs of all workflows in alphabetical order."""
        return [str(row["slug"]) for row in await self._fetch("list_slugs")]

    async def load_definition(self, workflow_slug: str) -> WorkflowDefinition:
        """Return the current definition of a workflow.

        Raises:
            UnknownWorkflowError: with the nearest slug that exists.
        """
        rows = await self._fetch("load_definition", workflow_slug=workflow_slug)
        if not rows:
            await self._raise_unknown_workflow(workflow_slug)
        return WorkflowDefinition.model_validate(rows[0])

    async def replace_definition(self, old: WorkflowDefinition | None, new: WorkflowDefinition) -> None:
        """Replace a workflow's definition: all differences in one transaction, or nothing.

        Args:
            old: from `load_definition`; None for a workflow that the database does not know.
            new: of the same slug; if it equals `old`, nothing is sent.

        Raises:
            DefinitionChangedError: the database no longer has `old`.
            UsageError: the new deps make a cycle.
            PgflowPrefectError: a run needs a removed step, or the workflow stays locked.
        """
        with translate_errors():
            async with self._pool.connection() as connection:
                await replace_definition(connection, old, new)

    async def load_run_definition(self, run_id: UUID) -> WorkflowDefinition:
        """Return the definition that a run began with, without later edits.

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
        """Start a run and its root steps, and take it at once; with the same id again, take the existing run.

        Args:
            workflow_slug: the workflow.
            payload: JSON text.
            run_id: the run's id.
            flow_run_id: its owner; without one, the run is reserved for a flow run that is about to be created.

        Returns:
            The epoch, or None if the run has ended.

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
        """Make a flow run the owner of a pending run and return the new epoch; None if the run has ended.

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
        self,
        workflow_slugs: Iterable[str],
        wanted: int,
        *,
        adopt: bool = False,
        besides: Iterable[UUID] = (),
        expired: bool = True,
    ) -> list[TakenRun]:
        """Reserve pending runs that no process holds, the oldest of each workflow first.

        Args:
            workflow_slugs: of these workflows, if they are enabled.
            wanted: the greatest number of runs.
            adopt: also runs that began before their workflow was enabled.
            besides: leaves out these runs, which this process executes, even if it could not extend their leases.
            expired: also runs whose owner let its lease run out, and these first. To find them, PostgreSQL reads
                every run that is held.
        """
        rows = await self._fetch(
            "take_runs",
            workflow_slugs=list(workflow_slugs),
            wanted=wanted,
            adopt=adopt,
            besides=list(besides),
            expired=expired,
            **self.lease_terms._asdict(),
        )
        return [TakenRun.model_validate(row) for row in rows]

    async def link_flow_run(self, run_id: UUID, epoch: int, flow_run_id: UUID, *, queued: bool) -> bool:
        """Name the flow run of a reserved run; return False if another process has taken the run meanwhile.

        Args:
            run_id: the run.
            epoch: in which it was reserved.
            flow_run_id: the flow run that was created for it.
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
        """Name the flow runs of reserved runs, all in one statement.

        Args:
            links: one for each run.
            lock_timeout: seconds to wait for each lock; None for the database's setting.

        Returns:
            The facts about each run, in the order of `links`.
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

        It may if it was made for the run, or if the run was never taken and its workflow is enabled.
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

    async def put_off_run(self, run_id: UUID, epoch: int, reason: str) -> bool:
        """Hand a run back that this process has reserved and could not begin, to be taken again after a while.

        The while grows with each time. The answer is False where `release_reservation` would hand nothing back.
        """
        given = {"epoch": epoch, "held_by": self.lease_terms.held_by}
        [row] = await self._fetch_telling("put_off_run", {"reason": reason}, run_id=run_id, **given)
        return bool(row["put_off"])

    async def list_older_runs(self, workflow_slugs: Iterable[str]) -> list[tuple[str, UUID]]:
        """Return workflow and id of the pending runs that only `adopt` takes, older than the enabling."""
        rows = await self._fetch("list_older_runs", workflow_slugs=list(workflow_slugs), lease=self.lease_terms.lease)
        return [(str(row["workflow_slug"]), UUID(str(row["id"]))) for row in rows]

    async def list_waiting_runs(self) -> dict[str, tuple[int, UUID]]:
        """Return the number of pending runs that no process has ever taken, and the oldest, by enabled workflow."""
        rows = await self._fetch("list_waiting_runs")
        return {str(row["workflow_slug"]): (int(str(row["runs"])), UUID(str(row["first"]))) for row in rows}

    async def enable_workflow(self, workflow_slug: str, *, enabled: bool = True) -> Enabled:
        """Let workers and bridges take a workflow's new runs, or no runs at all; a repeated call changes nothing.

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
        """Return the current state of a run, with its payload only on request.

        Raises:
            UnknownRunError: there is none of this id.
        """
        rows = await self._fetch("read_run", run_id=run_id, lease=self.lease_terms.lease, with_payload=with_payload)
        if not rows:
            raise _unknown_run(run_id)
        return Run.model_validate(rows[0])

    async def mark_unshown(self, runs: Sequence[Run]) -> list[Run]:
        """Return these runs, and note on each whether Prefect was not told of it."""
        if not self.implementation.executes:
            return [*runs]
        unshown = {each.id for each in await self.read_unrecorded([run.id for run in runs])}
        return [run.model_copy(update={"is_unshown": run.id in unshown}) for run in runs]

    async def find_run_id(self, name: RunName) -> UUID:
        """Return the id of the run that a person means; a whole id is returned without a statement.

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
        """Return a run's status, and the results of these steps if it is completed.

        Raises:
            UnknownRunError: there is none of this id.
        """
        rows = await self._fetch("read_end", run_id=run_id, step_slugs=[*step_slugs])
        if not rows:
            raise _unknown_run(run_id)
        return RunEnd.model_validate(rows[0])

    async def read_ends(self, asked: Sequence[tuple[UUID, Sequence[str]]]) -> list[RunEnd]:
        """Return the status of several runs, as `read_end` does, all in one statement.

        Args:
            asked: runs, and the steps whose results the caller wants; each run once.

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
        """Return the time by the database's clock, which also dates runs and steps."""
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

        Cancelled runs count as failed, too. Payloads are read only on request.
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

    async def fail_run(self, run_id: UUID, epoch: int, reason: str) -> bool:
        """Fail a run that this process holds and that can't go on, and its pending steps.

        Unlike a cancelled run, Prefect's Retry may reopen it. The answer is False if another process has the run now:
        it stays as it is then.
        """
        given = {"epoch": epoch, "held_by": self.lease_terms.held_by}
        [row] = await self._fetch_telling("fail_run", {"reason": reason}, run_id=run_id, **given)
        return bool(row["failed"])

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
        """Count an attempt of a step and return its input; for a completed or external step, return its state.

        Args:
            run_id: the run.
            epoch: from `take_run`.
            request: the step, and the parts of the input that it needs.

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
            epoch: from `take_run`.
            completion: the step and its result.

        Returns:
            The step's state afterwards; it is not `completed` if the report came too late.

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
            lock_timeout: seconds to wait for each lock; None for the database's setting.

        Returns:
            For each element, the answer that it would get alone. An error if its run is gone, if a former owner claims,
            or if the claim's run has ended. With several runs, None if another transaction has locked this run: then
            nothing was done for it.

        Raises:
            PgflowPrefectError: the error that one of them would raise alone.
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
        """Fail a task, its step and the run; for arguments and return value, see `complete_step`."""
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
    """Return a time-out in the server's form; None for the database's setting."""
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
    """Return the request for a task as JSON text; a result already is JSON text."""
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
        only_reads: the caller only reads definitions and runs, which works on every schema that this package knows.

    Raises:
        DatabaseUnavailableError: it can't be reached.
        SchemaMissingError: it has no pgflow schema, or an old one.
        PgflowPrefectError: the package can't yet execute runs of its schema.
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
