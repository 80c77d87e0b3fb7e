"""Makes the schema of a deployment's parameters, for the form of Prefect's UI and the checks of its API."""

import inspect
import json
from collections.abc import Mapping
from functools import cache
from typing import Any
from uuid import UUID

from pydantic_core import to_json

from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.prefect_api.ids import SCHEDULE_ID
from pgflow_prefect.prefect_api.internals import ParameterSchema, generate_parameter_schema
from pgflow_prefect.workflow import Workflow

Schema = Mapping[str, Any]

_REFERENCE = "#/definitions/"

_SCHEDULE_ID = "Leave it empty. Schedules of `pgflow-prefect deploy` name the row with their payload here."

_RUN_ID = "The id of a run that exists, to go on with it. Leave it empty to start a new run with the payload."


def make_parameter_schema(workflow: Workflow, definition: WorkflowDefinition) -> dict[str, Any]:
    """Return the JSON schema of a workflow's parameters: `payload`, as its root steps annotate it, and two ids.

    If several roots annotate the payload differently with objects, it has to fit all of them. If no root annotates it,
    or if the annotations contradict each other, any JSON value fits, and the handlers check it.

    Raises:
        UsageError: an annotation names something that is not defined.
    """
    annotations = _find_annotations(workflow, definition)
    made = _generate(annotations) if annotations else _generate_any()
    payloads = [each for name, each in made["properties"].items() if name.startswith("payload")]
    if (payload := _combine(payloads, made)) is None:
        made = _generate_any()
        payload = made["properties"]["payload"]
    run_id = {**made["properties"]["run_id"], "position": 1, "description": _RUN_ID}
    schedule_id = {**made["properties"][SCHEDULE_ID], "position": 2, "description": _SCHEDULE_ID}
    schema = {**made, "properties": {"payload": payload, "run_id": run_id, SCHEDULE_ID: schedule_id}}
    # In the form that the API returns: lists, and no tuples.
    return dict(json.loads(to_json(schema)))


def describe_payload(schema: Schema | None) -> str:
    """Return a parameter schema's payload in a few words."""
    payload = (schema or {}).get("properties", {}).get("payload", {})
    return _describe(payload, schema or {})


def _find_annotations(workflow: Workflow, definition: WorkflowDefinition) -> list[Any]:
    """Return the annotations of the payload in the handlers of the root steps, each once."""
    waiting = {dep.downstream for dep in definition.deps}
    found: list[Any] = []
    for slug in sorted(set(definition.steps) - waiting):
        handler = workflow.handlers.get(slug)
        if handler is None or not handler.wants_payload:
            continue
        hints = handler.hints
        if "payload" in hints and hints["payload"] not in found:
            found.append(hints["payload"])
    return found


def _generate(annotations: list[Any]) -> dict[str, Any]:
    """Return Prefect's own schema of a flow with such payloads; one schema, because they may share names."""
    names = ["payload", *(f"payload_{number}" for number in range(1, len(annotations)))]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in [
            *zip(names, annotations, strict=True),
            *((name, UUID | None) for name in ("run_id", SCHEDULE_ID)),
        ]
    ]
    schema: ParameterSchema = generate_parameter_schema(inspect.Signature(parameters), {})
    return schema.model_dump(exclude_unset=True)


@cache
def _generate_any() -> dict[str, Any]:
    """Return the schema for any payload, which most workflows use; cached, because pydantic is slow to make it."""
    return _generate([Any])


def _combine(payloads: list[dict[str, Any]], schema: Schema) -> dict[str, Any] | None:
    """Return one schema for a value that fits all of these; None if they allow anything, or contradict each other."""
    rules = [{name: each[name] for name in each if name not in {"default", "position", "title"}} for each in payloads]
    telling = [rule for rule in rules if not _says_nothing(rule, schema)]
    distinct = [rule for place, rule in enumerate(telling) if rule not in telling[:place]]
    shown = {"position": 0, "title": "payload"}
    if len(distinct) == 1:
        return {**distinct[0], **shown}  # no default: none would not fit
    if distinct and all(_resolve(rule, schema).get("type") == "object" for rule in distinct):
        return {"allOf": distinct, **shown}
    return None


def _says_nothing(rule: Schema, schema: Schema, seen: frozenset[str] = frozenset()) -> bool:
    """Tell whether an annotation allows any value: `Any`, `JsonValue` (as `import` writes it), a `dict` of these."""
    reference = str(rule.get("$ref", ""))
    if reference in seen:
        return False  # a type within itself: it says that it is nested
    resolved = _resolve(rule, schema)
    if {*resolved} == {"type", "additionalProperties"} and resolved["type"] == "object":
        values = resolved["additionalProperties"]
        return values is True or (values is not False and _says_nothing(values, schema, seen | {reference} - {""}))
    return not resolved


def _resolve(rule: Schema, schema: Schema) -> Schema:
    name = str(rule.get("$ref", "")).removeprefix(_REFERENCE)
    found: Schema = schema.get("definitions", {}).get(name, rule)
    return found


def _describe(rule: Schema, schema: Schema) -> str:
    for word, between in (("allOf", " and "), ("anyOf", " or ")):
        if word in rule:
            return between.join(_describe(each, schema) for each in rule[word])
    name = str(rule.get("$ref", "")).removeprefix(_REFERENCE)
    resolved = _resolve(rule, schema)
    if fields := resolved.get("properties"):
        return f"{name or 'object'} ({', '.join(fields)})"
    return name or str(resolved.get("type", "any JSON"))
