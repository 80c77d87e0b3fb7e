"""Internals of Prefect's runner, which starts a process for each flow run: `serve` uses them.

`tests/unit/test_internals.py` compares each name and its parameters with the installed Prefect.
"""

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
