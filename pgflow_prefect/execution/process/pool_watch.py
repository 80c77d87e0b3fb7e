"""Has steps done on Prefect's work pools: creates a flow run for each attempt, and notices lost attempts."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from uuid import UUID

import anyio
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import (
    DatabaseUnavailableError,
    NotRetriableError,
    PgflowPrefectError,
    PoolStepFailedError,
    PrefectRefusedError,
    PrefectUnavailableError,
)
from pgflow_prefect.execution.step_writer import persist
from pgflow_prefect.models import PoolAttempt, PoolProgress
from pgflow_prefect.prefect_api.client import TAG, ask_prefect
from pgflow_prefect.prefect_api.ownership import make_ownership_tag
from pgflow_prefect.prefect_api.states import is_cancelled
from pgflow_prefect.programs import Pool
from pgflow_prefect.waiting import Pauses
from pgflow_prefect.wording import clean

FLOW = "pgflow-step"
"""The flow of all steps on work pools, in Prefect."""

ENTRYPOINT = "pgflow_prefect.deployment.pool_step.flow"
"""What the workers of a pool load it by: a module, so that they need no file for it."""

_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 0.5, 5.0  # seconds between two looks
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds before Prefect is asked once more for a flow run
_PARENT = 10.0  # seconds in which Prefect's recorder gets to know the task run
_PARENT_INTERVAL = 0.2  # seconds

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolOrder:
    """An attempt that a work pool is to do.

    Attributes:
        attempt: of a step.
        workflow_slug: the run's workflow, for people.
        pool: the work pool.
        task_run_id: Prefect's task run of the step; the flow run is shown beneath it. None if Prefect has none.
        source: the file of handlers; None for the usual one.
    """

    attempt: PoolAttempt
    workflow_slug: str
    pool: Pool
    task_run_id: UUID | None
    source: str | None

    @property
    def key(self) -> str:
        """The idempotency key: every owner that asks for the flow run of this attempt gets the same one."""
        run_id, task, attempt = self.attempt
        return f"pgflow-step/{run_id}/{task.index}/{attempt}/{task.step_slug}"

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the flow run: they say where the work is, and have no data."""
        run_id, task, attempt = self.attempt
        here = None if self.pool.image is not None else str(Path.cwd())
        return {
            "run": str(run_id),
            "step": task.step_slug,
            "index": task.index,
            "attempt": attempt,
            "directory": self.pool.directory or here,
            "handlers": self.source,
        }


@dataclass
class _Wait:
    order: PoolOrder
    over: anyio.Event = field(default_factory=anyio.Event)
    reason: PgflowPrefectError | None = None


