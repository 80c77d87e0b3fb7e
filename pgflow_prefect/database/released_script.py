"""Writes a flow of the released pgflow as SQL: the calls of pgflow's own functions that make it."""

import json
from collections.abc import Iterator

from psycopg import sql
from pydantic import BaseModel, ConfigDict

from pgflow_prefect.definitions.graph import build_graph, sort_steps
from pgflow_prefect.definitions.model import WorkflowDefinition

HEADER = "-- The flow {name} of the released pgflow. Adds what is missing; again: changes nothing.\nBEGIN;\n"
FOOTER = "COMMIT;\n"
_OPTIONS = ("max_attempts", "base_delay", "timeout", "start_delay")


class TaskOptions(BaseModel):
    """How the tasks of a step are tried.

    Attributes:
        step_slug: the step; None for what holds for each step that says nothing else.
        max_attempts: attempts of a task.
        base_delay: seconds before the second attempt; each further pause is twice as long.
        timeout: seconds that an attempt may take.
        start_delay: seconds before the first attempt.
    """

    model_config = ConfigDict(frozen=True)

    step_slug: str | None
    max_attempts: int | None
    base_delay: int | None
    timeout: int | None
    start_delay: int | None


def write_flow_script(definition: WorkflowDefinition, options: list[TaskOptions]) -> str:
    """Return the SQL that makes a flow, in one transaction; the same text for the same definition and options."""
    own = {each.step_slug: each for each in options}
    flow = _quote(definition.slug)
    lines = [f"SELECT pgflow.create_flow({', '.join([flow, *_write_options(own.get(None))])});"]
    graph = build_graph(definition)
    for slug in sort_steps(graph):
        upstream = ", ".join(map(_quote, sorted(graph.predecessors(slug))))
        given = [flow, _quote(slug), f"ARRAY[{upstream}]::text[]"]
        given += [*_write_options(own.get(slug)), *_write_rules(definition, slug)]
        lines.append(f"SELECT pgflow.add_step({', '.join(given)});")
    body = "".join(f"{line}\n" for line in lines)
    return f"{HEADER.format(name=repr(definition.slug))}{body}{FOOTER}"


def _write_options(options: TaskOptions | None) -> Iterator[str]:
    for name in _OPTIONS:
        if options is not None and (value := getattr(options, name)) is not None:
            yield f"{name} => {value}"


def _write_rules(definition: WorkflowDefinition, slug: str) -> Iterator[str]:
    rules = definition.find_rules(slug)
    if rules.map is not None:
        yield "step_type => 'map'"
    if rules.only_if is not None:
        yield f"required_input_pattern => {_quote(json.dumps(rules.only_if, sort_keys=True))}"
    if rules.unless is not None:
        yield f"forbidden_input_pattern => {_quote(json.dumps(rules.unless, sort_keys=True))}"
    for name in ("when_unmet", "when_exhausted"):
        if name in rules.said:
            yield f"{name} => {_quote(str(rules.said[name]))}"


def _quote(text: str) -> str:
    return sql.Literal(text).as_string(None).lstrip()
