"""Prefect's internals are where this package expects them, and take the arguments that it passes."""

import ast
import inspect
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.concurrency.asyncio import concurrency
from prefect.context import FlowRunContext, TaskRunContext
from prefect.flows import Flow
from prefect.runner import _flow_run_executor

import pgflow_prefect
from pgflow_prefect.prefect_api import internals, runner_internals, schedule_internals
from pgflow_prefect.prefect_api.runner_internals import (
    CancellationManager,
    ControlChannel,
    EngineCommandStarter,
    FlowRunExecutor,
    FlowRunExecutorContext,
    ProcessManager,
)

PACKAGE = Path(pgflow_prefect.__file__).parent

PUBLIC = {
    "prefect",
    "prefect.blocks.core",
    "prefect.blocks.system",
    "prefect.cache_policies",
    "prefect.client.orchestration",
    "prefect.client.schemas.actions",
    "prefect.client.schemas.filters",
    "prefect.client.schemas.objects",
    "prefect.client.schemas.responses",
    "prefect.client.schemas.schedules",
    "prefect.client.schemas.sorting",
    "prefect.concurrency.asyncio",
    "prefect.context",
    "prefect.events",
    "prefect.exceptions",
    "prefect.filesystems",
    "prefect.futures",
    "prefect.runtime",
    "prefect.serializers",
    "prefect.settings",
    "prefect.states",
    "prefect.task_runners",
    "prefect.types",
}
"""Modules that Prefect's documentation and examples import from."""

CALLS: dict[str, tuple[Callable[..., Any], int, set[str]]] = {
    "AsyncClientContext": (internals.AsyncClientContext, 0, set()),
    "AsyncTransaction": (internals.AsyncTransaction, 0, {"store", "write_on_commit", "logger"}),
    "ConcurrencyContext": (internals.ConcurrencyContext, 0, set()),
    "SettingsContext": (internals.SettingsContext, 0, {"profile", "settings"}),
    "amaintain_concurrency_lease": (internals.amaintain_concurrency_lease, 2, {"raise_on_lease_renewal_failure"}),
    "clamped_poisson_interval": (internals.clamped_poisson_interval, 1, {"clamping_factor"}),
    "concurrency": (concurrency, 1, {"occupy", "holder", "strict"}),
    "exception_to_crashed_state": (internals.exception_to_crashed_state, 1, set()),
    "exception_to_failed_state": (internals.exception_to_failed_state, 2, {"write_result", "message"}),
    "flow_run_logger": (internals.flow_run_logger, 0, {"flow_run", "flow"}),
    "generate_parameter_schema": (internals.generate_parameter_schema, 2, set()),
    "get_events_client": (internals.get_events_client, 0, {"reconnection_attempts"}),
    "get_settings_context": (internals.get_settings_context, 0, set()),
    "load_logging_config": (internals.load_logging_config, 1, set()),
    "load_script_as_module": (internals.importtools.load_script_as_module, 0, {"path"}),
    "patch_print": (internals.patch_print, 0, set()),
    "propose_state": (internals.propose_state, 2, {"flow_run_id", "force"}),
    "related_resources_from_run_context": (internals.related_resources_from_run_context, 1, set()),
    "resolve_futures_to_states": (internals.resolve_futures_to_states, 1, set()),
    "result store: of a flow": (internals.ResultStore.aupdate_for_flow, 2, set()),
    "return_value_to_state": (internals.return_value_to_state, 2, {"write_result"}),
    "run_flow_async": (internals.run_flow_async, 1, {"flow_run", "parameters", "return_type"}),
    "should_log_prints": (internals.should_log_prints, 1, set()),
    "should_persist_result": (internals.should_persist_result, 0, set()),
    "task_run_logger": (internals.task_run_logger, 4, set()),
    "to_state_create": (internals.to_state_create, 1, set()),
    "url_for": (internals.url_for, 1, set()),
    **{
        f"dates of a {name}": (getattr(schedule_internals, name).get_dates, 1, {"n", "start", "end"})
        for name in schedule_internals.__all__
    },
    "runner: cancel": (CancellationManager.cancel_by_id, 2, set()),
    "runner: flow_run_ids": (ProcessManager.flow_run_ids, 1, set()),
    "runner: kill": (ProcessManager.kill, 3, set()),
    "runner: process": (ProcessManager.get, 2, set()),
    "runner: signal": (ControlChannel.signal, 3, set()),
    "runner: starter": (EngineCommandStarter, 0, {"command", "control_channel", "env"}),
    "runner: submit": (FlowRunExecutor.submit, 1, set()),
    "runner: executor": (FlowRunExecutorContext.create_executor, 3, {"resolve_flow", "propose_submitting"}),
}
"""Each call: what is called, the number of arguments by place (`self` included), and the arguments by name."""


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_an_internal_takes_the_arguments_that_it_gets(call: tuple[Callable[..., Any], int, set[str]]) -> None:
    called, by_place, by_name = call

    inspect.signature(called).bind(*[None] * by_place, **dict.fromkeys(by_name))


