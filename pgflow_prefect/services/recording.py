"""Shows runs in Prefect that were executed without it, from their rows.

It creates a flow run in the last state of its run, with an idempotency key of run and epoch. So a process
that dies on the way leaves nothing half-shown, and two processes that show the same run show it once.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote
from uuid import UUID

import anyio
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.events import Event
from prefect.states import Running

from pgflow_prefect.database.recording import RecordLink, UnrecordedRun, UnrecordedStep
from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.graph import Graph, build_graph, sort_steps
from pgflow_prefect.deployment.deployments.find import find_flows
from pgflow_prefect.errors import (
    DeploymentGoneError,
    PgflowPrefectError,
    PrefectRefusedError,
)
from pgflow_prefect.execution.reporting.artifacts import RunArtifacts
from pgflow_prefect.execution.reporting.display import LONG
from pgflow_prefect.execution.reporting.events import RunEvents
from pgflow_prefect.execution.reporting.held_logs import HeldLines, send_lines
from pgflow_prefect.execution.reporting.recorded import RecordedSteps, make_final_state
from pgflow_prefect.models import Status, TakenRun, TaskKey
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.errors import unavailable
from pgflow_prefect.prefect_api.event_sender import find_outbox
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from pgflow_prefect.prefect_api.ids import find_task_run_id
from pgflow_prefect.prefect_api.ownership import find_foreign_tags
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.services.heartbeat import Heartbeat
from pgflow_prefect.services.submission import create_submission
from pgflow_prefect.settings import Artifacts, Settings
from pgflow_prefect.workflow import to_flow_name

MOST_RUNS, MOST_STEPS = 50, 2_000
"""The most runs, and the most of their steps, that are shown together. A larger run comes with all its steps."""

_MOST_EVENTS = 2_000
"""The most events that wait when the next runs are shown."""

_STRIDE = 500  # events between two looks for room
_PATIENCE = 60.0  # seconds without room for more events; then Prefect counts as away
_LOOK = 0.05  # seconds between two looks for room
_LANES = 8  # the most artifacts that are made at the same time
_MOST_GRAPHS = 100

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recorded:
    """The result of showing some runs.

    Attributes:
        shown: the runs that Prefect shows now, and did not before.
        refused: the reasons why runs can't be shown, by id: Prefect refuses a run, or its workflow has no deployment.
        without_deployment: the workflows without a deployment.
    """

    shown: frozenset[UUID]
    refused: Mapping[UUID, PgflowPrefectError]
    without_deployment: frozenset[str]


@dataclass
class RunRecorder:
    """Shows ended runs of some workflows in Prefect.

    Attributes:
        store: the database.
        client: Prefect's API.
        writer: creates flow runs, and writes their states.
        installation: the database's id.
        settings: say which events and artifacts to send.
        find_deployment: returns the deployment of a workflow; None if there is none.
    """

    store: Store
    client: PrefectClient
    writer: FlowRunWriter
    installation: UUID
    settings: Settings
    find_deployment: Callable[[str], UUID | None]
    _graphs: OrderedDict[int, Graph] = field(default_factory=OrderedDict, init=False)  # by definition

    async def record(self, run_ids: Sequence[UUID], lines: Mapping[UUID, HeldLines] | None = None) -> Recorded:
        """Show these runs, without those that go on or that Prefect shows already.

        Args:
            run_ids: the runs.
            lines: the log lines that were kept, by run.

        Raises:
            PrefectUnavailableError: Prefect does not answer; some of the runs may be shown.
            DatabaseUnavailableError: PostgreSQL does not answer.
        """
        order = {run_id: place for place, run_id in enumerate(run_ids)}
        found = [each for each in await self.store.read_unrecorded(run_ids) if each.status is not Status.PENDING]
        found.sort(key=lambda run: order[run.id])
        shown: set[UUID] = set()
        refused: dict[UUID, PgflowPrefectError] = {}
        for runs in _split(found):
            answers = await asyncio.gather(*map(self._create, runs), return_exceptions=True)
            created = [(run, each) for run, each in zip(runs, answers, strict=True) if isinstance(each, FlowRun)]
            if created:
                shown |= await self._show(created, lines or {})
            for run, answer in zip(runs, answers, strict=True):
                if isinstance(answer, PrefectRefusedError | DeploymentGoneError):
                    refused[run.id] = answer
                elif isinstance(answer, BaseException):
                    raise answer
        gone = {run.workflow_slug for run in found if isinstance(refused.get(run.id), DeploymentGoneError)}
        return Recorded(frozenset(shown), refused, frozenset(gone))

    async def show_begun(self, run: TakenRun) -> FlowRun:
        """Create the flow run of a run that goes on unshown, in the state Running; see `create_submission`."""
        return await self._submit(run, Running())

    async def show_steps(self, run_id: UUID, flow_run: FlowRun, find_shown: Callable[[], frozenset[UUID]]) -> None:
        """Show the steps that ended before their run was shown, while it goes on.

        Args:
            run_id: the run.
            flow_run: shows it.
            find_shown: returns the task runs that the executing process itself shows.
        """
        steps = [each for each in await self.store.list_unrecorded_steps([run_id]) if each.status is not Status.PENDING]
        graph = build_graph(await self.store.load_run_definition(run_id))
        await send_events(RecordedSteps(flow_run, graph, tuple(steps)).make_events(find_shown()))

    # Ended runs

    async def _create(self, run: UnrecordedRun) -> FlowRun:
        taken = TakenRun(run_id=run.id, workflow_slug=run.workflow_slug, epoch=run.epoch, former_flow_run_id=None)
        state = make_final_state(run)
        flow_run = await self._submit(taken, state)
        if flow_run.state is None or not flow_run.state.is_final():
            # A process created it while it executed the run, and could not write that to PostgreSQL.
            with ask_prefect(f"flow run {flow_run.id}"):
                await self.client.set_flow_run_state(flow_run.id, make_final_state(run), force=True)
        return flow_run

    async def _submit(self, run: TakenRun, state: State[Any]) -> FlowRun:
        return await create_submission(
            self.writer,
            self.client,
            self._require_deployment(run.workflow_slug),
            run,
            state,
            installation=self.installation,
        )

    def _require_deployment(self, workflow_slug: str) -> UUID:
        deployment_id = self.find_deployment(workflow_slug)
        if deployment_id is None:
            raise DeploymentGoneError(
                f"workflow {workflow_slug!r} has no deployment of this database in Prefect, which its flow runs belong "
                f"to: `pgflow-prefect worker` or `pgflow-prefect deploy {workflow_slug}` creates it"
            )
        return deployment_id

    async def _show(
        self, created: Sequence[tuple[UnrecordedRun, FlowRun]], lines: Mapping[UUID, HeldLines]
    ) -> frozenset[UUID]:
        steps = await self._list_steps([run.id for run, _ in created])
        for run, flow_run in created:
            await self._show_steps(run, flow_run, steps[run.id])
        await self._send_lines(created, lines)
        links = [RecordLink(run.id, run.epoch, flow_run.id) for run, flow_run in created]
        linked = await self.store.link_recorded_runs(links)
        # Only the process that has linked the run makes these. Otherwise two processes could make them twice.
        ours = [(run, flow_run) for run, flow_run in created if run.id in linked]
        for run, flow_run in ours:
            self._tell(run, flow_run)
        await self._make_artifacts(ours, steps)
        return linked

    async def _list_steps(self, run_ids: Sequence[UUID]) -> dict[UUID, list[UnrecordedStep]]:
        steps: dict[UUID, list[UnrecordedStep]] = {run_id: [] for run_id in run_ids}
        for step in await self.store.list_unrecorded_steps(run_ids):
            steps[step.run_id].append(step)
        return steps

    async def _show_steps(self, run: UnrecordedRun, flow_run: FlowRun, steps: Sequence[UnrecordedStep]) -> None:
        try:
            await send_events(RecordedSteps(flow_run, await self._read_graph(run), tuple(steps)).make_events())
        except (ValueError, LookupError) as error:  # rows that Prefect's models can't hold keep no other run waiting
            _logger.warning("run %s: its steps are not shown: %s", run.id, describe_error(error))

    async def _read_graph(self, run: UnrecordedRun) -> Graph:
        if run.definition_id is None:
            return build_graph(await self.store.load_run_definition(run.id))
        if run.definition_id not in self._graphs:
            self._graphs[run.definition_id] = build_graph(await self.store.load_run_definition(run.id))
        self._graphs.move_to_end(run.definition_id)
        while len(self._graphs) > _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return self._graphs[run.definition_id]

    async def _send_lines(
        self, created: Sequence[tuple[UnrecordedRun, FlowRun]], lines: Mapping[UUID, HeldLines]
    ) -> None:
        found = [line for run, flow_run in created if run.id in lines for line in lines[run.id].release(flow_run.id)]
        try:
            await send_lines(self.client, found)
        except PgflowPrefectError as error:
            _logger.warning("%d log lines of %d runs are not shown: %s", len(found), len(created), error)

    def _tell(self, run: UnrecordedRun, flow_run: FlowRun) -> None:
        def find(step_slug: str) -> UUID:
            return find_task_run_id(flow_run.id, TaskKey(step_slug))

        events = RunEvents(run.id, run.workflow_slug, flow_run, find, self.settings.events, find_outbox())
        message = run.error_message if run.status is Status.FAILED and not run.is_cancelled else None
        events.tell_of_run((run.ended_as or run.status).capitalize(), run.finished_at, message)

    async def _make_artifacts(
        self,
        shown: Sequence[tuple[UnrecordedRun, FlowRun]],
        steps: Mapping[UUID, Sequence[UnrecordedStep]],
    ) -> None:
        lanes = asyncio.Semaphore(_LANES)

        async def make(run: UnrecordedRun, flow_run: FlowRun) -> None:
            async with lanes:
                await self._make_artifacts_of(run, flow_run, steps[run.id])

        await asyncio.gather(*(make(*each) for each in shown if self._is_worth_artifacts(each[0])))

    def _is_worth_artifacts(self, run: UnrecordedRun) -> bool:
        if self.settings.artifacts is not Artifacts.NOTABLE:
            return self.settings.artifacts is Artifacts.ALL
        took = (run.finished_at - run.taken_at).total_seconds() if run.finished_at is not None else 0.0
        return run.status is not Status.COMPLETED or took >= LONG

    async def _make_artifacts_of(self, run: UnrecordedRun, flow_run: FlowRun, steps: Sequence[UnrecordedStep]) -> None:
        artifacts = RunArtifacts(flow_run, run.id, run.workflow_slug)
        url = self.settings.run_url
        if url is not None:
            url = url.format(run_id=run.id, workflow=quote(run.workflow_slug, safe=""))
        try:
            order = sort_steps(await self._read_graph(run))
            with ask_prefect(f"the artifacts of run {run.id}"):
                await artifacts.link(self.client, url)
                await artifacts.tabulate(self.client, order, {each.step_slug: each for each in steps})
        except Exception as error:  # noqa: BLE001  an error here is only an error of display
            _logger.warning("run %s: its artifacts are not shown: %s", run.id, describe_error(error))


async def open_recorder(settings: Settings, store: Store, client: PrefectClient) -> RunRecorder:
    """Return a recorder of runs of all workflows that have a deployment of this database.

    Raises:
        ForeignInstallationError: the database is a copy of one that is in use.
        PrefectUnavailableError: Prefect does not answer.
    """
    installation = await Heartbeat(store, client).register()
    names = {to_flow_name(slug): slug for slug in await store.list_slugs()}
    deployments = {
        names[name]: each.id
        for name, each in (await find_flows(client, names)).own.items()
        if not find_foreign_tags(each.tags, installation.id)
    }
    return RunRecorder(store, client, FlowRunWriter(client), installation.id, settings, deployments.get)


async def send_events(events: Iterable[Event]) -> None:
    """Send events as fast as Prefect's server takes them, so that none is dropped, of however large a run."""
    outbox = find_outbox()
    for number, event in enumerate(events):
        if number % _STRIDE == 0:
            await _await_room()
        outbox.send(partial(_give, event))


def _give(event: Event) -> Event:
    return event


async def _await_room() -> None:
    """Wait until few events wait to be sent.

    Raises:
        PrefectUnavailableError: it takes too long.
    """
    outbox = find_outbox()
    with anyio.move_on_after(_PATIENCE) as scope:
        while outbox.waiting > _MOST_EVENTS:  # noqa: ASYNC110  its thread can only be asked
            await anyio.sleep(_LOOK)
    if scope.cancelled_caught:
        raise unavailable(f"its server has taken no events for {_PATIENCE:g} s")


def _split(runs: Iterable[UnrecordedRun]) -> Iterator[list[UnrecordedRun]]:
    """Yield runs in portions that don't have too many steps."""
    some: list[UnrecordedRun] = []
    steps = 0
    for run in runs:
        count = run.step_count or 0
        if some and (len(some) >= MOST_RUNS or steps + count > MOST_STEPS):
            yield some
            some, steps = [], 0
        some.append(run)
        steps += count
    if some:
        yield some
