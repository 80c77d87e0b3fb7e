"""Internals of Prefect's runner, which starts a process for each flow run: `serve` uses them.

`tests/unit/test_internals.py` compares each name and its parameters with the installed Prefect. What Prefect 3.8.0 does
not have yet is made up for here.
"""

import inspect
import shlex
import sys
from collections.abc import Mapping
from typing import Any, get_args
from uuid import UUID

from prefect.runner._cancellation_manager import CancellationManager
from prefect.runner._control_channel import ControlChannel
from prefect.runner._flow_run_executor import FlowRunExecutor, FlowRunExecutorContext
from prefect.runner._process_manager import ProcessManager
from prefect.runner._starter_engine import EngineCommandStarter

__all__ = [
    "CancellationManager",
    "ControlChannel",
    "EngineCommandStarter",
    "FlowRunExecutor",
    "FlowRunExecutorContext",
    "ProcessManager",
]

_ISOLATES = "isolate_process_group" in inspect.signature(EngineCommandStarter).parameters
_RELINQUISHES = "relinquish" in get_args(inspect.get_annotations(ControlChannel.signal, eval_str=True)["intent"])


def make_command(module: str, *, makes_group: bool) -> str:
    """Return the command that runs a module, which itself makes its process group where nothing else does."""
    # -P: the working directory is not first in `sys.path`, where a file in it would hide the standard library.
    if not makes_group:
        return shlex.join([sys.executable, "-P", "-m", module])
    code = f"import os, runpy; os.setsid(); runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return shlex.join([sys.executable, "-P", "-c", code])


def make_starter(module: str, control_channel: ControlChannel, env: Mapping[str, str | None]) -> EngineCommandStarter:
    """Return what starts a flow run's process, in a process group of its own: Ctrl-C is for its parent only.

    Args:
        module: what the process runs.
        control_channel: tells the process what its end means.
        env: variables of the process; None for one that it does not get.
    """
    options: dict[str, Any] = {"isolate_process_group": True} if _ISOLATES else {}
    command = make_command(module, makes_group=not _ISOLATES)
    return EngineCommandStarter(command=command, control_channel=control_channel, env=dict(env), **options)


async def relinquish(control_channel: ControlChannel, flow_run_id: UUID) -> None:
    """Tell a flow run's process to leave the flow run's state to its parent; Prefect 3.8.0 has no word for that."""
    if _RELINQUISHES:
        await control_channel.signal(flow_run_id, "relinquish")


def read_exit_code(result: object) -> int | None:
    """Return the exit code of a flow run's process, of what `submit` returns; None where Prefect does not tell."""
    return getattr(result, "status_code", None)
