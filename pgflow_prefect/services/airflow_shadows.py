"""Compares handlers with tasks that Airflow executes, in a worker that has the handlers: one at a time."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import anyio
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.events import Event
from prefect.exceptions import ObjectNotFound

from pgflow_prefect.airflow.mirrored import EPOCH
from pgflow_prefect.database.mirror_statements import BegunShadow, DueShadow
from pgflow_prefect.database.step_transaction import Logger
from pgflow_prefect.definitions.graph import Graph, build_graph
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError
from pgflow_prefect.execution.process.host import Host
from pgflow_prefect.execution.reporting.recorded import StepEvents
from pgflow_prefect.execution.steps.observed_shadow import ObservedShadow
from pgflow_prefect.execution.steps.run_results import RunResults
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.models import TaskKey
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.ids import find_task_run_id, make_placeholder
from pgflow_prefect.prefect_api.internals import task_run_logger
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.services.recording import send_events
from pgflow_prefect.waiting import Pauses
from pgflow_prefect.wording import clean
from pgflow_prefect.workflow import Workflow

_MOST = 20  # shadows that a look finds; after these, it looks again at once
_LONGEST_PAUSE = 10.0  # in intervals
_TICK = timedelta(microseconds=1)

_logger = logging.getLogger(__name__)


@dataclass
class AirflowShadows:
    """Executes handlers beside tasks of Airflow, whose runs a mirror has written here.

    Attributes:
        host: this process.
        client: Prefect's API.
        workflows: the workflows whose handlers it has, by slug.
    """

    host: Host
    client: PrefectClient
    workflows: Mapping[str, Workflow]
    _handlers: dict[tuple[str, str], StepHandlers] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._handlers = {
            (slug, step): handlers
            for slug, workflow in self.workflows.items()
            for step, handlers in workflow.step_handlers.items()
            if handlers.function is not None and handlers.function.shadow and not handlers.function.is_map
        }

    async def run(self) -> None:
        """Look for tasks that Airflow has completed, and compare, until it is cancelled. What fails is tried later."""
        if not self._handlers or not self.host.store.implementation.executes:
            return
        interval = self.host.settings.airflow_poll_interval
        pauses = Pauses(interval, _LONGEST_PAUSE * interval)
        said: str | None = None
        while not self.host.draining.is_set():
            try:
                if await self.look():
                    pauses.reset()
                    continue
                said = None
            except PgflowPrefectError as error:
                if str(error) != said:
                    _logger.warning("Airflow's results are compared later: %s", error)
                said = str(error)
                if isinstance(error, DatabaseUnavailableError):
                    await self.host.store.drop_broken_connections()
            except Exception as error:  # no comparison may end a worker
                _logger.error("a comparison with Airflow is made later: %s", describe_error(error))  # noqa: TRY400
                _logger.debug("comparing with Airflow", exc_info=error)
            with anyio.move_on_after(pauses.draw()):
                await self.host.draining.wait()

    async def look(self) -> int:
        """Execute the handlers whose turn it is, and return how many shadows were due.

        Raises:
            PgflowPrefectError: the database does not answer, or refuses.
        """
        found = await self.host.store.list_airflow_shadows(self._handlers, limit=_MOST)
        for due in found:
            if self.host.draining.is_set():
                break
            await self._compare(due)
        return len(found)

    async def _compare(self, due: DueShadow) -> None:
        store, handlers = self.host.store, self._handlers[due.workflow_slug, due.step_slug]
        graph = build_graph(await store.load_run_definition(due.run_id))
        upstream = tuple(graph.predecessors(due.step_slug)) if due.step_slug in graph else ()
        begun = await store.begin_airflow_shadow(due.run_id, due.step_slug, handlers.choose_upstream(upstream))
        if begun is None:  # another worker has it
            return
        results = RunResults.of(self.host.installation.id, self.workflows[due.workflow_slug].step_handlers)
        shadow = ObservedShadow(
            self.host, self.client, handlers, due, begun, upstream, results, _make_logger(due, begun)
        )
        try:
            verdict = await shadow.compare()
        except BaseException:  # this process ends: another one may begin it
            with (
                anyio.CancelScope(shield=True),
                anyio.move_on_after(self.host.settings.report_timeout),
                suppress(PgflowPrefectError),
            ):
                await store.release_airflow_shadow(due.run_id, due.step_slug)
            raise
        _logger.info("run %s, step %r: %s", due.run_id, due.step_slug, verdict)
        await self._show(due, begun, graph, verdict)

    async def _show(self, due: DueShadow, begun: BegunShadow, graph: Graph, verdict: str) -> None:
        """Name the comparison in the state of the step's task run, with Airflow's times."""
        if begun.flow_run_id is None or begun.began_at is None or begun.ended_at is None:
            return
        try:
            with ask_prefect(f"flow run {begun.flow_run_id}"):
                flow_run = await self.client.read_flow_run(begun.flow_run_id)
            await send_events([_make_event(due, begun, graph, flow_run, verdict)])
        except (ObjectNotFound, PgflowPrefectError) as error:  # the report is stored
            _logger.info("run %s, step %r: Prefect does not show the comparison: %s", due.run_id, due.step_slug, error)


def _make_event(due: DueShadow, begun: BegunShadow, graph: Graph, flow_run: FlowRun, verdict: str) -> Event:
    assert begun.began_at is not None
    assert begun.ended_at is not None
    events, shown_as = StepEvents(flow_run, graph), make_placeholder(due.run_id, EPOCH)
    above = [find_task_run_id(shown_as, TaskKey(slug)) for slug in graph.predecessors(due.step_slug)]
    run = events.make_task_run(begun.task_run_id, due.step_slug, begun.attempt, above)
    before: State[Any] = State(type=StateType.RUNNING, timestamp=begun.began_at)
    events.enter(run, before, None)
    # After the state that was shown, so that the server takes it; its time is Airflow's but for that.
    ended_at = max(begun.ended_at, begun.began_at) + 3 * _TICK
    state: State[Any] = State(type=StateType.COMPLETED, timestamp=ended_at, message=f"completed in Airflow ({verdict})")
    event = events.enter(run, state, before)
    event.follows = None  # the server must not wait for another event
    return event


def _make_logger(due: DueShadow, begun: BegunShadow) -> Logger:
    """Return a logger whose lines show in Prefect under the step's task run, once Prefect shows the run."""
    if begun.flow_run_id is None:
        return _logger
    name = clean(due.step_slug)
    task_run = TaskRun(
        id=begun.task_run_id, flow_run_id=begun.flow_run_id, name=name, task_key=name, dynamic_key=str(due.run_id)
    )
    logger: Logger = task_run_logger(task_run, flow_name=due.workflow_slug, task_name=name)
    return logger
