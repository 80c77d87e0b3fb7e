"""Our handlers of the storm's flows on the released pgflow: `pgflow-prefect worker tests.faults.released_handlers`.

Each writes a row through `context.connection`: it is there once if, and only if, the task was completed by us. Those of
the chain are async, and one of them stops its own process when the storm asks for that.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio

from pgflow_prefect import AsyncStepContext, ItemContext, StepContext, Workflow
from tests.faults.released_flows import ALBUM, CHAIN, FLOWS, FREEZE, GIFTS, SECONDS, do_task

_WRITE = "INSERT INTO faults.written (run_id, step_slug, task_index) VALUES (%s, %s, %s)"
_SECONDS = float(os.environ.get(SECONDS, "0"))
_FREEZE = Path(os.environ.get(FREEZE, "freeze"))


def _freeze(context: AsyncStepContext) -> None:
    """Stop this process, if the storm has asked for that: its report comes when another worker has the run."""
    try:
        _FREEZE.rename(_FREEZE.with_suffix(f".{os.getpid()}"))  # of several processes, one succeeds
    except FileNotFoundError:
        return
    told = _FREEZE.with_suffix(".new")
    told.write_text(f"{os.getpid()} {context.run_id} {context.step_slug}", encoding="utf-8")
    told.rename(_FREEZE.with_suffix(".frozen"))
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread, and with it all the others


def _do(context: StepContext | ItemContext, index: int, number: int, items: int) -> object:
    context.connection.execute(_WRITE, [context.run_id, context.step_slug, index])
    time.sleep(_SECONDS)
    return do_task(context.step_slug, index, number, items)


async def _do_alone(context: AsyncStepContext, number: int) -> object:
    await context.connection.execute(_WRITE, [context.run_id, context.step_slug, 0])
    await anyio.sleep(_SECONDS)
    _freeze(context)
    return do_task(context.step_slug, 0, number)  # and the report is on its way before anything else is heard


async def _execute_link(payload: dict[str, Any], context: AsyncStepContext) -> object:
    return await _do_alone(context, payload["number"])


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
        elif flow == CHAIN:
            workflow.step(step, after=upstream)(_execute_link)
        else:
            workflow.step(step, after=upstream)(_make_step() if upstream else _make_root())
    return workflow


chain, album, gifts = _make_workflow(CHAIN), _make_workflow(ALBUM), _make_workflow(GIFTS)
