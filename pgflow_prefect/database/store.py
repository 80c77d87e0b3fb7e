"""The statements of the rest of the package. This file has those of runs and their steps; the parts have the others."""

import os
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic_core import to_json

from pgflow_prefect.database.airflow_task_statements import AirflowTaskStatements
from pgflow_prefect.database.backfill_statements import BackfillStatements
from pgflow_prefect.database.binding_statements import BindingStatements
from pgflow_prefect.database.child_statements import ChildStatements
from pgflow_prefect.database.connection import Row, find_dsn, open_pool
from pgflow_prefect.database.holder_statements import HolderStatements
from pgflow_prefect.database.installation import InstallationStatements
from pgflow_prefect.database.item_statements import ItemStatements
from pgflow_prefect.database.mirror_statements import MirrorStatements
from pgflow_prefect.database.moving_statements import MovingStatements
from pgflow_prefect.database.ownership_statements import OwnershipStatements
from pgflow_prefect.database.pool_statements import PoolStatements
from pgflow_prefect.database.process_identity import find_identity
from pgflow_prefect.database.pruning import PruningStatements
from pgflow_prefect.database.recording import RecordingStatements
from pgflow_prefect.database.run_names import RunName
from pgflow_prefect.database.schedules import ScheduleStatements
from pgflow_prefect.database.schema import check_schema, has_other_isolation
from pgflow_prefect.database.statements import LeaseTerms, to_setting
from pgflow_prefect.database.unsettled import UnsettledStatements
from pgflow_prefect.database.workflow_statements import WorkflowStatements
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.errors import (
    PgflowPrefectError,
    RunNotPendingError,
    SupersededError,
    UnknownRunError,
    UsageError,
)
from pgflow_prefect.models import (
    CachedResult,
    Claim,
    ClaimRequest,
    Completion,
    Ending,
    Failure,
    Report,
    Run,
    RunEnd,
    Status,
    StepFailure,
    StepState,
    TaskElement,
    TaskKey,
)
from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.settings import Settings

_DOING = {Completion: "complete", Failure: "fail", ClaimRequest: "claim"}

_SIMILAR_SHOWN = 5
"""The number of ids in an error that lists the runs that a person may mean."""


