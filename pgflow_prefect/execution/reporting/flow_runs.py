"""The one place that does what Prefect's flow engine does: a flow run that this process has created in Running.

For a small flow run, Prefect's own engine asks the server six times, once of them with another client in a thread, and
logs three lines. PostgreSQL says who executes a run. What is left to do is to be the flow run that handlers find in
their context, to write its end, and to try again where the server says so. The server itself tells automations of the
states that a flow run enters.

What differs from Prefect's engine: such a flow run was never Pending, has no `flow_version` and no OpenTelemetry span
of its own, and has no log lines of its own where all went well. Flow runs that Prefect schedules are executed by its
engine: their slots of concurrency limits hang on the way from Pending to Running.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from time import monotonic
from typing import Any, cast

import anyio
import prefect
from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.events import Event, RelatedResource, Resource
from prefect.exceptions import PrefectSignal
from prefect.settings import get_current_settings
from prefect.states import Failed, Running
from prefect.types import DateTime

from pgflow_prefect.errors import PgflowPrefectError, PrefectUnavailableError
from pgflow_prefect.execution.flow_hooks import Hook, contain_hook, find_hook_name
from pgflow_prefect.execution.flow_options import make_flow_run_name
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.event_sender import find_outbox
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from pgflow_prefect.prefect_api.internals import (
    ConcurrencyContext,
    ResultStore,
    exception_to_crashed_state,
    exception_to_failed_state,
    flow_run_logger,
    get_call_parameters,
    patch_print,
    resolve_futures_to_states,
    return_value_to_state,
    should_log_prints,
    should_persist_result,
)
from pgflow_prefect.state_names import StateName

AnyFlow = Flow[..., Any]

_logger = logging.getLogger(__name__)

_LIFETIME = 60.0  # seconds after which it asks again where results are stored

_SHORTEST_HEARTBEAT = 30.0  # seconds, as Prefect has it


class FlowRunEngine:
    """Executes flow runs of one flow in this process, each once it is Running."""

    def __init__(self, flow: AnyFlow, writer: FlowRunWriter, client: PrefectClient) -> None:
        """Prepare for flow runs of a flow.

        Args:
            flow: an async one.
            writer: writes the states of all flow runs of this process.
            client: Prefect's API.
        """
        self.flow = flow
        self.writer = writer
        self.client = client
        self._results: ResultStore | None = None
        self._results_until = 0.0
        self._asking = anyio.Lock()

    async def execute(self, flow_run: FlowRun) -> State[Any]:
        """Execute a flow run and return its final state, whatever it is.

        Raises:
            PrefectSignal: Prefect's server wants the flow run to be left alone.
            PrefectUnavailableError: Prefect does not answer in time.
            PrefectHTTPStatusError: it did not take a state.
        """
        return await _LiveFlowRun(self, flow_run, await self._open_results()).perform()

    async def _open_results(self) -> ResultStore:
        """Return where the results of a flow run go, if any are persisted; the server says so once in a while."""
        async with self._asking:
            if self._results is None or monotonic() > self._results_until:
                self._results = await self._ask_for_results()
                self._results_until = monotonic() + _LIFETIME
        # Each flow run has a cache of its own: results of others are nothing that it may find.
        return ResultStore(
            result_storage=self._results.result_storage,
            metadata_storage=self._results.metadata_storage,
            serializer=self._results.serializer,
            cache_result_in_memory=self._results.cache_result_in_memory,
        )

    async def _ask_for_results(self) -> ResultStore:
        try:
            with ask_prefect("where results are stored"):
                return await ResultStore().aupdate_for_flow(self.flow)
        except PrefectUnavailableError as error:
            if self._results is None:
                raise
            _logger.warning("results are stored where they were before: %s", error)
            return self._results


class _LiveFlowRun:
    """One flow run, from Running to its end."""

    def __init__(self, engine: FlowRunEngine, flow_run: FlowRun, results: ResultStore) -> None:
        self._flow = engine.flow
        self._writer = engine.writer
        self._client = engine.client
        self._flow_run = flow_run
        self._results = results
        self._logger = flow_run_logger(flow_run=flow_run, flow=engine.flow)

    async def perform(self) -> State[Any]:
        stop_heartbeat = _start_heartbeat(self._flow, self._flow_run)
        try:
            if self._flow.flow_run_name:
                await self._name()
            await self._call_hooks(self._flow.on_running_hooks)
            while self._state.is_running():
                with self._enter_context():
                    await self._attempt()
        except PrefectSignal as signal:
            if (state := getattr(signal, "state", None)) is not None:
                self._note(state)
            raise
        except Exception:
            raise  # Prefect did not take a state: what the run has come to, PostgreSQL says
        except BaseException as error:
            if not self._state.is_final():
                await self._crash(error)
            raise
        finally:
            stop_heartbeat()
            if not self._state.is_completed():
                self._logger.error("Finished in state %s", self._state)
        return self._state

    @property
    def _state(self) -> State[Any]:
        assert self._flow_run.state is not None
        return self._flow_run.state

    def _note(self, state: State[Any]) -> None:
        self._flow_run.state, self._flow_run.state_name, self._flow_run.state_type = state, state.name, state.type

    async def _name(self) -> None:
        """Give the flow run the name that the user's flow has for it."""
        with self._enter_context():
            parameters = get_call_parameters(self._flow.fn, (), self._flow_run.parameters)
            name = make_flow_run_name(self._flow.flow_run_name, parameters, self._flow_run.name)
        try:
            with ask_prefect(f"flow run {self._flow_run.id}"):
                await self._client.set_flow_run_name(self._flow_run.id, name)
        except PgflowPrefectError as error:
            self._logger.warning("It keeps its name, and is not called %r: %s", name, error)
            return
        self._flow_run.name = name
        self._logger = flow_run_logger(flow_run=self._flow_run, flow=self._flow)

    @contextmanager
    def _enter_context(self) -> Iterator[None]:
        """Be the flow run that is found in the context."""
        log_prints = should_log_prints(self._flow)
        persist = self._flow.persist_result
        with ExitStack() as stack:
            if log_prints:
                stack.enter_context(patch_print())
            stack.enter_context(
                FlowRunContext(
                    flow=self._flow,
                    flow_run=self._flow_run,
                    parameters=self._flow_run.parameters,
                    client=self._client,
                    log_prints=log_prints,
                    task_runner=stack.enter_context(self._flow.task_runner.duplicate()),
                    result_store=self._results,
                    persist_result=get_current_settings().results.persist_by_default if persist is None else persist,
                )
            )
            stack.enter_context(ConcurrencyContext())
            stack.enter_context(_be_of_deployment(self._flow_run))
            yield

    async def _attempt(self) -> None:
        """Call the flow's function, and enter the state that this leads to."""
        seconds = self._flow.timeout_seconds
        try:
            with anyio.move_on_after(seconds) as scope:
                result = await self._flow.fn(**self._flow_run.parameters)
            if scope.cancelled_caught:
                state = self._time_out(TimeoutError(), f"Flow run exceeded timeout of {seconds} second(s)")
            else:
                state = await return_value_to_state(
                    resolve_futures_to_states(result), self._results, write_result=should_persist_result()
                )
        except TimeoutError as error:
            state = self._time_out(error, f"Flow run failed due to timeout: {error!r}")
        except Exception as error:
            self._logger.exception("Encountered exception during execution: %r", error)  # noqa: TRY401  as Prefect has it
            state = await exception_to_failed_state(
                error, self._results, write_result=True, message="Flow run encountered an exception:"
            )
        await self._end(state)

    def _time_out(self, error: TimeoutError, message: str) -> State[Any]:
        self._logger.error("%s", message)
        return Failed(name=StateName.TIMED_OUT, data=error, message=message)

    async def _end(self, state: State[Any]) -> None:
        await self._enter(state)
        if state.is_failed() and self._state.is_scheduled():
            self._logger.info(
                "Received non-final state %r when proposing final state %r and will attempt to run again...",
                self._state.name,
                state.name,
            )
            await self._enter(Running())  # which the server lets wait until it is time
            self._flow_run.run_count += 1  # as the server has counted

    async def _enter(self, state: State[Any], *, force: bool = False) -> None:
        self._note(await self._writer.enter(self._flow_run.id, state, force=force))
        await self._call_hooks(self._find_hooks())

    async def _crash(self, error: BaseException) -> None:
        with anyio.CancelScope(shield=True):
            state = await exception_to_crashed_state(error)
            self._logger.error("Crash detected! %s", state.message)
            await self._enter(state, force=True)

    def _find_hooks(self) -> list[Hook]:
        """Return what is to be called in the state that the flow run has entered.

        The process that executes the run calls those of a cancellation: see `run_cancellation_hooks`.
        """
        state, flow = self._state, self._flow
        if state.is_failed():
            return [*flow.on_failure_hooks]
        if state.is_completed():
            return [*flow.on_completion_hooks]
        if state.is_crashed():
            return [*flow.on_crashed_hooks]
        return [*flow.on_running_hooks] if state.is_running() else []

    async def _call_hooks(self, hooks: list[Hook]) -> None:
        for hook in map(contain_hook, hooks):
            name = find_hook_name(hook)
            self._logger.info("Running hook %r in response to entering state %r", name, self._state.name)
            try:
                await hook(self._flow, self._flow_run, self._state)
            except Exception:
                self._logger.exception("An error was encountered while running hook %r", name)
            else:
                self._logger.info("Hook %r finished running successfully", name)


