"""The stubs of a DAG's tasks: the options of their steps, and docstrings with what Airflow has."""

from collections.abc import Iterator

from pydantic import JsonValue

from pgflow_prefect.airflow.retries import list_delays
from pgflow_prefect.definitions.airflow.arguments import Argument
from pgflow_prefect.definitions.airflow.dag import AirflowDag
from pgflow_prefect.definitions.airflow.tasks import AirflowTask
from pgflow_prefect.definitions.origin import Origin, StepOrigin

MOST_LINES = 200
"""Lines of a docstring."""

_LONGEST_LINE = 1_000


def make_origin(dag: AirflowDag) -> Origin:
    """Return what the file of a DAG's stubs says of where it comes from."""
    lines = [f"Imported from Airflow{f', {dag.file}' if dag.file else ''}."]
    if dag.description:
        lines += ["", *dag.description[:2000].splitlines()[:20]]
    return Origin(
        steps={task.task_id: _make_step(task) for task in dag.tasks},
        options={"tags": list(dag.tags)} if dag.tags else {},
        lines=tuple(line[:_LONGEST_LINE] for line in lines),
    )


def _make_step(task: AirflowTask) -> StepOrigin:
    options: dict[str, JsonValue] = {}
    if task.retries:
        delays = list_delays(task)
        options["retries"] = task.retries
        options["retry_delay_seconds"] = [*map(_to_number, delays)] if isinstance(delays, list) else _to_number(delays)
    if task.timeout:
        options["timeout_seconds"] = _to_number(task.timeout)
    lines = [line[:_LONGEST_LINE] for line in _write_lines(task)]
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"… {len(lines) - MOST_LINES} lines more"]
    return StepOrigin(options, tuple(lines))


def _to_number(seconds: float) -> int | float:
    return int(seconds) if seconds == int(seconds) else seconds


def _write_lines(task: AirflowTask) -> Iterator[str]:
    yield f"In Airflow: {task.operator} of {task.module}." if task.module else f"In Airflow: {task.operator}."
    if task.callable:
        yield f"It calls {task.callable}."
    if task.expansion is not None:
        yield f"Expanded over {task.expansion.text}."
    if task.arguments:
        yield ""
    for argument in task.arguments:
        yield from _write_argument(argument)


def _write_argument(argument: Argument) -> Iterator[str]:
    if not argument.lines:
        yield f"{argument.name} = {argument.text}"
        return
    yield f"{argument.name} ="
    for line in argument.lines:
        yield f"    {line}"