class Store(
    AirflowTaskStatements,
    BackfillStatements,
    BindingStatements,
    ChildStatements,
    HolderStatements,
    InstallationStatements,
    ItemStatements,
    MirrorStatements,
    MovingStatements,
    OwnershipStatements,
    PoolStatements,
    PruningStatements,
    RecordingStatements,
    ScheduleStatements,
    UnsettledStatements,
    WorkflowStatements,
):
    """pgflow's tables and functions, one method a statement.

    Every method raises `SchemaMissingError` if there is no schema, and `TransientError` if the same call may succeed
    a moment later.
    """

    # Runs

    async def load_run_definition(self, run_id: UUID) -> WorkflowDefinition:
        """Return the definition that a run began with, without later edits.

        Raises:
            UnknownRunError: there is no run of this id.
        """
        rows = await self._fetch("load_run_definition", run_id=run_id)
        if not rows:
            raise _unknown_run(run_id)
        return WorkflowDefinition.model_validate(rows[0])

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

    async def list_flow_runs(self, run_id: UUID) -> list[UUID]:
        """Return the flow runs that have taken a run, each once, in the order in which they took it."""
        rows = await self._fetch("list_flow_runs", run_id=run_id)
        return [*dict.fromkeys(UUID(str(row["flow_run_id"])) for row in rows)]

    async def list_task_runs(self, run_id: UUID) -> dict[str, UUID]:
        """Return the latest task run of each step of a run that was claimed, by step slug."""
        rows = await self._fetch("list_task_runs", run_id=run_id)
        return {str(row["step_slug"]): UUID(str(row["task_run_id"])) for row in rows}

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

    async def skip_step(self, run_id: UUID, step_slug: str, note: str | None, *, cascade: bool = True) -> Report:
        """Skip a step by hand that is pending or has not started yet, and return its state; the first report wins.

        Args:
            run_id: the run.
            step_slug: the step.
            note: why, for people.
            cascade: whether what is below it is skipped, too, unless its rule says otherwise.

        Raises:
            PgflowPrefectError: there is no such step, or it can't be skipped any more.
        """
        rows = await self._fetch_telling(
            "skip_step", {"note": note or ""}, run_id=run_id, step_slug=step_slug, cascade=cascade
        )
        return Report.model_validate({"error_message": None} | rows[0])

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

    async def list_failed_steps(self, run_id: UUID) -> list[StepFailure]:
        """Return the steps of a run that have failed by themselves, in the order of their ends."""
        return [StepFailure.model_validate(row) for row in await self._fetch("list_failed_steps", run_id=run_id)]

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

    async def complete_step(self, run_id: UUID, epoch: int | None, completion: Completion) -> Report:
        """Store a step's result and start what became ready.

        Args:
            run_id: the run.
            epoch: from `take_run`; None for whichever owner the run has: then the attempt alone is the fence.
            completion: the step and its result.

        Returns:
            The step's state afterwards; it is not `completed` if the report came too late.

        Raises:
            ResultInvalidError: jsonb can't hold the result.
        """
        given = completion.as_parameters()
        given["outcome"] = None if completion.outcome is None else to_json(completion.outcome).decode()
        statement = "complete_task" if self.implementation.retries_in_sql else "complete_step"
        [row] = await self._fetch(statement, run_id=run_id, epoch=epoch, **given)
        return Report.model_validate(row)

    async def find_cached(self, run_id: UUID, task: TaskKey, cache_key: str) -> CachedResult | None:
        """Return the latest result of this key that a task of a run takes over; None if there is none.

        It is of the same step of the same definition, in a run that still exists, and has not expired.

        Args:
            run_id: the run that needs it.
            task: of the run.
            cache_key: a hash.
        """
        rows = await self._fetch("find_cached", run_id=run_id, cache_key=cache_key, **task.as_parameters())
        return CachedResult.model_validate(rows[0]) if rows else None

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
            lock_timeout=to_setting(lock_timeout),
        )
        return [_to_answer(element, row) for element, row in zip(elements, rows, strict=True)]

    async def fail_step(
        self, run_id: UUID, task: TaskKey, error_message: str, *, state_name: str, **fence: object
    ) -> Report:
        """Fail a task, its step and the run; for arguments and return value, see `complete_step`.

        Where the database decides about retries, it is the attempt that fails, and the report says when the next one is
        due.
        """
        rows = await self._fetch_telling(
            "fail_task" if self.implementation.retries_in_sql else "fail_step",
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
async def open_store(
    settings: Settings, *, size: int | None = None, only_reads: bool = False, executes_moved: bool = False
) -> AsyncIterator[Store]:
    """Open the database that the settings name.

    Args:
        settings: name the database.
        size: connections at most.
        only_reads: the caller changes no run: it reads definitions and runs, or shows them in Prefect. That works on
            every schema that this package knows.
        executes_moved: the caller executes runs. On the released pgflow that works for flows that were moved.

    Raises:
        DatabaseUnavailableError: it can't be reached.
        SchemaMissingError: it has no pgflow schema, or an old one.
        NotOnReleasedError: the caller does not work on its schema.
        HiddenRowsError: row-level security hides rows from this role.
    """
    dsn = find_dsn(settings)
    async with open_pool(
        dsn, size=size or settings.pool_size, timeout=settings.connect_timeout, bound=settings.statement_bound
    ) as pool:
        async with pool.connection() as connection:
            implementation = await check_schema(connection, only_reads=only_reads, executes_moved=executes_moved)
            in_blocks = await has_other_isolation(connection)
        yield Store(pool, make_lease_terms(settings), in_blocks=in_blocks, implementation=implementation)


def make_lease_terms(settings: Settings) -> LeaseTerms:
    """Return the terms on which this process holds runs."""
    identity = find_identity()
    holder = identity.model_dump_json() if identity is not None else None
    return LeaseTerms(f"{socket.gethostname()}:{os.getpid()}", settings.lease, settings.max_recoveries, holder)
