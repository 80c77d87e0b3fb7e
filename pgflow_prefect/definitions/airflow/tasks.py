"""A task of a serialized DAG: what Airflow's scheduler knows of it, without secrets and without defaults."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from pgflow_prefect.definitions.airflow.values import (
    DEEPEST,
    Fields,
    find_block,
    list_texts,
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

MOST_ARGUMENTS = 60
"""Arguments of a task that are written out."""

DEFAULTS: Mapping[str, JsonValue] = {
    "pool": "default_pool",
    "pool_slots": 1,
    "priority_weight": 1,
    "weight_rule": "downstream",
    "queue": "default",
    "depends_on_past": False,
    "depends_on_previous_tasks": None,
    "wait_for_downstream": False,
    "wait_for_past_depends_before_skipping": False,
    "executor": None,
    "executor_config": {},
    "do_xcom_push": True,
    "multiple_outputs": False,
    "email": None,
    "sla": None,
    "inlets": [],
    "outlets": [],
    "run_as_user": None,
    "max_active_tis_per_dag": None,
    "max_active_tis_per_dagrun": None,
    "start_date": None,
    "end_date": None,
    "params": [],
    "resources": None,
    "start_from_trigger": False,
    "map_index_template": None,
    "has_retry_policy": False,
    "has_on_execute_callback": False,
    "has_on_failure_callback": False,
    "has_on_success_callback": False,
    "has_on_retry_callback": False,
    "has_on_skipped_callback": False,
}
"""What a task may say beside its work, and what it means where it does not."""

_READ = frozenset(
    {
        "task_id",
        "task_type",
        "_task_module",
        "_operator_name",
        "trigger_rule",
        "downstream_task_ids",
        "retries",
        "retry_delay",
        "retry_exponential_backoff",
        "max_retry_delay",
        "execution_timeout",
        "is_setup",
        "is_teardown",
        "on_failure_fail_dagrun",
        "_is_mapped",
        "_is_sensor",
        "_is_empty",
        "_can_skip_downstream",
        "partial_kwargs",
        "expand_input",
        "op_kwargs_expand_input",
        "_expand_input_attr",
        "template_fields",
        "template_ext",
        "python_callable_name",
    }
)
_SHOWN_BY_AIRFLOW = frozenset(
    {
        "allow_nested_operators",
        "deps",
        "doc",
        "doc_json",
        "doc_md",
        "doc_rst",
        "doc_yaml",
        "email_on_failure",
        "email_on_retry",
        "is_mapped",
        "label",
        "operator_class",
        "operator_extra_links",
        "owner",
        "ignore_first_depends_on_past",
        "render_template_as_native_obj",
        "start_trigger_args",
        "task_display_name",
        "template_fields_renderers",
        "ui_color",
        "ui_fgcolor",
        "_disallow_kwargs_override",
        "_is_dummy",
        "_log_config_logger_name",
        "_logger_name",
        "_needs_expansion",
        "_operator_extra_links",
        "_task_display_name",
    }
)
"""What concerns Airflow's pages and processes only, and is no part of a task's work."""

_DATA_FLOW = re.compile(
    r"\{\{\s*(?:task_instance|ti)\.xcom_pull\(task_ids='(?P<task>[^']+)'(?:, dag_id='[^']*')?"
    r"(?:, key='(?P<key>[^']*)')?\)\s*\}\}"
)
"""How Airflow writes the result of a task that another one takes as an argument."""

_TEMPLATE = re.compile(r"\{\{|\{%")
_OF_FILE = re.compile(r"\bunusual_prefix_[0-9a-f]{40}_")
"""What Airflow puts before the name of a module that is a DAG file: a hash of its path."""
_NAMES = {
    "variables": re.compile(r"\bvar\.(?:value|json)\.(?:get\(\s*['\"])?(\w[\w.-]*?)\b(?=\W|$)"),
    "connections": re.compile(r"\bconn\.(?:get\(\s*['\"])?(\w+)"),
    "dates": re.compile(
        r"\b(ds(?:_nodash)?|ts(?:_nodash(?:_with_tz)?)?|logical_date|execution_date|data_interval_(?:start|end)|"
        r"(?:yesterday|tomorrow|prev|next)_ds(?:_nodash)?|(?:prev|next)_execution_date|prev_data_interval_\w+|"
        r"prev_start_date_success)\b"
    ),
    "params": re.compile(r"\b(?:params|dag_run\.conf)(?:\.get\(\s*['\"]|\.|\[\s*['\"])(\w+)"),
}
_RENDERED = re.compile(r"\{\{.{0,500}?\}\}|\{%.{0,500}?%\}", re.DOTALL)
_PULL = re.compile(r"xcom_pull\((?P<arguments>[^)]{0,500})\)")
_KEY = re.compile(r"\bkey\s*=\s*['\"](?P<key>[^'\"]+)['\"]")
_CONNECTION = re.compile(r"(?:^|_)conn_id$")


@dataclass(frozen=True)
class Argument:
    """An argument of a task as text, without secrets.

    Attributes:
        name: as the operator calls it.
        text: its value as Python source.
        lines: those of a text of several lines; empty for anything else.
        is_template: Airflow renders it when the task runs.
        file: the file that has its text, where it names one.
    """

    name: str
    text: str
    lines: tuple[str, ...] = ()
    is_template: bool = False
    file: str | None = None


@dataclass(frozen=True)
class Mentioned:
    """The names that a task's arguments mention, sorted.

    Attributes:
        variables: Airflow's Variables.
        connections: Airflow's connections.
        dates: Airflow's names of dates of the run.
        params: parameters of the run.
        keys: keys of XComs beside the return value.
    """

    variables: tuple[str, ...] = ()
    connections: tuple[str, ...] = ()
    dates: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expansion:
    """What a mapped task is expanded over.

    Attributes:
        arguments: the arguments that get one element each; empty where one list gives them all.
        sources: the tasks whose results are the lists, by argument; a literal list has none.
        is_plain: one list only: no product of several, no list of objects, no `map`, `zip`, `filter` or `concat`.
        text: as it is written, without secrets.
        literal: the list itself, where it stands in the DAG.
    """

    arguments: tuple[str, ...]
    sources: Mapping[str, str]
    is_plain: bool
    text: str
    literal: JsonValue = None

    @property
    def source(self) -> str | None:
        """The task whose whole result is the only list; None where there is no such task."""
        return next(iter(self.sources.values())) if self.is_plain and len(self.sources) == 1 else None


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
    mentioned: Mentioned = Mentioned()
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
    arguments = list(_list_arguments(fields))[:MOST_ARGUMENTS]
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
        expansion=_read_expansion(given) if given.get("_is_mapped") is True else None,
        arguments=tuple(arguments),
        mentioned=_find_names(fields),
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


def _list_arguments(fields: Fields) -> Iterator[Argument]:
    """Yield the arguments of the operator: its templates, and what else its class has written into the document."""
    templates = read_names(fields.get("template_fields"))
    endings = tuple(read_names(fields.get("template_ext")))
    others = [name for name in fields if name not in {*templates, *_READ, *_SHOWN_BY_AIRFLOW, *DEFAULTS}]
    for name in dict.fromkeys([*templates, *others]):
        value = fields.get(name)
        if value is None or unwrap(value) in ("", [], {}):
            continue
        text = read_text(value)
        is_file = name in templates and bool(endings) and text is not None and text.strip().endswith(endings)
        yield Argument(
            name=name[:200],
            text=write_value(name, _name_sources(value)),
            lines=tuple(find_block(name, value) or ()),
            is_template=name in templates and any(_is_template(each) for each in list_texts(value)),
            file=write_value(name, value) if is_file else None,
        )


def _is_template(text: str) -> bool:
    """Return whether a text is a template beside the results of other tasks, which Airflow passes as templates."""
    return _TEMPLATE.search(_DATA_FLOW.sub("", text)) is not None


def _name_sources(value: JsonValue, depth: int = 0) -> JsonValue:
    """Return a value in which the results of other tasks are what they are, not the templates that Airflow makes."""
    if depth > DEEPEST:
        return value
    if isinstance(value, str):
        found = _DATA_FLOW.fullmatch(value)
        if found is None:
            return value
        return {"__type": "xcomref", "__var": {"task_id": found["task"], "key": found["key"] or "return_value"}}
    if isinstance(value, list):
        return [_name_sources(each, depth + 1) for each in value]
    if isinstance(value, dict):
        return {key: _name_sources(each, depth + 1) for key, each in value.items()}
    return value


def _find_names(fields: Fields) -> Mentioned:
    names = [*read_names(fields.get("template_fields")), *(each for each in fields if _CONNECTION.search(each))]
    texts = [text[:100_000] for name in dict.fromkeys(names) for text in list_texts(fields.get(name))]
    found = {kind: {name for text in texts for name in pattern.findall(text)} for kind, pattern in _NAMES.items()}
    found["connections"] -= {"get"}
    rendered = [part for text in texts for part in _RENDERED.findall(text)]
    found["dates"] = {name for part in rendered for name in _NAMES["dates"].findall(part)}
    found["connections"] |= {
        each for name in names if _CONNECTION.search(name) and (each := read_text(fields.get(name))) and "{" not in each
    }
    keys = {
        key["key"] for text in texts for pull in _PULL.finditer(text) if (key := _KEY.search(pull["arguments"]))
    } - {"return_value"}
    return Mentioned(**{kind: tuple(sorted(each)) for kind, each in found.items()}, keys=tuple(sorted(keys)))


def _read_expansion(fields: Fields) -> Expansion:
    name = read_text(fields.get("_expand_input_attr")) or "expand_input"
    given = unwrap(fields.get(name))
    kind = read_text(given.get("type")) if isinstance(given, dict) else None
    value = unwrap(given.get("value")) if isinstance(given, dict) else None
    text = write_value("", value)
    if kind != "dict-of-lists" or not isinstance(value, dict):
        return Expansion((), {}, is_plain=False, text=text)
    sources = {argument: source for argument, each in value.items() if (source := _find_source(each)) is not None}
    literal = unwrap(next(iter(value.values()))) if len(value) == 1 and not sources else None
    is_plain = len(value) == 1 and (bool(sources) or isinstance(literal, list))
    return Expansion(tuple(value), sources, is_plain, text, literal if is_plain else None)


def _find_source(value: JsonValue) -> str | None:
    """Return the task whose whole result a list is."""
    reference = value.get("__var") if isinstance(value, dict) and value.get("__type") == "xcomref" else None
    if not isinstance(reference, dict) or reference.get("type") not in {None, "simple"}:
        return None
    if reference.get("key") not in {None, "return_value"}:
        return None
    return read_text(reference.get("task_id"))
