"""The one place that calls into Prefect's task engine.

`prefect.task_engine` is not part of Prefect's documented API. It is used for what `Task.submit` does not offer: a task
run id of our own, so that a step stays one node of the run graph over all retries of a flow run; edges that are
exactly the definition's, where Prefect would infer them from the identity of values; and one event loop for all tasks,
so that they share the pool of database connections.
"""

from collections.abc import Iterable
from typing import Any
from uuid import UUID, uuid5

from prefect import Task
from prefect.client.schemas.objects import RunInput, State, TaskRunResult
from prefect.task_engine import run_task_async

EDGES = "upstream"
"""The only parameter of a step's task: the run graph repeats a parent once for each parameter that leads to it."""


def find_task_run_id(flow_run_id: UUID, step_slug: str) -> UUID:
    """Return the id of a step's task run in a flow run: the same each time that the flow run is tried."""
    return uuid5(flow_run_id, step_slug)


async def run_step_task(task: Task[[None], Any], task_run_id: UUID, upstream: Iterable[UUID]) -> State:
    """Run a step's task in the current flow run and return its final state.

    Args:
        task: made by `make_task`.
        task_run_id: what its task run is to be called.
        upstream: the task runs from which an edge leads to it.
    """
    edges: set[RunInput] = {TaskRunResult(id=each) for each in upstream}
    state = await run_task_async(
        task,
        task_run_id=task_run_id,
        parameters={EDGES: None},
        dependencies={EDGES: edges},
        return_type="state",
    )
    assert isinstance(state, State)
    return state
