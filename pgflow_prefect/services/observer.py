"""Shows in Prefect what other programs execute: the workers of the released pgflow, and Airflow.

It writes nothing of pgflow's, and needs no lease: what it does can be repeated. A flow run has an idempotency key of
its run, and a state of a task run has an id of its step and time. So several observers, or one that was killed and
started again, show a run once. PostgreSQL knows which runs are shown, and whether their end is.
"""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import monotonic
from typing import Any
from uuid import UUID

import anyio
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed, Failed, Running

from pgflow_prefect.airflow.mirrored import EPOCH
from pgflow_prefect.database.recording import RecordLink, UnrecordedRun
from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.errors import (
    DatabaseUnavailableError,
    ForeignInstallationError,
    PgflowPrefectError,
    PrefectRefusedError,
    PrefectUnavailableError,
    UnknownRunError,
)
from pgflow_prefect.execution.reporting.observed import ObservedSteps
from pgflow_prefect.execution.reporting.recorded import StepEvents
from pgflow_prefect.models import Run, Status, StepState, TakenRun, TaskKey
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.services.flow_recorder import FlowRecorder
from pgflow_prefect.services.heartbeat import Heartbeat
from pgflow_prefect.services.recording import send_events
from pgflow_prefect.settings import Settings
from pgflow_prefect.waiting import Pauses, Wakeup

_PAGE = 100  # runs that are read together
_SHORTEST_LOOK, _LONGEST_LOOK = 0.25, 2.0  # seconds between two looks at one run; they grow while nothing changes
_STEPS_A_SECOND, _TASKS_A_SECOND = 500.0, 20_000.0
"""How many of a run's steps the looks at it read on the average, and how many tasks of its maps they count."""

_SHARE = 0.02  # of the time that looks for runs that have begun and ended between two looks may take
_LEAST_APART = 1.0  # seconds between two of these
_OVERLAP = timedelta(hours=1)
"""A run has the time at which its transaction began, and is seen after its commit: so looks overlap by so much."""

_ADOPTION = 30.0  # seconds between two looks for runs that a vanished observer has begun to show
_CLEANING = 3600.0  # seconds between two looks for rows of runs that pgflow has deleted
_LANES = 8  # flow runs that are created, or runs that are looked at, at the same time

_logger = logging.getLogger(__name__)


@dataclass
class _LiveRun:
    """A run that is shown, and whose end is not.

    Attributes:
        run_id: the run.
        flow_run: shows it.
        steps: its steps, as far as Prefect was told of them.
        slugs: all of its steps.
        latest: its steps at the last look.
        pauses: between two looks.
        due_at: when the next look is due, by the monotonic clock.
    """

    run_id: UUID
    flow_run: FlowRun
    steps: ObservedSteps
    slugs: tuple[str, ...]
    latest: list[StepState] = field(default_factory=list)
    pauses: Pauses = field(default_factory=lambda: Pauses(_SHORTEST_LOOK, _LONGEST_LOOK, factor=1.5))
    due_at: float = 0.0

    def wait(self, found: list[StepState]) -> None:
        """Note what this look has found, and when the next one is due."""
        if found != self.latest:
            self.pauses.reset()
        self.latest = found
        tasks = sum(each.tasks or 0 for each in found)
        cost = len(self.slugs) / _STEPS_A_SECOND + tasks / _TASKS_A_SECOND
        self.due_at = monotonic() + max(self.pauses.draw(), cost)


