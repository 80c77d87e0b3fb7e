"""Executes a run without telling Prefect, until it is shown.

An unshown run has a flow run that only this process knows. Its id is a placeholder. Events and requests are dropped,
log lines are held back, and a state needs no answer of a server. `UnshownFlowRun.show` replaces the placeholder by
Prefect's flow run while the run goes on. After that, everything goes to Prefect.
"""

from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar, cast
from uuid import UUID

import anyio
from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.states import Completed, Failed, Running
from prefect.types import DateTime

from pgflow_prefect.execution.reporting.heartbeat import start_heartbeat
from pgflow_prefect.execution.reporting.held_logs import HELD
from pgflow_prefect.execution.reporting.task_runs import TaskRuns
from pgflow_prefect.prefect_api.event_sender import EventSender, HeldEvent, Make, Related, Request, find_outbox
from pgflow_prefect.prefect_api.flow_run_names import name_flow_run
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from pgflow_prefect.prefect_api.ids import make_placeholder
from pgflow_prefect.prefect_api.internals import (
    ConcurrencyContext,
    ResultStore,
    exception_to_crashed_state,
    exception_to_failed_state,
    flow_run_logger,
    patch_print,
    should_log_prints,
)
from pgflow_prefect.prefect_api.ownership import make_ownership_tag
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.state_names import StateName

T = TypeVar("T")

AnyFlow = Flow[..., Any]


class UnshownSender:
    """Sends nothing, until `show`; then it sends as `EventSender` does."""

    def __init__(self) -> None:
        self._outbox: EventSender | None = None

    @property
    def is_shown(self) -> bool:
        """Whether Prefect is told of the run."""
        return self._outbox is not None

    def show(self) -> None:
        """Send from now on."""
        self._outbox = find_outbox()

    def send(self, make: Make, related: Related | None = None) -> None:
        """Send an event, if the run is shown."""
        if self._outbox is not None:
            self._outbox.send(make, related)

    def hold(self, make: Make, related: Related | None = None) -> HeldEvent:
        """Send an event, if the run is shown, unless it is taken soon."""
        return HeldEvent(make, related) if self._outbox is None else self._outbox.hold(make, related)

    def request(self, act: Request, what: str) -> None:
        """Make a request to Prefect's API, if the run is shown."""
        if self._outbox is not None:
            self._outbox.request(act, what)

    def look_up(self, find: Callable[[PrefectClient], Awaitable[T]], otherwise: T) -> "Future[T]":
        """Ask Prefect's API if the run is shown; otherwise return the given answer at once."""
        if self._outbox is not None:
            return self._outbox.look_up(find, otherwise)
        found: Future[T] = Future()
        found.set_result(otherwise)
        return found

    def give_way(self) -> None:
        """Let the server answer, if the run is shown."""
        if self._outbox is not None:
            self._outbox.give_way()