@contextmanager
def _be_of_deployment(flow_run: FlowRun) -> Iterator[None]:
    """Let `prefect.runtime.deployment` find it in nested flows, too, whose flow runs have none."""
    values = {"_deployment_id": flow_run.deployment_id, "_deployment_parameters": flow_run.parameters}
    with ExitStack() as stack:
        for name, value in values.items() if flow_run.deployment_id is not None else ():
            variable = getattr(prefect.context, name, None)  # no other version has to have it
            if variable is not None:
                stack.callback(variable.reset, variable.set(value))
        yield


def _start_heartbeat(flow: AnyFlow, flow_run: FlowRun) -> Callable[[], None]:
    """Tell the server once in a while that a long flow run is alive, until the function that is returned is called.

    Prefect's engine has a thread for each flow run do so. Here, the one that sends the events of all does.
    """
    seconds = get_current_settings().flows.heartbeat_frequency
    if seconds is None:
        return lambda: None
    resource = {
        "prefect.resource.id": f"prefect.flow-run.{flow_run.id}",
        "prefect.resource.name": flow_run.name,
        "prefect.version": prefect.__version__,
    }
    related: list[Mapping[str, str]] = [
        {
            "prefect.resource.id": f"prefect.flow.{flow_run.flow_id}",
            "prefect.resource.role": "flow",
            "prefect.resource.name": flow.name,
        },
        *(
            {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}
            for tag in sorted(flow_run.tags)
        ),
    ]
    if flow_run.deployment_id is not None:
        deployment = f"prefect.deployment.{flow_run.deployment_id}"
        related.insert(1, {"prefect.resource.id": deployment, "prefect.resource.role": "deployment"})

    def make_event() -> Event:
        return Event.model_construct(
            occurred=cast("DateTime", datetime.now(UTC)),
            event="prefect.flow-run.heartbeat",
            resource=Resource.model_construct(resource),
            related=[RelatedResource.model_construct(dict(each)) for each in related],
            payload={},
        )

    return find_outbox().repeat(make_event, max(float(seconds), _SHORTEST_HEARTBEAT))
