"""The steps of one run, each executed here or by the flow run's task runner."""

from asyncio import get_running_loop, sleep
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from uuid import UUID

from anyio import move_on_after
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Crashed, Failed
from pydantic import SecretStr

from pgflow_prefect.bindings import Kind
from pgflow_prefect.database.connection import complete_dsn
from pgflow_prefect.definitions.graph import Graph
from pgflow_prefect.definitions.model import BEFORE_FAILURES
from pgflow_prefect.errors import TransientError, WriteRefusedError
from pgflow_prefect.execution.decisions import Decisions
from pgflow_prefect.execution.outcomes import StepOutcome, find_outcome, find_outcome_of_stop
from pgflow_prefect.execution.process.host import ActiveRun, Host, Stop
from pgflow_prefect.execution.remote import RemoteStep
from pgflow_prefect.execution.reporting.items import ShownItems
from pgflow_prefect.execution.reporting.past import Past
from pgflow_prefect.execution.reporting.task_runs import StepTaskRun, TaskRuns
from pgflow_prefect.execution.scheduler import Advance, Schedule
from pgflow_prefect.execution.step_writer import StepWriter
from pgflow_prefect.execution.steps.run_results import RunResults
from pgflow_prefect.execution.steps.step import ClaimAhead, Step
from pgflow_prefect.execution.steps.step_task import make_item_task, make_request
from pgflow_prefect.execution.task_runner import (
    AnyTaskRunner,
    StepNotSentError,
    Submission,
    TaskRunnerGoneError,
    submit,
)
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.models import ClaimRequest, Ending, MapState, Status, StepState, TaskKey
from pgflow_prefect.prefect_api.ids import TaskRunIds, find_task_run_id
from pgflow_prefect.prefect_api.states import handed_back, not_run, refused, skipped
from pgflow_prefect.state_names import IDLE, Observer, StateName
from pgflow_prefect.waiting import Backoff

_DRAIN_INTERVAL = 1.0  # seconds between two checks whether a submitted step of a drained run only waits