class UnshownFlowRun:
    """Executes one run in this process.

    Attributes:
        flow_run: the handlers' task runs belong to it; its id is a placeholder until the run is shown.
        sender: sends events and requests once the run is shown.
        lines: the log lines that are held back.
    """

    def __init__(
        self, flow: AnyFlow, workflow_slug: str, run_id: UUID, epoch: int, *, installation: UUID, client: PrefectClient
    ) -> None:
        """Prepare to execute a run that this process has reserved.

        Args:
            flow: the workflow's flow, an async one.
            workflow_slug: the workflow.
            run_id: the run.
            epoch: in which it was reserved.
            installation: the database's id.
            client: Prefect's API, for the context of handlers.
        """
        placeholder = make_placeholder(run_id, epoch)
        self._flow = flow
        self._client = client
        self._placeholder = placeholder
        self._writer: FlowRunWriter | None = None
        self._resources = ExitStack()
        self.sender = UnshownSender()
        self._task_runs: TaskRuns | None = None
        self._has_begun = anyio.Event()
        self.lines = HELD.begin(placeholder)
        self.flow_run = FlowRun(
            id=placeholder,
            flow_id=placeholder,
            name=name_flow_run(workflow_slug, run_id),
            parameters={"run_id": str(run_id)},
            tags=[make_ownership_tag(installation)],
            run_count=1,
            start_time=cast("DateTime", datetime.now(UTC)),
            state=Running(),
            labels={},
        )
        self._logger = flow_run_logger(flow_run=self.flow_run, flow=flow)

    @property
    def placeholder(self) -> UUID:
        """The id in PostgreSQL in place of a flow run's id."""
        return self._placeholder

    @property
    def is_shown(self) -> bool:
        """Whether Prefect is told of the run."""
        return self.sender.is_shown

    def begin(self, task_runs: TaskRuns) -> None:
        """Note that the run's steps begin now, as these task runs."""
        self._task_runs = task_runs
        self._has_begun.set()

    async def wait_until_begun(self) -> None:
        """Wait until the run's steps begin. After that, it can be shown."""
        await self._has_begun.wait()

    def find_shown_task_runs(self) -> frozenset[UUID]:
        """Return the task runs that this process shows."""
        return frozenset() if self._task_runs is None else self._task_runs.shown

    def show(self, flow_run: FlowRun, writer: FlowRunWriter) -> None:
        """Show the run as this flow run of Prefect from now on.

        Args:
            flow_run: it is Running.
            writer: writes its states.
        """
        self._writer = writer
        for name in ("id", "flow_id", "deployment_id", "name", "tags", "labels"):
            setattr(self.flow_run, name, getattr(flow_run, name))
        self.lines.flow_run_id = flow_run.id
        self.sender.show()
        if self._task_runs is not None:
            self._task_runs.begin_to_show()
        self._resources.callback(start_heartbeat(self._flow, self.flow_run))

    async def execute(self) -> State[Any]:
        """Execute the run and return its final state, which is written if the run is shown.

        Raises:
            PrefectSignal: the run is shown, and Prefect's server wants the flow run to be left alone.
            PrefectUnavailableError: the run is shown, and Prefect does not answer in time.
        """
        with self._resources:
            try:
                with self._enter_context():
                    state = await self._perform()
                state = await self._enter(state)
            except BaseException as error:
                if self.is_shown and not isinstance(error, Exception):
                    with anyio.CancelScope(shield=True):
                        await self._crash(error)
                raise
            if not state.is_completed():
                self._logger.error("Finished in state %s", state)
            return state

    async def _crash(self, error: BaseException) -> None:
        """Show that the flow run crashed; an error of Prefect must not take the place of the cancellation."""
        try:
            await self._enter(await exception_to_crashed_state(error), force=True)
        except Exception as refusal:  # noqa: BLE001  reconciling shows the state later
            self._logger.warning("The state Crashed is not shown: %s", describe_error(refusal))

    async def _perform(self) -> State[Any]:
        seconds = self._flow.timeout_seconds
        try:
            with anyio.move_on_after(seconds) as scope:
                result = await self._flow.fn(**self.flow_run.parameters)
            if not scope.cancelled_caught:
                return result if isinstance(result, State) else Completed()
            message = f"Flow run exceeded timeout of {seconds} second(s)"
            self._logger.error("%s", message)
            return Failed(name=StateName.TIMED_OUT, data=TimeoutError(), message=message)
        except Exception as error:
            self._logger.exception("Encountered exception during execution: %r", error)  # noqa: TRY401  as Prefect has it
            return await exception_to_failed_state(error, message="Flow run encountered an exception:")

    async def _enter(self, state: State[Any], *, force: bool = False) -> State[Any]:
        if self._writer is None:
            return state
        return await self._writer.enter(self.flow_run.id, state, force=force)

    @contextmanager
    def _enter_context(self) -> Iterator[None]:
        with ExitStack() as stack:
            log_prints = should_log_prints(self._flow)
            if log_prints:
                stack.enter_context(patch_print())
            context = FlowRunContext(
                flow=self._flow,
                flow_run=self.flow_run,
                parameters=self.flow_run.parameters,
                client=self._client,
                log_prints=log_prints,
                task_runner=stack.enter_context(self._flow.task_runner.duplicate()),
                result_store=ResultStore(),  # no result is stored, so Prefect is not asked for its storage
                persist_result=False,
            )
            stack.enter_context(context)
            stack.enter_context(ConcurrencyContext())
            yield