@dataclass
class Observer:
    """Shows the runs of some flows, from their start to their end.

    Attributes:
        store: the database.
        client: Prefect's API.
        settings: its intervals, and what is shown beside task runs.
        workflow_slugs: the flows.
        adopt: also show runs that go on, and began before their flow was observed.
        passed_at: the time of the last look for runs, by the monotonic clock.
        failure: why it has stopped by itself.
    """

    store: Store
    client: PrefectClient
    settings: Settings
    workflow_slugs: tuple[str, ...]
    adopt: bool
    passed_at: float = field(default_factory=monotonic, init=False)
    failure: ForeignInstallationError | None = field(default=None, init=False)
    _live: dict[UUID, _LiveRun] = field(default_factory=dict, init=False)
    _refused: dict[UUID, datetime] = field(default_factory=dict, init=False)  # and the time of the look
    _looked_at: datetime | None = field(default=None, init=False)  # by the database's clock
    _since: datetime | None = field(default=None, init=False)  # no ended run that began earlier is left to be shown
    _ended_due_at: float = field(default=0.0, init=False)
    _adoption_due_at: float = field(default=0.0, init=False)
    _cleaning_due_at: float = field(default=0.0, init=False)
    _stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._heartbeat = Heartbeat(self.store, self.client)
        self._wakeup = Wakeup()

    async def register(self) -> None:
        """Register this database in Prefect, and enable the flows.

        Raises:
            UnknownWorkflowError: the database does not define one of them.
            ForeignInstallationError: the database is a copy of another one that has been used with Prefect.
            PrefectUnavailableError: Prefect does not answer.
        """
        for slug in self.workflow_slugs:
            await self.store.load_definition(slug)
        installation = await self._heartbeat.register()
        self.recorder = FlowRecorder(self.store, self.client, installation.id, self.settings)
        for slug in self.workflow_slugs:
            await self.store.enable_workflow(slug)

    def notice(self, run_ids: Collection[UUID], workflow_slugs: Collection[str]) -> None:
        """Look at once: these runs have changed. These are the workflows to be shown from now on."""
        self.workflow_slugs = tuple(workflow_slugs)
        for run_id in run_ids:
            if (live := self._live.get(run_id)) is not None:
                live.due_at = 0.0
            else:
                self._adoption_due_at = 0.0  # one that had ended may go on again
        if run_ids:
            self._wakeup.wake()

    async def run(self) -> None:
        """Show runs until `stop`.

        Raises:
            ForeignInstallationError: another database has begun to use this one's id in Prefect.
        """
        async with anyio.create_task_group() as group:
            group.start_soon(self._heartbeat.keep, self._give_up)
            pauses = Pauses(_SHORTEST_LOOK, self.settings.sweep_interval, factor=1.5)
            while not self._stopped:
                pause = await self._try_to_look(pauses)
                if not self._stopped:
                    await self._wakeup.wait(pause)
            group.cancel_scope.cancel()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """End after the present look. Another observer, or the next one, goes on from there."""
        self._stopped = True
        self._wakeup.wake()

    def _give_up(self, error: ForeignInstallationError) -> None:
        self.failure = error
        self.stop()

    async def _try_to_look(self, pauses: Pauses) -> float:
        """Look once, and return the seconds until the next look."""
        try:
            if await self._look():
                pauses.reset()
        except PgflowPrefectError as error:
            _logger.warning("some runs are shown later: %s", error)
            if isinstance(error, DatabaseUnavailableError):
                await self._drop_broken_connections()
            return pauses.draw()
        finally:
            self.passed_at = monotonic()
        now = monotonic()
        return max(min([pauses.draw(), *(each.due_at - now for each in self._live.values())]), 0.0)

    async def _drop_broken_connections(self) -> None:
        try:
            await self.store.drop_broken_connections()
        except PgflowPrefectError as error:
            _logger.debug("connections are not checked: %s", error)

    async def _look(self) -> bool:
        """Show what is new; tell whether there was something."""
        if monotonic() >= self._adoption_due_at:
            await self._adopt_shown()
            self._adoption_due_at = monotonic() + _ADOPTION
        if monotonic() >= self._cleaning_due_at:
            await self._forget_deleted()
            self._cleaning_due_at = monotonic() + _CLEANING
        found = await self._show_new()
        due = [each for each in self._live.values() if each.due_at <= monotonic()]
        await _each(due, self._follow)
        return bool(found)

    # Runs that are not shown yet

    async def _show_new(self) -> int:
        with_ended = monotonic() >= self._ended_due_at
        now, began = await self.store.read_clock(), monotonic()
        self._looked_at = now
        found = await self.store.list_unshown(
            self.workflow_slugs,
            adopt=self.adopt,
            with_ended=with_ended,
            since=self._since,
            besides=self._refused,
            limit=_PAGE,
        )
        if with_ended:
            self._ended_due_at = monotonic() + max((monotonic() - began) / _SHARE, _LEAST_APART)
        runs = await self.store.read_unrecorded(found)
        going_on = [each for each in runs if each.status is Status.PENDING]
        ended = [each.id for each in runs if each.status is not Status.PENDING]
        await _each(going_on, self._begin)
        if ended:
            await self._record(ended)
        if len(found) >= _PAGE:
            self._ended_due_at = 0.0  # there are more
        elif with_ended:
            self._since = now - _OVERLAP
            self._forget_refused(self._since)
        return len(runs)

    async def _record(self, run_ids: list[UUID]) -> None:
        recorded = await self.recorder.record(run_ids)
        self._note_refused(recorded.refused.keys())
        for error, count in Counter(map(str, recorded.refused.values())).items():
            _logger.error("%d runs can't be shown: %s", count, error)
        # Also those that another observer has linked: it may be gone, and all of this was done.
        await self._settle([run_id for run_id in run_ids if run_id not in recorded.refused])

    async def _begin(self, run: UnrecordedRun) -> None:
        taken = TakenRun(run_id=run.id, workflow_slug=run.workflow_slug, epoch=run.epoch, former_flow_run_id=None)
        try:
            flow_run = await self.recorder.show_begun(taken)
        except PrefectRefusedError as error:
            self._note_refused([run.id])
            _logger.error("run %s can't be shown: %s", run.id, error)  # noqa: TRY400  no traceback
            return
        await self.store.link_recorded_runs([RecordLink(run.id, run.epoch, flow_run.id)])
        _logger.info("run %s of %r, flow run %s", run.id, run.workflow_slug, flow_run.name)
        await self._add(run.id, flow_run)

    def _note_refused(self, run_ids: Collection[UUID]) -> None:
        assert self._looked_at is not None
        self._refused.update(dict.fromkeys(run_ids, self._looked_at))

    def _forget_refused(self, since: datetime) -> None:
        """Forget refused runs that began before this time: if they have ended, no look finds them again.

        One that still goes on is tried again, for its cause may be mended.
        """
        self._refused = {run_id: at for run_id, at in self._refused.items() if at >= since}

    # Runs that are shown

    async def _adopt_shown(self) -> None:
        after: UUID | None = None
        while page := await self.store.list_observed(self.workflow_slugs, after=after, limit=_PAGE):
            after = page[-1]
            await _each([each for each in page if each not in self._live], self._adopt)

    async def _adopt(self, run_id: UUID) -> None:
        """Go on with a run that this process, or another one, has begun to show before."""
        try:
            run = await self.store.read_run(run_id)
        except UnknownRunError:
            return  # pgflow has deleted it
        if run.flow_run_id is None:
            return
        try:
            with ask_prefect(f"flow run {run.flow_run_id}"):
                flow_run = await self.client.read_flow_run(run.flow_run_id)
        except ObjectNotFound:
            if run.status is not Status.PENDING:
                await self._settle([run_id])  # a user has deleted it
            return
        if run.status is Status.PENDING and flow_run.state is not None and flow_run.state.is_final():
            await self._reopen(flow_run)
        await self._add(run_id, flow_run)

    async def _reopen(self, flow_run: FlowRun) -> None:
        """Show a run as running that goes on again. Airflow calls that a clear."""
        with ask_prefect(f"flow run {flow_run.id}"):
            await self.client.set_flow_run_state(flow_run.id, Running(message="reopened"), force=True)

    async def _add(self, run_id: UUID, flow_run: FlowRun) -> None:
        definition = await self.store.load_run_definition(run_id)
        graph = build_graph(definition)
        steps = ObservedSteps(StepEvents(flow_run, graph), self.recorder.find_shown_as(run_id, flow_run))
        self._live[run_id] = _LiveRun(run_id, flow_run, steps, definition.steps)

    async def _follow(self, live: _LiveRun) -> None:
        """Show what has happened in a run since the last look, and its end."""
        live.due_at = monotonic() + live.pauses.draw()  # also where this look fails
        try:
            now = await self.store.read_clock()
            run = await self.store.read_run(live.run_id)  # before its steps: of an ended run, they have ended
            found = await self.store.list_step_ends(live.run_id, live.slugs)
            tasks = await self._list_tasks(live.run_id, found)
        except UnknownRunError:
            del self._live[live.run_id]  # pgflow has deleted it
            return
        has_ended = run.status is not Status.PENDING
        try:
            await send_events(live.steps.make_events(found, tasks, now, has_ended=has_ended))
        except PgflowPrefectError:
            # What was not sent counts as told. Begin with this run anew: Prefect knows the ids of what was.
            del self._live[live.run_id]
            self._adoption_due_at = 0.0
            raise
        live.wait(found)
        if has_ended:
            await self._end(run, live)

    async def _list_tasks(self, run_id: UUID, found: Sequence[StepState]) -> list[tuple[TaskKey, StepState]]:
        most = self.settings.item_task_runs
        if any(each.tasks is not None and each.tasks <= most for each in found):
            return await self.store.list_map_tasks(run_id, at_most=most)
        return []

    async def _end(self, run: Run, live: _LiveRun) -> None:
        state: State[Any] = Completed() if run.status is Status.COMPLETED else Failed(message=run.error_message)
        if run.is_cancelled:
            state = Cancelled(message=run.error_message)
        try:
            with ask_prefect(f"flow run {live.flow_run.id}"):
                # By force, for a user may have cancelled it in Prefect, of which pgflow's workers know nothing.
                await self.client.set_flow_run_state(live.flow_run.id, state, force=True)
        except (ObjectNotFound, PrefectRefusedError) as error:
            _logger.warning("run %s: its end is not shown: %s", run.id, error)
        if run.id in await self._settle([run.id]):  # otherwise another observer concludes it
            await self.recorder.conclude(_to_ended(run), live.flow_run, live.latest)
        del self._live[run.id]

    async def _settle(self, run_ids: Collection[UUID]) -> frozenset[UUID]:
        """Note that Prefect shows the ends of runs, unless a process of ours has taken them."""
        if not run_ids:
            return frozenset()
        epoch = EPOCH if self.store.implementation.executes else 0
        return await self.store.settle_unshown([(run_id, epoch) for run_id in run_ids])

    async def _forget_deleted(self) -> None:
        if self.store.implementation.executes:
            return  # our rows of a run go with it
        after: UUID | None = None
        while (after := await self.store.forget_deleted_runs(after=after, limit=_PAGE * 10)) is not None:
            pass


async def _each(items: Sequence[Any], act: Any) -> None:  # noqa: ANN401  an item and its action
    """Act on each item, some at the same time. An error that concerns one item keeps no other one waiting.

    Raises:
        PrefectUnavailableError: Prefect does not answer. The items that were not begun are left alone.
        DatabaseUnavailableError: likewise, of PostgreSQL.
    """
    lanes = anyio.Semaphore(_LANES)
    failures: list[PgflowPrefectError] = []

    async def act_on(item: Any) -> None:  # noqa: ANN401
        async with lanes:
            if failures:
                return
            try:
                await act(item)
            except (PrefectUnavailableError, DatabaseUnavailableError) as error:
                failures.append(error)
            except PgflowPrefectError as error:
                _logger.warning("a run is shown later: %s", error)

    async with anyio.create_task_group() as group:
        for item in items:
            group.start_soon(act_on, item)
    if failures:
        raise failures[0]


def _to_ended(run: Run) -> UnrecordedRun:
    began_at = run.created_at
    assert began_at is not None
    fields = {**dict(run), "taken_at": began_at, "definition_id": None, "step_count": run.steps}
    return UnrecordedRun.model_validate(fields)
