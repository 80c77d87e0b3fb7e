"""Reads flow runs and task runs from Prefect, many at a time."""

from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from typing import TypeVar
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowFilter,
    FlowFilterId,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterId,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType, TaskRun
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort

from pgflow_prefect.deployment.reconciliation.disagreements import ShownFlowRun, ShownTaskRun
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.ids import read_run_id
from pgflow_prefect.prefect_api.ownership import has_owner, is_owned
from pgflow_prefect.prefect_api.states import is_cancelled

PAGE = 200
"""The largest answer of Prefect's API by default."""

T = TypeVar("T")

_OPEN = sorted(set(StateType) - TERMINAL_STATES)


async def read_flow_runs(client: PrefectClient, ids: Iterable[UUID], installation: UUID) -> dict[UUID, ShownFlowRun]:
    """Return those of these flow runs that Prefect knows, by id."""
    found: dict[UUID, ShownFlowRun] = {}
    for some in _split([*ids]):
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=some))
        with ask_prefect("a look at flow runs"):
            page = await client.read_flow_runs(flow_run_filter=chosen, limit=PAGE)
        found |= {shown.id: shown for shown in await show_flow_runs(client, page, installation)}
    return found


async def read_task_runs(client: PrefectClient, ids: Iterable[UUID]) -> dict[UUID, ShownTaskRun]:
    """Return those of these task runs that Prefect knows, by id."""
    found: dict[UUID, ShownTaskRun] = {}
    for some in _split([*ids]):
        chosen = TaskRunFilter(id=TaskRunFilterId(any_=some))
        with ask_prefect("a look at task runs"):
            page = await client.read_task_runs(task_run_filter=chosen, limit=PAGE)
        found |= {task_run.id: _show_task_run(task_run) for task_run in page}
    return found


async def read_open_task_runs(client: PrefectClient, flow_run_ids: Iterable[UUID]) -> dict[UUID, ShownTaskRun]:
    """Return the task runs of these flow runs that have not ended, by id."""
    found: dict[UUID, ShownTaskRun] = {}
    unfinished = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=_OPEN)))
    for some in _split([*flow_run_ids]):
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=some))
        page: list[TaskRun] = []
        offset = 0
        while offset == 0 or len(page) == PAGE:
            with ask_prefect("a look at task runs"):
                page = await client.read_task_runs(
                    flow_run_filter=chosen,
                    task_run_filter=unfinished,
                    sort=TaskRunSort.ID_DESC,
                    limit=PAGE,
                    offset=offset,
                )
            found |= {task_run.id: _show_task_run(task_run) for task_run in page}
            offset += PAGE
    return found


async def list_open_flow_runs(
    client: PrefectClient, flow_names: Iterable[str], installation: UUID
) -> AsyncIterator[list[tuple[str, ShownFlowRun]]]:
    """Return the flow runs of these flows that have not ended, in portions, each with its flow's name."""
    for some in _split([*flow_names]):
        named = FlowFilter(name=FlowFilterName(any_=some))
        with ask_prefect("a look at flows"):
            names = {flow.id: flow.name for flow in await client.read_flows(flow_filter=named, limit=PAGE)}
        page: list[FlowRun] = []
        offset = 0
        while names and (offset == 0 or len(page) == PAGE):
            with ask_prefect("a look at flow runs"):
                page = await client.read_flow_runs(
                    flow_filter=FlowFilter(id=FlowFilterId(any_=[*names])),
                    flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_OPEN))),
                    sort=FlowRunSort.ID_DESC,
                    limit=PAGE,
                    offset=offset,
                )
            shown = await show_flow_runs(client, page, installation)
            yield [(names[flow_run.flow_id], each) for flow_run, each in zip(page, shown, strict=True)]
            offset += PAGE


async def show_flow_runs(client: PrefectClient, flow_runs: Sequence[FlowRun], installation: UUID) -> list[ShownFlowRun]:
    """Return flow runs for comparison, at most a page of them, for this installation.

    A flow run of an older version has no tag of its installation. It belongs to the installation of its deployment.
    """
    asked = {each.deployment_id for each in flow_runs if not has_owner(each.tags)} - {None}
    chosen = DeploymentFilter(id=DeploymentFilterId(any_=[each for each in asked if each is not None]))
    with ask_prefect("a look at deployments"):
        found = await client.read_deployments(deployment_filter=chosen, limit=PAGE) if asked else []
    own = {each.id for each in found if is_owned(each.tags, installation)}
    return [_show_flow_run(each, installation, own) for each in flow_runs]


def _show_flow_run(flow_run: FlowRun, installation: UUID, own_deployments: Collection[UUID]) -> ShownFlowRun:
    state = flow_run.state
    assert state is not None, "Prefect creates no flow run without a state"
    return ShownFlowRun(
        id=flow_run.id,
        name=flow_run.name,
        type=state.type,
        state=state.name or state.type.value.capitalize(),
        since=state.timestamp,
        is_cancelled=is_cancelled(state),
        deployed=flow_run.deployment_id is not None,
        run_id=read_run_id(flow_run),
        owned=(
            is_owned(flow_run.tags, installation)
            if has_owner(flow_run.tags)
            else flow_run.deployment_id in own_deployments
        ),
    )


def _show_task_run(task_run: TaskRun) -> ShownTaskRun:
    assert task_run.state_type is not None, "Prefect creates no task run without a state"
    return ShownTaskRun(task_run.id, task_run.flow_run_id, task_run.state_type, task_run.state_name)


def _split(values: Sequence[T]) -> Iterator[list[T]]:
    for start in range(0, len(values), PAGE):
        yield [*values[start : start + PAGE]]