class PoolWatch:
    """The attempts that work pools do for the runs of this process. One poller looks at all of them."""

    def __init__(self, store: Store, installation: UUID, patience: float) -> None:
        """Begin without attempts.

        Args:
            store: the database.
            installation: its id, with which all objects in Prefect are tagged.
            patience: seconds for which a statement is tried again.
        """
        self._store = store
        self._patience = patience
        self._installation = installation
        self._waits: dict[UUID, _Wait] = {}  # by flow run
        self._deployments: dict[str, UUID] = {}  # by work pool
        self._asked: set[str] = set()  # the keys of flow runs that Prefect may have created without an answer
        self._poller: asyncio.Task[None] | None = None

    async def attend(self, order: PoolOrder, note: Callable[[UUID], None]) -> NoReturn:
        """Have an attempt done, and watch it until this is cancelled. PostgreSQL gets the report.

        Args:
            order: the attempt.
            note: called with the id of its flow run.

        Raises:
            PoolStepFailedError: the attempt has failed, or is lost.
            NotRetriableError: another attempt would fail, too.
        """
        [progress] = await persist(
            self._store, self._patience, lambda: self._store.read_pool_steps([order.attempt]), "a step on a work pool"
        )
        if not progress.is_awaited:
            await anyio.sleep_forever()  # the attempt is another program's, from before the step was bound to a pool
        flow_run = await self._create_in_time(order)
        note(flow_run.id)
        wait = self._waits[flow_run.id] = _Wait(order)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        try:
            await wait.over.wait()
        finally:
            if self._waits.get(flow_run.id) is wait:
                del self._waits[flow_run.id]
        assert wait.reason is not None
        raise wait.reason

    async def take_back(self, order: PoolOrder, flow_run_id: UUID | None) -> None:
        """Stop an attempt that no run waits for any more: its process, and its flow run if there is one."""
        try:
            await self._store.end_pool_step(order.attempt, None)
            if flow_run_id is None and order.key not in self._asked:
                return
            with ask_prefect("the flow run of a step"):
                async with get_client() as client:
                    if flow_run_id is None:  # with the same key, Prefect returns the one that it has created
                        flow_run_id = (await self._create(client, order)).id
                    state = (await client.read_flow_run(flow_run_id)).state
                    if state is None or not state.is_final():
                        await client.set_flow_run_state(flow_run_id, Cancelling())
        except ObjectNotFound:
            pass  # a user has deleted it
        except PgflowPrefectError as error:  # its process stops when it finds out, within a lease
            _logger.warning("the flow run of step %r is not cancelled: %s", order.attempt.task.step_slug, error)
        finally:
            self._asked.discard(order.key)

    def close(self) -> None:
        """Stop polling."""
        if self._poller is not None:
            self._poller.cancel()

    # Flow runs

    async def _create_in_time(self, order: PoolOrder) -> FlowRun:
        """Create the flow run of an attempt as soon as Prefect answers, or find it."""
        pauses = Pauses(_FIRST_PAUSE, _LONGEST_PAUSE)
        parent: UUID | None = None
        is_renewed = False
        while True:
            known = self._deployments.get(order.pool.pool)
            try:
                async with get_client() as client:
                    parent = parent or await self._find_parent(client, order)
                    self._asked.add(order.key)
                    with ask_prefect(f"a flow run on work pool {order.pool.pool!r}"):
                        created = await self._create(client, order, parent)
                    self._asked.discard(order.key)
                    return created
            except PrefectRefusedError as error:
                self._asked.discard(order.key)
                if self._deployments.get(order.pool.pool) == known:
                    self._deployments.pop(order.pool.pool, None)
                if known is None or is_renewed:
                    raise NotRetriableError(str(error)) from error
                is_renewed = True  # a user may have deleted the deployment
            except PrefectUnavailableError as error:
                pause = pauses.draw()
                _logger.warning("step %r: %s; again in %.0f s", order.attempt.task.step_slug, error, pause)
                await anyio.sleep(pause)

    async def _find_parent(self, client: PrefectClient, order: PoolOrder) -> UUID | None:
        """Return the step's task run once Prefect knows it; None if it does not within some seconds."""
        if order.task_run_id is None:
            return None
        with anyio.move_on_after(_PARENT):
            while True:
                with ask_prefect("a task run"):
                    try:
                        return (await client.read_task_run(order.task_run_id)).id
                    except ObjectNotFound:
                        pass
                await anyio.sleep(_PARENT_INTERVAL)
        return None

    async def _create(self, client: PrefectClient, order: PoolOrder, parent: UUID | None = None) -> FlowRun:
        created = await client.create_flow_run_from_deployment(
            await self._find_deployment(client, order.pool.pool),
            parameters=order.parameters,
            name=f"{clean(order.workflow_slug)}/{clean(order.attempt.task.step_slug)}",
            tags=[make_ownership_tag(self._installation)],
            idempotency_key=order.key,
            parent_task_run_id=parent,
            job_variables=order.pool.variables,
        )
        if created.parameters.get("run") != order.parameters["run"]:
            raise PrefectRefusedError(f"flow run {created.id} has the key of a step, but is not of its run")
        return created

    async def _find_deployment(self, client: PrefectClient, pool: str) -> UUID:
        if pool not in self._deployments:
            tag = make_ownership_tag(self._installation)
            self._deployments[pool] = await client.create_deployment(
                await client.create_flow_from_name(FLOW),
                f"{pool}-{tag}",
                work_pool_name=pool,
                entrypoint=ENTRYPOINT,
                pull_steps=[],
                enforce_parameter_schema=False,
                tags=[TAG, tag],
                description="Steps of pgflow that are bound to this work pool. pgflow-prefect makes it.",
            )
        return self._deployments[pool]

    # Looks

    async def _poll(self) -> None:
        intervals = Pauses(_SHORTEST_INTERVAL, _LONGEST_INTERVAL, factor=1.5)
        while self._waits:
            known = len(self._waits)
            await anyio.sleep(intervals.draw())
            try:
                await self._look()
            except DatabaseUnavailableError as error:
                _logger.warning("not looking at %d steps on work pools: %s", known, error)
                with suppress(Exception):  # the next look comes in any case
                    await self._store.drop_broken_connections()
            except Exception:  # no error may leave the waiting steps without a poller
                _logger.exception("not looking at %d steps on work pools", known)
            if len(self._waits) > known:
                intervals.reset()

    async def _look(self) -> None:
        waits = dict(self._waits)
        if not waits:
            return
        shown = await self._read([*waits])
        # After Prefect: what a process has reported before it ended is known now.
        progresses = await self._store.read_pool_steps([each.order.attempt for each in waits.values()])
        for (flow_run_id, wait), progress in zip(waits.items(), progresses, strict=True):
            wait.reason = _judge(wait.order, progress, flow_run_id, shown)
            if wait.reason is not None:
                wait.over.set()

    async def _read(self, ids: list[UUID]) -> dict[UUID, FlowRun] | None:
        """Return the flow runs that exist, by id; None if Prefect does not answer."""
        try:
            with ask_prefect("the flow runs of steps"):
                async with get_client() as client:
                    found: dict[UUID, FlowRun] = {}
                    for start in range(0, len(ids), _PAGE):
                        chosen = FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + _PAGE]))
                        page = await client.read_flow_runs(flow_run_filter=chosen, limit=_PAGE)
                        found |= {each.id: each for each in page}
                    return found
        except PgflowPrefectError as error:
            _logger.info("not looking at the flow runs of steps: %s", error)
            return None


