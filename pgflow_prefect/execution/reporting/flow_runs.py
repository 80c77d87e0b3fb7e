"""The one place that does what Prefect's flow engine does: it executes flow runs of one flow in this process.

For a small flow run, Prefect's own engine asks the server six times, once of them with another client in a thread, and
logs three lines. PostgreSQL says who executes a run. What is left to do is to be the flow run that handlers find in
their context, to write its end, and to try again where the server says so. The server itself tells automations of the
states that a flow run enters.

A flow run that this process has created is Running from the start. A flow run that Prefect has scheduled goes from
Pending to Running by Prefect's policy: its slot of a concurrency limit hangs on that way.

What differs from Prefect's engine: no OpenTelemetry span, and no lines in Prefect's log where all went well.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, nullcontext
from time import monotonic
from typing import Any

import anyio
import prefect
from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectSignal
from prefect.settings import get_current_settings
from prefect.states import Failed, Running, Scheduled

from pgflow_prefect.errors import PgflowPrefectError
from pgflow_prefect.execution.flow_hooks import Hook, call_hooks, leave_hooks_after
from pgflow_prefect.execution.reporting.heartbeat import start_heartbeat
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from pgflow_prefect.prefect_api.internals import (
    ConcurrencyContext,
    ResultStore,
    amaintain_concurrency_lease,
    exception_to_crashed_state,
    exception_to_failed_state,
    flow_run_logger,
    patch_print,
    resolve_futures_to_states,
    return_value_to_state,
    should_log_prints,
    should_persist_result,
)
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.state_names import StateName

AnyFlow = Flow[..., Any]

_logger = logging.getLogger(__name__)

_LIFETIME = 60.0  # seconds after which it asks again where results are stored

_SLOT_LEASE = 300.0  # seconds for which Prefect keeps a slot of a concurrency limit, as its own engine has it

_LOOK_AGAIN = 0.2  # seconds, as Prefect's engine has it

_NOT_FOR_THE_SERVER = {"send_to_api": False}
"""Of a line about a run that goes well: it would cost the server as much as a step."""


class FlowRunEngine:
    """Executes flow runs of one flow in this process."""

    def __init__(
        self, flow: AnyFlow, writer: FlowRunWriter, client: PrefectClient, drained: asyncio.Event | None = None
    ) -> None:
        """Prepare for flow runs of a flow.

        Args:
            flow: an async one.
            writer: writes the states of all flow runs of this process.
            client: Prefect's API.
            drained: set when the process drains: a flow run that only waits to be tried again is left to others then.
        """
        self.flow = flow
        self.writer = writer
        self.client = client
        self.drained = drained
        self._results: ResultStore | None = None
        self._results_until = 0.0
        self._asking = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None

    async def execute(self, flow_run: FlowRun) -> State[Any]:
        """Execute a flow run and return the state in which it is left: a final one, or the one that it waits in.

        A flow run that is not Running yet becomes so first, when the server lets it.

        Raises:
            PrefectSignal: Prefect's server wants the flow run to be left alone.
            PrefectUnavailableError: Prefect does not answer in time.
            PrefectHTTPStatusError: it did not take a state.
        """
        with leave_hooks_after(self.drained):
            return await _LiveFlowRun(self, flow_run, await self._open_results()).perform()

    async def _open_results(self) -> ResultStore:
        """Return where the results of a flow run go, if any are persisted.

        The server says so once in a while. Only the first flow run waits for its answer.
        """
        async with self._asking:
            if self._results is None:
                self._results = await self._ask_for_results()
            elif monotonic() > self._results_until and self._refreshing is None:
                self._refreshing = asyncio.create_task(self._refresh_results())
        # Each flow run has a cache of its own: results of others are nothing that it may find.
        return ResultStore(
            result_storage=self._results.result_storage,
            metadata_storage=self._results.metadata_storage,
            serializer=self._results.serializer,
            cache_result_in_memory=self._results.cache_result_in_memory,
        )

    async def _refresh_results(self) -> None:
        try:
            self._results = await self._ask_for_results()
        except Exception as error:  # noqa: BLE001  whatever the client raises: what was right a minute ago is not lost
            self._results_until = monotonic() + _LIFETIME
            _logger.warning("results are stored where they were before: %s", describe_error(error))
        finally:
            self._refreshing = None

    async def _ask_for_results(self) -> ResultStore:
        with ask_prefect("where results are stored"):
            found = await ResultStore().aupdate_for_flow(self.flow)
        self._results_until = monotonic() + _LIFETIME
        return found


class _LiveFlowRun:
    """One flow run, from Running to its end."""

    def __init__(self, engine: FlowRunEngine, flow_run: FlowRun, results: ResultStore) -> None:
        self._flow = engine.flow
        self._writer = engine.writer
        self._client = engine.client
        self._drained = engine.drained
        self._flow_run = flow_run
        self._results = results
        self._logger = flow_run_logger(flow_run=flow_run, flow=engine.flow)

    async def perform(self) -> State[Any]:
        with ExitStack() as stack:
            try:
                if self._flow.flow_run_name:
                    await self._name()
                await self._begin()
                if self._state.is_running():
                    names = self._flow_run.name, self._flow.name
                    self._logger.info("Beginning flow run %r for flow %r", *names, extra=_NOT_FOR_THE_SERVER)
                    stack.callback(start_heartbeat(self._flow, self._flow_run))
                while self._state.is_running():
                    async with self._hold_slot():
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
                self._tell_end()
        return self._state

    def _tell_end(self) -> None:
        state = self._state
        level = logging.INFO if state.is_completed() or state.is_scheduled() else logging.ERROR
        self._logger.log(
            level, "Finished in state %s", state, extra=_NOT_FOR_THE_SERVER if state.is_completed() else None
        )

    async def _begin(self) -> None:
        """Enter Running, unless the flow run was created so: its slots of concurrency limits hang on that way."""
        if self._state.is_running():
            await self._call_hooks()
            return
        await self._note_policy()
        while is_in_turn := await self._enter_in_turn():
            if not self._state.is_pending():
                break
            await anyio.sleep(_LOOK_AGAIN)
        if not is_in_turn:  # no other process would look for it in Pending
            await self._enter(Scheduled(message="its process ends, and it had not begun"))
        if self._state.is_running():
            with ask_prefect(f"flow run {self._flow_run.id}"):
                self._flow_run = await self._client.read_flow_run(self._flow_run.id)

    async def _note_policy(self) -> None:
        """Tell the server how often the flow is to be tried again, unless the flow run was created with it."""
        flow, policy = self._flow, self._flow_run.empirical_policy
        given = {"retries": flow.retries, "retry_delay": flow.retry_delay_seconds}
        policy = policy.model_copy(update={name: each for name, each in given.items() if getattr(policy, name) is None})
        with ask_prefect(f"flow run {self._flow_run.id}"):
            await self._client.update_flow_run(self._flow_run.id, flow_version=flow.version, empirical_policy=policy)

    def _hold_slot(self) -> AbstractAsyncContextManager[None]:
        """Hold the flow run's slot of its deployment's concurrency limit, if it has one."""
        lease = self._state.state_details.deployment_concurrency_lease_id
        if lease is None:
            return nullcontext()
        return amaintain_concurrency_lease(lease, _SLOT_LEASE, raise_on_lease_renewal_failure=True)

    @property
    def _state(self) -> State[Any]:
        assert self._flow_run.state is not None
        return self._flow_run.state

    def _note(self, state: State[Any]) -> None:
        self._flow_run.state, self._flow_run.state_name, self._flow_run.state_type = state, state.name, state.type

    async def _name(self) -> None:
        """Give the flow run the name that the user's flow has for it."""
        with self._enter_context():
            naming = self._flow.flow_run_name
            name = naming() if callable(naming) else str(naming)
        if name == self._flow_run.name:
            return
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
            if await self._enter_in_turn():
                self._flow_run.run_count += 1  # as the server has counted
            else:
                self._logger.info("It is left to the next process that looks at Prefect's schedule: this one ends")

    async def _enter_in_turn(self) -> bool:
        """Enter Running, which the server lets wait until it is time; False if the process drains meanwhile."""
        entered = await self._writer.enter_in_turn(self._flow_run.id, Running(), self._drained)
        if entered is None:
            return False
        self._note(entered)
        await self._call_hooks()
        return True

    async def _enter(self, state: State[Any], *, force: bool = False) -> None:
        try:
            self._note(await self._writer.enter(self._flow_run.id, state, force=force))
        except Exception:
            # Prefect does not hear of it now, but the run has come to this end, and hooks are called at an end.
            self._note(state)
            await self._call_hooks()
            raise
        await self._call_hooks()

    async def _crash(self, error: BaseException) -> None:
        with anyio.CancelScope(shield=True):
            state = await exception_to_crashed_state(error)
            self._logger.error("Crash detected! %s", state.message)
            try:
                await self._enter(state, force=True)
            except Exception as refused:  # noqa: BLE001  what broke the flow run off is what is to be raised
                self._logger.warning("Prefect did not hear of it: %s", describe_error(refused))

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

    async def _call_hooks(self) -> None:
        await call_hooks(self._find_hooks(), self._flow, self._flow_run, self._state, self._logger)


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
