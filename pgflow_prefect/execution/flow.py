"""One run of a workflow as one run of a Prefect flow."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID, uuid5

from prefect import get_run_logger
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.states import Crashed
from pydantic import JsonValue
from pydantic_core import to_json

from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.errors import (
    DatabaseUnavailableError,
    InvalidDefinitionError,
    RunFailedError,
    RunNotPendingError,
    SupersededError,
    UsageError,
)
from pgflow_prefect.execution.mirror import Mirror, persist
from pgflow_prefect.execution.prefect_engine import find_task_run_id, run_step_task
from pgflow_prefect.execution.scheduler import run_in_order
from pgflow_prefect.execution.step import Observer, Step, superseded
from pgflow_prefect.graph import build_graph, find_leaves, find_problems
from pgflow_prefect.handlers.base import Handler
from pgflow_prefect.models import Status
from pgflow_prefect.settings import Settings

T = TypeVar("T")

_RUN_NAMESPACE = UUID("7f0c6d1e-27e0-5e0f-9f2f-6a3b5f2f6f55")


def find_run_id(flow_run_id: UUID) -> UUID:
    """Return the id of the run that a flow run creates: after a crash in between, the same one again."""
    return uuid5(_RUN_NAMESPACE, str(flow_run_id))


@dataclass(frozen=True)
class Execution:
    """What it takes to execute runs of one workflow.

    Attributes:
        workflow_slug: the workflow.
        handlers: what does the work, by step slug.
        settings: where the database is, and the limits.
        observe: hears of every state that a step enters.
    """

    workflow_slug: str
    handlers: Mapping[str, Handler]
    settings: Settings
    observe: Observer

    async def execute(self, payload: JsonValue, run_id: UUID | None) -> dict[str, JsonValue] | State[Any]:
        """Execute a run in the current flow run: a new one with this payload, or the one of this id.

        Returns:
            The results of the leaf steps by slug, or the state in which the flow run ends instead.

        Raises:
            RunFailedError: the run has failed.
            UsageError: there is no such workflow or run, or nothing that could be run.
        """
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        flow_run = context.flow_run
        new = run_id is None
        run_id = run_id or find_run_id(flow_run.id)
        get_run_logger().info("Run %s of workflow %r", run_id, self.workflow_slug)
        try:
            async with open_store(self.settings) as store:
                if new:
                    text = to_json(payload).decode()
                    await self._persist(store, lambda: store.create_run(self.workflow_slug, text, run_id))
                epoch = await self._persist(store, lambda: self._take(store, run_id, flow_run))
                if epoch is not None:
                    await self._run_steps(Mirror(store, run_id, epoch, self.settings.report_timeout), flow_run.id)
                return await self._persist(store, lambda: self._conclude(store, run_id, epoch))
        except SupersededError:
            return superseded(run_id)
        except DatabaseUnavailableError as error:
            # The run stays pending in PostgreSQL, for whoever takes it next: as if this process had died.
            return Crashed(message=str(error))

    async def _persist(self, store: Store, statement: Callable[[], Awaitable[T]]) -> T:
        return await persist(store, self.settings.report_timeout, statement, f"workflow {self.workflow_slug}")

    async def _take(self, store: Store, run_id: UUID, flow_run: FlowRun) -> int | None:
        """Become the run's owner and return the new epoch; None where the run has ended."""
        run = await store.read_run(run_id)
        if run.workflow_slug != self.workflow_slug:
            raise UsageError(f"run {run_id} is one of workflow {run.workflow_slug!r}, not {self.workflow_slug!r}")
        if run.status is Status.FAILED and flow_run.run_count > 1:  # Prefect tries the flow run again
            await store.reopen_run(run_id)
        elif run.status is not Status.PENDING:
            return None
        try:
            return await store.take_run(run_id, flow_run.id)
        except RunNotPendingError:  # it ended a moment ago
            return None

    async def _run_steps(self, mirror: Mirror, flow_run_id: UUID) -> None:
        """Execute what is left of the run; a run that these handlers do not fit fails, and says why."""
        store, run_id = mirror.store, mirror.run_id
        definition = await self._persist(store, lambda: store.load_run_definition(run_id))
        arguments = {slug: handler.arguments for slug, handler in self.handlers.items()}
        if problems := find_problems(definition, arguments):
            reason = str(InvalidDefinitionError(self.workflow_slug, problems))
            await self._persist(store, lambda: store.cancel_run(run_id, reason))
            return
        graph = build_graph(definition)

        async def perform(slug: str) -> bool:
            step = Step(
                handler=self.handlers[slug],
                workflow_slug=self.workflow_slug,
                upstream=tuple(graph.predecessors(slug)),
                task_run_id=find_task_run_id(flow_run_id, slug),
                mirror=mirror,
                result_limit=self.settings.result_limit,
                observe=self.observe,
            )
            state = await run_step_task(step.make_task(), flow_run_id, slug, step.upstream)
            self.observe(slug, state.name or state.type.value)
            return state.is_completed()

        await run_in_order(graph, perform, concurrency=self.settings.concurrency)

    async def _conclude(self, store: Store, run_id: UUID, epoch: int | None) -> dict[str, JsonValue] | State[Any]:
        """Return what the flow run ends with: what PostgreSQL says of the run, whatever was seen here.

        Raises:
            RunFailedError: the run has failed.
        """
        run = await store.read_run(run_id)
        if epoch is not None and run.epoch != epoch:
            return superseded(run_id)
        if run.status is Status.COMPLETED:
            leaves = find_leaves(build_graph(await store.load_run_definition(run_id)))
            return await store.read_results(run_id, leaves)
        if run.status is Status.FAILED:
            # Raised, and not returned as a state: of that, Prefect would not try a flow with `retries` again.
            raise RunFailedError(run_id, run.error_message or "no reason given")
        return Crashed(message=f"run {run_id} is still pending: a step of it could not be claimed or reported")