_PAGE = 200  # the largest answer of Prefect's API by default


def _judge(
    order: PoolOrder, progress: PoolProgress, flow_run_id: UUID, shown: dict[UUID, FlowRun] | None
) -> PgflowPrefectError | None:
    """Return why an attempt is over without a completion; None while it may go on.

    Prefect's state never says what was done. It only says that no process will begin the attempt any more.
    """
    if progress.failure is not None:
        kind = NotRetriableError if progress.is_final else PoolStepFailedError
        return kind(progress.failure)
    if progress.is_live or not progress.is_awaited:
        return None
    flow_run = shown.get(flow_run_id) if shown is not None else None
    reason = _find_loss(order, flow_run, has_begun=progress.has_begun, is_shown=shown is not None)
    if reason is None:
        return None
    is_unwanted = flow_run is not None and flow_run.state is not None and is_cancelled(flow_run.state)
    return NotRetriableError(reason) if is_unwanted else PoolStepFailedError(reason)


def _find_loss(order: PoolOrder, flow_run: FlowRun | None, *, has_begun: bool, is_shown: bool) -> str | None:
    """Return why no process does an attempt any more, without a live lease; None while one may begin it."""
    where = f"on work pool {order.pool.pool!r}"
    state = flow_run.state if flow_run is not None else None
    if has_begun:
        return f"the process {where} that did step {order.attempt.task.step_slug!r} has vanished, or was stopped"
    if is_shown and flow_run is None:
        return f"the flow run of the step {where} was deleted in Prefect before it began"
    if flow_run is None or state is None or not state.is_final():
        return None
    reason = f": {clean(state.message)}" if state.message else ""
    return f"flow run {flow_run.name!r} {where} has ended as {state.name} before the step began{reason}"
