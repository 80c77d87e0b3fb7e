"""Makes the repairs of a comparison."""

from uuid import UUID

from prefect import Task
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import Constant, FlowRunResult, Parameter, State, TaskRunResult
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.reconciliation.disagreements import (
    Action,
    CancelRun,
    CreateTaskRun,
    Disagreement,
    ReleaseRun,
    SetFlowRun,
    SetTaskRun,
    Target,
)
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError, PrefectUnavailableError
from pgflow_prefect.execution.reporting.task_runs import EDGES
from pgflow_prefect.models import TaskKey
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.ids import find_task_run_id
from pgflow_prefect.wording import clean


async def repair(store: Store, client: PrefectClient, disagreement: Disagreement) -> Disagreement:
    """Repair a disagreement, and return it with the outcome; a second repair changes nothing.

    Raises:
        PrefectUnavailableError: Prefect's API does not answer.
        DatabaseUnavailableError: PostgreSQL does not.
    """
    try:
        for action in disagreement.actions:
            await _perform(store, client, disagreement.run_id, action)
    except PgflowPrefectError as error:
        has_answered = isinstance(error.__cause__, PrefectHTTPStatusError)  # then others may still be repaired
        if isinstance(error, PrefectUnavailableError | DatabaseUnavailableError) and not has_answered:
            raise
        return disagreement.model_copy(update={"error": str(error)})
    return disagreement.model_copy(update={"repaired": True})


async def _perform(store: Store, client: PrefectClient, run_id: UUID | None, action: Action) -> None:
    if isinstance(action, CancelRun | ReleaseRun):
        assert run_id is not None
        if isinstance(action, CancelRun):
            if not store.implementation.can_cancel:
                raise PgflowPrefectError("pgflow has no function that cancels a run: its next owner goes on with it")
            await store.cancel_run(run_id, action.reason)
        else:
            await store.release_run(run_id, action.epoch)
        return
    with ask_prefect("the repair"):
        try:
            # The server dates a state when it receives it. An earlier event, which the task run recorder
            # may still have in its queue, is older, and changes nothing any more.
            if isinstance(action, SetFlowRun):
                await client.set_flow_run_state(action.flow_run_id, _make_state(action.target), force=True)
            elif isinstance(action, SetTaskRun):
                await client.set_task_run_state(action.task_run_id, _make_state(action.target), force=True)
            else:
                assert run_id is not None
                await _create_task_run(store, client, run_id, action)
        except ObjectNotFound:
            pass  # deleted meanwhile: nothing wrong is shown any more


async def _create_task_run(store: Store, client: PrefectClient, run_id: UUID, action: CreateTaskRun) -> None:
    """Create a task run with the edges of the definition."""
    definition = await store.load_run_definition(run_id)
    upstream = [dep.upstream for dep in definition.deps if dep.downstream == action.step_slug]
    # A step that was claimed before its run was shown has another id than the flow run would give it.
    claimed = {step.step_slug: step.task_run_id for step in await store.list_unsettled_steps([run_id])}
    edges: list[TaskRunResult | FlowRunResult | Parameter | Constant] = [
        TaskRunResult(id=claimed.get(slug) or find_task_run_id(action.flow_run_id, TaskKey(slug))) for slug in upstream
    ]
    await client.create_task_run(
        Task(_do_nothing, name=clean(action.step_slug)),
        action.flow_run_id,
        dynamic_key=str(action.task_run_id),
        id=action.task_run_id,
        name=clean(action.step_slug),
        state=_make_state(action.target),
        task_inputs={EDGES: edges},
    )


def _do_nothing() -> None:
    """Stand in for a step's work, which is done."""


def _make_state(target: Target) -> State[None]:
    return State(type=target.type, message=target.message)
