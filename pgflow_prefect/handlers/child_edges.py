"""Compares what a step gives the run that it is, and what that run gives back, with the annotations on both sides."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pgflow_prefect.definitions.children import ITEM
from pgflow_prefect.definitions.maps import find_source
from pgflow_prefect.definitions.model import PAYLOAD, ChildRules, WorkflowDefinition, to_identifier
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.edges import describe_annotation
from pgflow_prefect.handlers.json_shapes import Shape, find_misfit, make_array, make_object, make_shape
from pgflow_prefect.handlers.python import PythonHandler


@dataclass(frozen=True)
class KnownWorkflow:
    """A workflow with the Python functions of its steps; steps of other kinds are not checked.

    Attributes:
        definition: the workflow.
        handlers: the functions, by step slug.
    """

    definition: WorkflowDefinition
    handlers: Mapping[str, PythonHandler]

    def find_result(self, slug: str) -> Shape | None:
        """Return the shape of a step's result; None if its annotation is not known."""
        hints = _read_hints(self.handlers.get(slug))
        if "return" not in hints:
            return None
        shape = make_shape(hints["return"], "serialization")
        return make_array(shape) if slug in self.definition.maps else shape

    def find_leaves(self) -> Shape:
        """Return the shape of the result of a run: an object with those of its last steps."""
        above = {dep.upstream for dep in self.definition.deps}
        leaves = [slug for slug in self.definition.steps if slug not in above]
        return make_object({slug: self.find_result(slug) or Shape({}) for slug in leaves})


def find_child_type_problems(parent: KnownWorkflow, children: Mapping[str, KnownWorkflow]) -> Iterator[str]:
    """Yield a sentence for each annotation that contradicts one on the other side of a step that is a run.

    Args:
        parent: the workflow with such steps.
        children: the workflows that they are runs of, by slug; those that are not here are not checked.
    """
    for slug, said in parent.definition.children.items():
        if (child := children.get(said.workflow)) is not None:
            yield from _compare_payload(parent, slug, said, child)
            yield from _compare_result(parent, slug, child)


def _compare_payload(parent: KnownWorkflow, slug: str, said: ChildRules, child: KnownWorkflow) -> Iterator[str]:
    given = _find_given(parent, slug, said)
    for step, handler in child.handlers.items():
        hints = _read_hints(handler)
        if PAYLOAD not in hints:
            continue
        if why := find_misfit(given, make_shape(hints[PAYLOAD], "validation")):
            taken = describe_annotation(hints[PAYLOAD], handler)
            what = "all of its input" if said.payload is None else ".".join(said.payload)
            yield (
                f"step {slug!r} gives {what} to a run of workflow {said.workflow!r}, whose step {step!r} takes "
                f"'payload' as {taken}, which that can't be: {why}"
            )


def _compare_result(parent: KnownWorkflow, slug: str, child: KnownWorkflow) -> Iterator[str]:
    result = child.find_leaves()
    if slug in parent.definition.maps:
        result = make_array(result)
    for dep in parent.definition.deps:
        handler = parent.handlers.get(dep.downstream)
        name = to_identifier(slug)
        hints = _read_hints(handler)
        if dep.upstream != slug or handler is None or name not in hints:
            continue
        if why := find_misfit(result, make_shape(hints[name], "validation")):
            taken = describe_annotation(hints[name], handler)
            yield (
                f"the handler of step {dep.downstream!r} takes {name!r} as {taken}, which the results of a run of "
                f"workflow {child.definition.slug!r} can't be: {why}"
            )


def _find_given(parent: KnownWorkflow, slug: str, said: ChildRules) -> Shape:
    """Return the shape of the payload of a child; any JSON where that is not known."""
    definition = parent.definition
    upstream = [dep.upstream for dep in definition.deps if dep.downstream == slug]
    keys: dict[str, Shape] = {PAYLOAD: Shape({})}
    rules = definition.find_rules(slug)
    source = None if rules.map is None else find_source(rules.map, upstream)
    for each in upstream:
        if each != source:
            keys[f"{each}_" if each in (PAYLOAD, *([ITEM] if rules.map else [])) else each] = _or_any(parent, each)
    if rules.map is not None:
        whole = _follow(_or_any(parent, source), rules.map.path) if source is not None else Shape({})
        array = whole.resolve()
        keys[ITEM] = array.pick(array.schema.get("items")) if array.schema.get("type") == "array" else Shape({})
    if said.payload is None:
        return make_object(keys)
    return _follow(keys.get(said.payload[0], Shape({})), said.payload[1:])


def _or_any(known: KnownWorkflow, slug: str) -> Shape:
    return known.find_result(slug) or Shape({})


def _follow(shape: Shape, path: tuple[str, ...]) -> Shape:
    """Return the shape of a member, as far as the schema says it."""
    for part in path:
        found = shape.resolve()
        shape = found.pick(found.schema.get("properties", {}).get(part))
    return shape


def _read_hints(handler: PythonHandler | None) -> Mapping[str, Any]:
    """Return the annotations of a handler; none if one is invalid, which another check reports."""
    try:
        return handler.hints if handler is not None else {}
    except UsageError:
        return {}
