"""What a service shows of the log lines that its flow runs' processes write."""

import logging
from collections.abc import Mapping

import pytest

from pgflow_prefect.services.console_lines import HandlersFilter, HandlersFormatter


def make_record(
    name: str, message: str, error: Exception | None = None, extra: Mapping[str, str] | None = None
) -> logging.LogRecord:
    exc_info = (type(error), error, None) if error is not None else None
    record = logging.LogRecord(name, logging.INFO, __file__, 1, message, (), exc_info)
    vars(record).update(extra or {})
    return record


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("prefect.task_runs", True),
        ("prefect.task_runs.child", True),
        ("prefect.task_runs_of_others", False),
        ("prefect.flow_runs", False),
        ("prefect", False),
        ("pgflow_prefect.execution.flow", False),
        ("shop", True),
        ("root", True),
    ],
)
def test_handlers_are_shown_and_what_prefect_says_of_flow_runs_is_not(name: str, shown: bool) -> None:
    assert HandlersFilter().filter(make_record(name, "x")) is shown


def test_a_line_names_its_flow_run_and_step() -> None:
    extra = {"flow_run_name": "chain-0b0e3a4e", "task_run_name": "a"}
    line = HandlersFormatter().format(make_record("prefect.task_runs", "hello", extra=extra))
    assert line.endswith(" INFO chain-0b0e3a4e, step a: hello")
    assert HandlersFormatter().format(make_record("shop", "hello")).endswith(" INFO shop: hello")


def test_a_traceback_is_shown_where_the_handler_logs_it_and_not_where_the_step_ends_with_it() -> None:
    formatter = HandlersFormatter()
    error = ValueError("no")
    own = formatter.format(make_record("prefect.task_runs", "caught it", error))
    ended = formatter.format(make_record("prefect.task_runs", "Task run failed with exception: no", error))
    assert own.splitlines()[-1] == "    ValueError: no"
    assert len(ended.splitlines()) == 1
