"""A task of a serialized DAG: what Airflow's scheduler knows of it, without secrets and without defaults."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from pgflow_prefect.definitions.airflow.arguments import (
    DEFAULTS,
    MOST_ARGUMENTS,
    NO_NAMES,
    Argument,
    Mentioned,
    find_names,
    list_arguments,
)
from pgflow_prefect.definitions.airflow.expansion import Expansion, read_expansion
from pgflow_prefect.definitions.airflow.values import (
    Fields,
    read_names,
    read_seconds,
    read_text,
    unwrap,
    write_value,
)

RETRY_DELAY = 300.0
"""Airflow's own default of `retry_delay`, in seconds."""

_MOST_RETRIES = 1_000_000

_LONGEST = 1e9
"""Seconds of a delay or a time-out: more than 30 years."""

_OF_FILE = re.compile(r"\bunusual_prefix_[0-9a-f]{40}_")
"""What Airflow puts before the name of a module that is a DAG file: a hash of its path."""


@dataclass(frozen=True)
class AirflowTask:
    """A task.

    Attributes:
        task_id: its id, which has the ids of its groups before it.
        operator: the name that Airflow shows.
        module: the module of the operator's class.
        callable: the dotted name of the function that it calls, if the document has it.
        rule: its trigger rule.
        downstream: the ids of the tasks that wait for it.
        retries: attempts after the first.
        retry_delay: in seconds.
        backoff: the factor by which the delay grows from attempt to attempt; 0: it does not grow.
        max_retry_delay: in seconds.
        timeout: of each attempt, in seconds.
        is_setup: it is a setup.
        is_teardown: it is a teardown.
        fails_run: whether its failure fails the run.
        is_sensor: it waits for something.
        is_empty: it does nothing.
        may_skip: it decides which tasks below it run.
        expansion: what it is expanded over; None for a task that is not mapped.
        arguments: those of its operator that are templates, as the document has no others.
        mentioned: names in its arguments.
        said: what it says beside its work, by the names of `DEFAULTS`; defaults are left out.
    """

    task_id: str
    operator: str
    module: str
    callable: str | None
    rule: str
    downstream: tuple[str, ...]
    retries: int = 0
    retry_delay: float = RETRY_DELAY
    backoff: float = 0.0
    max_retry_delay: float | None = None
    timeout: float | None = None
    is_setup: bool = False
    is_teardown: bool = False
    fails_run: bool = True
    is_sensor: bool = False
    is_empty: bool = False
    may_skip: bool = False
    expansion: Expansion | None = None
    arguments: tuple[Argument, ...] = ()
    mentioned: Mentioned = NO_NAMES
    said: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The dotted name of the operator's class."""
        return f"{self.module}.{self.operator}" if self.module else self.operator


class UnreadableTaskError(ValueError):
    """A task has something that can't be read. The message says what, in half a sentence."""


def read_task(given: Fields, settings: Fields) -> AirflowTask:
    """Return a task.

    Args:
        given: its fields, by the names of version 3.
        settings: Airflow's own, which decide what the task does not say.

    Raises:
        UnreadableTaskError: what it is can't be told.
    """
    partial = unwrap(given.get("partial_kwargs"))
    fields = {**given, **(partial if isinstance(partial, dict) else {})}
    task_id = read_text(fields.get("task_id"))
    if not task_id:
        raise UnreadableTaskError("has no task_id")
    is_teardown = fields.get("is_teardown") is True
    arguments = list(list_arguments(fields))[:MOST_ARGUMENTS]
    return AirflowTask(
        task_id=task_id,
        operator=read_text(fields.get("_operator_name")) or read_text(fields.get("task_type")) or "an unknown operator",
        module=_OF_FILE.sub("", read_text(fields.get("_task_module")) or ""),
        callable=_OF_FILE.sub("", read_text(fields.get("python_callable_name")) or "") or None,
        rule=read_text(fields.get("trigger_rule", "all_success")) or "",
        downstream=tuple(read_names(fields.get("downstream_task_ids"))),
        retries=_read_count(fields, "retries", settings),
        retry_delay=_read_duration(fields, "retry_delay", settings) or 0.0,
        backoff=_read_backoff(fields.get("retry_exponential_backoff")),
        max_retry_delay=_read_duration(fields, "max_retry_delay", {}),
        timeout=_read_duration(fields, "execution_timeout", settings),
        is_setup=fields.get("is_setup") is True,
        is_teardown=is_teardown,
        fails_run=not is_teardown or fields.get("on_failure_fail_dagrun") is True,
        is_sensor=fields.get("_is_sensor") is True or _is_old_sensor(fields),
        is_empty=fields.get("_is_empty") is True,
        may_skip=fields.get("_can_skip_downstream") is True,
        expansion=read_expansion(given) if given.get("_is_mapped") is True else None,
        arguments=tuple(arguments),
        mentioned=find_names(fields),
        said={
            name: unwrap(each)
            for name, default in DEFAULTS.items()
            if (each := fields.get(name)) is not None and unwrap(each) not in (default, [], {})
        },
    )


def _is_old_sensor(fields: Fields) -> bool:
    """Return whether a task of a document of version 1 is a sensor, which waits as no other task does."""
    return any(each.endswith(".ReadyToRescheduleDep") for each in read_names(fields.get("deps")))


def _read_count(fields: Fields, name: str, settings: Fields) -> int:
    number = read_seconds(fields.get(name, settings.get(name, 0)))
    if number is None or number != int(number) or number > _MOST_RETRIES:
        raise UnreadableTaskError(
            f"has {name} = {write_value(name, fields.get(name))[:100]}, which is no number of them"
        )
    return int(number)


def _read_duration(fields: Fields, name: str, settings: Fields) -> float | None:
    default = settings.get(name, RETRY_DELAY if name == "retry_delay" else None)
    given = fields.get(name, default)
    if given is None:
        return None
    seconds = read_seconds(given)
    if seconds is None or seconds > _LONGEST:
        raise UnreadableTaskError(f"has {name} = {write_value(name, given)[:100]}, which is no duration")
    return seconds


def _read_backoff(value: JsonValue) -> float:
    """Return the factor: Airflow 2 says only whether there is one, which is 2 then."""
    if isinstance(value, bool):
        return 2.0 if value else 0.0
    return read_seconds(value) or 0.0