def test_a_runner_s_context_has_the_parts_that_serve_uses() -> None:
    source = inspect.getsource(FlowRunExecutorContext)

    for part in ("client", "control_channel", "process_manager", "_cancellation_manager"):
        assert f"self.{part} = " in source
    assert "self._cancellation_manager.cancel_by_id" in source, "cancellations no longer pass our replacement"


def test_an_exit_code_is_where_it_is_read_if_prefect_tells_it() -> None:
    told = getattr(_flow_run_executor, "FlowRunExecutionResult", None)  # since 3.8.4

    assert told is None or "status_code" in told.__annotations__


def test_a_process_can_make_a_group_of_its_own() -> None:
    command = runner_internals.make_command("tests.unit.group_leader", makes_group=True)

    written = subprocess.run(
        shlex.split(command), env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)}, capture_output=True, check=True
    )

    assert written.stdout.strip() == b"it leads its group"


def test_contexts_have_the_fields_that_steps_use() -> None:
    assert {"flow", "flow_run", "client", "result_store", "task_runner"} <= {*FlowRunContext.model_fields}
    assert {"task", "task_run", "client"} <= {*TaskRunContext.model_fields}
    assert "current_tags" in internals.TagsContext.model_fields


def test_a_flow_has_the_hooks_that_are_contained() -> None:
    names = {"on_running_hooks", "on_completion_hooks", "on_failure_hooks", "on_cancellation_hooks", "on_crashed_hooks"}

    assert names <= {*vars(Flow(lambda: None, name="flow"))}


def test_a_flow_has_the_entrypoint_that_a_workflow_replaces() -> None:
    assert "_entrypoint" in vars(Flow(lambda: None, name="flow"))


def test_every_internal_is_exported_and_compared() -> None:
    functions = {name for name in internals.__all__ if inspect.isfunction(getattr(internals, name))}

    assert functions <= {*CALLS}
    assert {*runner_internals.__all__} <= {each[0].__qualname__.split(".")[0] for each in CALLS.values()}


def test_internals_are_imported_in_one_place() -> None:
    own_rooms = {f"prefect_api/{name}internals.py" for name in ("", "runner_", "schedule_")}
    found = {
        f"{file.relative_to(PACKAGE)}: {module}"
        for file in PACKAGE.rglob("*.py")
        if str(file.relative_to(PACKAGE)) not in own_rooms
        for module, names in find_imports(file)
        if module not in PUBLIC
        or names & {*internals.__all__, *runner_internals.__all__}
        or any(name.startswith("_") for name in names)
    }

    assert found == set(), "import these names from pgflow_prefect.prefect_api.internals"


def find_imports(file: Path) -> list[tuple[str, set[str]]]:
    """Return what a file imports from Prefect: modules, each with the names."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    imported = [
        (each.module or "", {name.name for name in each.names}) for each in nodes if isinstance(each, ast.ImportFrom)
    ]
    imported += [(name.name, set()) for each in nodes if isinstance(each, ast.Import) for name in each.names]
    return [(module, names) for module, names in imported if module.split(".")[0] == "prefect"]