@dataclass
class RunExecutor:
    """Executes the steps of a run that is under way.

    Attributes:
        handlers: the handlers that may do the work, by step slug.
        workflow_slug: the run's workflow.
        schedule: decides which of its steps may start.
        host: the process.
        run: the run, which may be stopped.
        flow_run: the flow run that executes it.
        writer: writes for the run.
        observe: called with every state that a step enters.
        task_runs: the task runs of the flow run.
        task_run_ids: their ids.
        submitted: the steps that the task runner executes.
        task_runner: one of Prefect's; None if this event loop executes the steps.
        maps: the slugs of the steps that are maps.
        notice: called with what PostgreSQL says of a map, and its slug.
    """

    handlers: Mapping[str, StepHandlers]
    workflow_slug: str
    schedule: Schedule
    host: Host
    run: ActiveRun
    flow_run: FlowRun
    writer: StepWriter
    observe: Observer
    task_runs: TaskRuns
    task_run_ids: TaskRunIds
    submitted: frozenset[str]
    task_runner: AnyTaskRunner | None
    maps: Collection[str] = ()
    notice: Callable[[str, MapState], None] = lambda slug, state: None
    _requests: dict[str, ClaimRequest] = field(default_factory=dict, init=False)
    _claimed: dict[str, ClaimAhead] = field(default_factory=dict, init=False)
    _prepared: dict[str, tuple[Step, StepTaskRun]] = field(default_factory=dict, init=False)
    _past: Past = field(init=False)
    _results: RunResults = field(init=False)

    def __post_init__(self) -> None:
        self._past = Past(self.graph, self.flow_run.start_time)
        self._results = RunResults.of(self.host.installation.id, self.handlers)

    def follow_rules(self) -> None:
        """Let PostgreSQL decide which steps begin: the run has rules, or a step of it was skipped."""
        if self.schedule.decisions is None:
            self.schedule.follow(Decisions(self.graph, self.writer.list_step_ends, self._show_decided))

    def _show_decided(self, state: StepState) -> None:
        """Show a step that has ended without being executed here: its task run has one state."""
        shown = _make_state(state)
        _, task_run = self._prepare(state.step_slug)
        task_run.show(shown)
        self._show(state.step_slug, shown)

    async def perform(self, slug: str, advance: Advance) -> StepOutcome:
        """Execute a step, all its attempts, and return the outcome; steps that it makes ready may begin earlier."""
        if self.run.drained:
            return find_outcome_of_stop(self.run.stopped)
        if self.task_runner is not None and slug in self.submitted:
            with self.run.work():
                state = await self._perform_elsewhere(slug, self.task_runner)
                self._show(slug, state)
                return self._find_outcome(state)
            # The run was stopped here; PostgreSQL accepts no later report of the step.
            return find_outcome_of_stop(self.run.stopped)
        return await self._perform_here(slug, advance)

    @property
    def graph(self) -> Graph:
        """The run's steps."""
        return self.schedule.graph

    def _show(self, slug: str, state: State) -> None:
        if state.name == StateName.REFUSED:
            self.run.refuse(slug, str(state.message))
        self.observe(slug, state.name or state.type.value)

    def _find_edges(self, slug: str) -> list[UUID]:
        return [self.task_run_ids.find(upstream) for upstream in self.graph.predecessors(slug)]

    def _claim_next(self, slug: str) -> None:
        """Claim the steps that this completion makes ready in the same statement: one COMMIT, and one answer."""
        if self.run.drained:
            return
        for downstream in self.schedule.foresee(slug):
            if downstream in self.submitted or self._is_limited(downstream):  # it may have to wait for a slot
                continue
            request = self._requests.pop(downstream, None) or self._make_request(downstream)
            if (claimed := self.writer.claim_later(request)) is not None:
                self._claimed[downstream] = ClaimAhead(claimed, monotonic())
                # Do this after the statement is sent: until the answer comes, there is nothing else to do.
                get_running_loop().call_soon(self._prepare_next, downstream)

    def _is_limited(self, slug: str) -> bool:
        handlers = self.handlers.get(slug)
        return bool(self.task_runs.find_limits(handlers.task_options.tags if handlers is not None else ()))

    def _prepare_next(self, slug: str) -> None:
        self._prepared[slug] = self._prepare(slug)
        for downstream in self.graph.successors(slug):
            if downstream not in self._requests:
                self._requests[downstream] = self._make_request(downstream)

    def _make_request(self, slug: str) -> ClaimRequest:
        upstream = tuple(self.graph.predecessors(slug))
        return make_request(self._find_handlers(slug), upstream, self.task_run_ids.find(slug))

    def _prepare(self, slug: str) -> tuple[Step, StepTaskRun]:
        step = Step(
            handlers=self._find_handlers(slug),
            workflow_slug=self.workflow_slug,
            upstream=tuple(self.graph.predecessors(slug)),
            task_run_id=self.task_run_ids.find(slug),
            writer=self.writer,
            host=self.host,
            observe=self.observe,
            run=self.run,
            results=self._results,
            claim_next=self._claim_next,
            past=self._past,
            is_broken_off=self.schedule.is_broken_off,
            may_follow_failure=may_follow_failure(self.graph, slug),
            is_map=slug in self.maps,
        )
        if step.is_map:
            step.shown_items = self._show_items(step)
        task_run = self.task_runs.prepare(step.make_task(), step.task_run_id, self._find_edges(slug))
        step.logger, step.rename = task_run.logger, task_run.rename
        return step, task_run

    def _show_items(self, step: Step) -> ShownItems:
        """Return what shows the items of a map: each as a task run with the edges of the step, if they are few."""

        def prepare(index: int) -> StepTaskRun:
            # The first task of the step is the step's own.
            task_run_id = find_task_run_id(self.flow_run.id, TaskKey(step.slug, index + 1))
            task = make_item_task(step.handlers, index)
            return self.task_runs.prepare(task, task_run_id, self._find_edges(step.slug))

        return ShownItems(prepare, self.host.settings.item_task_runs, partial(self.notice, step.slug))

    def _find_handlers(self, slug: str) -> StepHandlers:
        return self.handlers.get(slug) or StepHandlers(slug)

    async def _perform_here(self, slug: str, advance: Advance) -> StepOutcome:
        async def conclude(state: State) -> None:
            self._show(slug, state)
            # They begin first: nothing waits for the rest of this one, except for its slot.
            if self._find_outcome(state).is_done and not task_run.limits and advance():
                await sleep(0)

        with self.run.task(slug):
            step, task_run = self._prepared.pop(slug) if slug in self._prepared else self._prepare(slug)
            step.claimed = self._claimed.pop(slug, None)
            # A step waits for a turn while it has a slot, never for a slot while it has a turn. An external
            # step keeps its slot, and gives its turn away.
            async with task_run.hold_slots(self.run.turns.pause(slug)):
                if self.run.drained or self.schedule.stopped:
                    return find_outcome_of_stop(self.run.stopped)
                return self._find_outcome(await task_run.perform(conclude))
        # It waited for an attempt, and the run must not go on here.
        return find_outcome_of_stop(self.run.stopped)

    def _find_outcome(self, state: State) -> StepOutcome:
        outcome = find_outcome(state)
        if outcome is StepOutcome.SKIPPED:
            self.follow_rules()
        return outcome

    async def _perform_elsewhere(self, slug: str, task_runner: AnyTaskRunner) -> State:
        step = RemoteStep(
            handlers=self.handlers[slug],
            workflow_slug=self.workflow_slug,
            upstream=tuple(self.graph.predecessors(slug)),
            run_id=self.run.run_id,
            epoch=self.run.epoch,
            results=self._results.pick((slug, *self.graph.predecessors(slug))),
            token=self.host.token,
            dsn=SecretStr(complete_dsn(self.host.dsn)),
            settings=self.host.settings,
            may_follow_failure=may_follow_failure(self.graph, slug),
            is_map=slug in self.maps,
        )
        backoff = Backoff(self.writer.patience, f"run {self.run.run_id}, step {slug!r}")
        while True:
            try:
                submission = await submit(task_runner, step, self._find_edges(slug))
                self.task_run_ids.replace(slug, submission.task_run_id)
                self.observe(slug, StateName.RUNNING)
                return await self._await_submission(slug, submission)
            except StepNotSentError as error:
                return await self._fail(slug, str(error))
            except TaskRunnerGoneError as error:
                if self.run.drained or not await backoff.pause(error):
                    return Crashed(message=str(error))

    async def _await_submission(self, slug: str, submission: Submission) -> State:
        """Return how a submitted step ended. Once the run is drained, leave a step that only waits to the next owner.

        PostgreSQL accepts no report of it after that.
        """
        with self.run.wait():
            return await submission.wait()
        while not await self._only_waits(slug):
            with move_on_after(_DRAIN_INTERVAL):
                return await submission.wait()
        return handed_back(f"run {self.run.run_id} was handed back: {self.run.stopped or Stop.SHUTDOWN}")

    async def _only_waits(self, slug: str) -> bool:
        ends = await self.host.store.list_step_ends(self.run.run_id, [slug])
        return any(each.task_state in IDLE for each in ends)

    async def _fail(self, slug: str, message: str) -> State:
        try:
            report = await self.writer.fail(
                TaskKey(slug),
                message,
                state_name=StateName.FAILED,
                task_run_id=self.task_run_ids.find(slug),
                attempt=None,
            )
        except TransientError as error:
            return Crashed(message=str(error))
        except WriteRefusedError as error:
            return refused(f"PostgreSQL refuses to note step {slug!r}: {error}")
        if report.status is Status.COMPLETED and report.skip_reason is not None:
            return skipped(report.skip_message)
        return Failed(message=message)


def may_follow_failure(graph: Graph, slug: str) -> bool:
    """Tell whether a step may run after a failure."""
    return graph.nodes[slug].get("rule") not in BEFORE_FAILURES


async def find_submitted(host: Host, workflow_slug: str, handlers: Mapping[str, StepHandlers]) -> frozenset[str]:
    """Return the steps that a task runner executes: those in Python.

    This process only waits for SQL functions, endpoints and queues. If a row binds a step to another kind during the
    run, that kind counts wherever the step is executed.
    """
    bound = {slug: Kind(each.kind) for slug, each in (await host.store.list_bindings(workflow_slug)).items()}
    return frozenset(
        slug
        for slug, known in handlers.items()
        if known.function is not None and bound.get(slug, known.bound.kind) == Kind.PYTHON
    )


def _make_state(state: StepState) -> State:
    if state.is_skipped:
        return skipped(state.skip_message)
    if state.is_not_run:
        return not_run(state.skip_message)
    if state.ended_as is Ending.CANCELLED:
        return Cancelled(message=state.error_message)
    return Failed(message=state.error_message)
