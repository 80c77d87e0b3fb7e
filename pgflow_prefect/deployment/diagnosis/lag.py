"""Measures how late Prefect shows a task run, with a real flow run that is deleted again."""

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

import anyio
from prefect import flow as make_flow
from prefect import task as make_task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.runtime import task_run as current_task_run
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Pending

from pgflow_prefect.deployment.diagnosis.findings import Check, Outcome, Patient, Verdict
from pgflow_prefect.deployment.diagnosis.prefect import RECORDER_ADVICE
from pgflow_prefect.prefect_api.internals import run_flow_async
from pgflow_prefect.waiting import Pauses

FLOW = "pgflow-doctor"
"""The name of the flow; it is deleted again, too, unless it has other flow runs."""

_LONGEST = 30.0  # seconds; an event that has not come by then will not come
_SLOW = 5.0
_SHORTEST_WAIT, _LONGEST_WAIT = 0.1, 1.0  # seconds between two requests
_CLEANING = 10.0


@dataclass
class Probe:
    """The result of a flow run of ours.

    Attributes:
        task_run_id: of its only task; None until that has run.
        ended: when that task ended, by the monotonic clock.
    """

    task_run_id: UUID | None = None
    ended: float = 0.0


async def _measure(patient: Patient) -> Verdict:
    client = patient.prefect
    probe = Probe()
    flow = make_flow(name=FLOW, persist_result=False)(_make_body(probe))
    flow_run = await client.create_flow_run(flow, state=Pending())
    try:
        # Its log would arrive after the deletion, and stay.
        with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}):
            state = await run_flow_async(flow, flow_run=flow_run, return_type="state")
        assert isinstance(state, State)
        if not state.is_completed() or probe.task_run_id is None:
            return Verdict(
                Outcome.FAULT, f"a flow run of one task ended as {state.name}: {state.message or 'no reason'}"
            )
        return judge_lag(await _await_shown(client, probe.task_run_id, probe.ended))
    finally:
        with anyio.move_on_after(_CLEANING, shield=True):
            await _clean_up(client, flow_run)


def judge_lag(seconds: float | None) -> Verdict:
    """Judge how late Prefect showed a task run; None means never."""
    if seconds is None:
        return Verdict(
            Outcome.FAULT,
            f"a task run was not shown as completed within {_LONGEST:g} s",
            "let websockets through to Prefect's server, and look whether its services run "
            "(`prefect server services start`, where it was started with --no-services)",
        )
    shown = f"a task run shows as completed {seconds:.1f} s after its end"
    if seconds > _SLOW:
        return Verdict(Outcome.WARNING, shown, RECORDER_ADVICE)
    return Verdict(Outcome.OK, shown)


def _make_body(probe: Probe) -> Callable[[], Awaitable[None]]:
    @make_task(name="probe", cache_policy=NO_CACHE, persist_result=False)
    async def work() -> None:
        probe.task_run_id = UUID(str(current_task_run.id))
        probe.ended = time.monotonic()

    async def run_probe() -> None:
        """Run one task, so that `pgflow-prefect doctor` can see when Prefect shows it."""
        await work()

    return run_probe


async def _await_shown(client: PrefectClient, task_run_id: UUID, ended: float) -> float | None:
    """Return the seconds from a task's end until Prefect's API shows its task run as completed; None for never."""
    pauses = Pauses(_SHORTEST_WAIT, _LONGEST_WAIT, factor=1.5)
    while (waited := time.monotonic() - ended) < _LONGEST:
        try:
            if (await client.read_task_run(task_run_id)).state_type is StateType.COMPLETED:
                return time.monotonic() - ended
        except ObjectNotFound:
            pass  # nothing of it has come yet
        await anyio.sleep(min(pauses.draw(), _LONGEST - waited))
    return None


async def _clean_up(client: PrefectClient, flow_run: FlowRun) -> None:
    """Delete a flow run, and its flow if it has no other one."""
    with suppress(ObjectNotFound):
        await client.delete_flow_run(flow_run.id)
    if not await client.count_flow_runs(flow_filter=FlowFilter(id=FlowFilterId(any_=[flow_run.flow_id]))):
        with suppress(ObjectNotFound):
            await client.delete_flow(flow_run.flow_id)


LAG_CHECK = Check("lag", _measure, needs=("websockets",), patience=2 * _LONGEST + _CLEANING)
