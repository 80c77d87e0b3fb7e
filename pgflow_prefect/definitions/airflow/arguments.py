"""The arguments of a task as text, without secrets, and the names that they mention."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from pgflow_prefect.definitions.airflow.values import (
    DEEPEST,
    Fields,
    find_block,
    list_texts,
    read_names,
    read_text,
    unwrap,
    write_value,
)

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

_CUT = "[core]max_templated_field_length"
"""In the text that Airflow writes before the beginning of a long argument."""

_OBJECT = re.compile(
    r"<callable [^<>]+>|<[\w.]+ object(?: at 0x[0-9a-f]+)?>|<function [^<>]+>|XComArg\(<|MappedArgument\("
)
"""How Airflow writes an object that is no JSON."""

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
        is_cut: Airflow has kept only its beginning.
        is_object: the document has the name of an object in the place of what it is.
    """

    name: str
    text: str
    lines: tuple[str, ...] = ()
    is_template: bool = False
    file: str | None = None
    is_cut: bool = False
    is_object: bool = False


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


NO_NAMES = Mentioned()


def list_arguments(fields: Fields) -> Iterator[Argument]:
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
            is_cut=any(_CUT in each for each in list_texts(value)),
            is_object=any(_OBJECT.search(each) for each in list_texts(value)),
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


def find_names(fields: Fields) -> Mentioned:
    """Return the names that the arguments of a task mention."""
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
