"""Our handlers of the storm's flows on the released pgflow: `pgflow-prefect worker tests.faults.released_handlers`.

Each writes a row through `context.connection`: it is there once if, and only if, the task was completed by us.
"""

import os
import time
from collections.abc import Callable
from typing import Any

from pgflow_prefect import ItemContext, StepContext, Workflow
from tests.faults.released_flows import ALBUM, CHAIN, FLOWS, GIFTS, SECONDS, do_task

_WRITE = "INSERT INTO faults.written (run_id, step_slug, task_index) VALUES (%s, %s, %s)"
_SECONDS = float(os.environ.get(SECONDS, "0"))


def _do(context: StepContext | ItemContext, index: int, number: int, items: int) -> object:
    context.connection.execute(_WRITE, [context.run_id, context.step_slug, index])
    time.sleep(_SECONDS)
    return do_task(context.step_slug, index, number, items)


def _make_root() -> Callable[..., object]:
    def execute(payload: dict[str, Any], context: StepContext) -> object:
        return _do(context, 0, payload["number"], payload["items"])

    return execute


def _make_step() -> Callable[..., object]:
    def execute(payload: dict[str, Any], context: StepContext) -> object:
        return _do(context, 0, payload["number"], 0)

    return execute


def _make_item() -> Callable[..., object]:
    def execute(item: dict[str, Any], context: ItemContext) -> object:
        return _do(context, context.item_index, item["number"], 0)

    return execute


def _make_workflow(flow: str) -> Workflow:
    workflow, plan = Workflow(flow), FLOWS[flow]
    for step, upstream in plan.steps.items():
        if step in plan.maps:
            workflow.map(step, over=upstream[0])(_make_item())
        else:
            workflow.step(step, after=upstream)(_make_step() if upstream else _make_root())
    return workflow


chain, album, gifts = _make_workflow(CHAIN), _make_workflow(ALBUM), _make_workflow(GIFTS)
