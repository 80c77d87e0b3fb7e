"""Compares the results of handlers with the arguments of later ones, before anything runs."""

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from pgflow_prefect.definitions.model import PAYLOAD, Dep, MapRules, to_identifier
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.json_shapes import Shape, find_misfit, make_array, make_object, make_shape
from pgflow_prefect.handlers.python import ITEM, PythonHandler

_NO_MAPS: Mapping[str, MapRules] = {}


def find_type_problems(
    handlers: Mapping[str, PythonHandler], deps: Collection[Dep], maps: Mapping[str, MapRules] = _NO_MAPS
) -> Iterator[str]:
    """Yield a sentence for each result whose annotation contradicts that of the argument that takes it.

    Args:
        handlers: the Python functions by step slug. Steps of other kinds are not checked.
        deps: of the workflow.
        maps: the steps that are maps: their result is an array of what their handler returns.
    """
    hints = {slug: found for slug, handler in handlers.items() if (found := _read_hints(handler)) is not None}
    shapes = {slug: make_shape(each["return"], "serialization") for slug, each in hints.items() if "return" in each}
    results = {slug: make_array(shape) if slug in maps else shape for slug, shape in shapes.items()}
    upstream: dict[str, list[str]] = {}
    for dep in deps:
        upstream.setdefault(dep.downstream, []).append(dep.upstream)
    for slug, known in upstream.items():
        for name, annotation in hints.get(slug, {}).items():
            if name == "upstream":
                returned = "results of its upstream steps"
                produced = make_object({each: results.get(each, Shape({})) for each in known})
            else:
                source = next((each for each in known if to_identifier(each) == name and each in results), None)
                if source is None:
                    continue
                produced = results[source]
                annotated = describe_annotation(hints[source]["return"], handlers[source])
                returned = f"{annotated} that step {source!r} returns"
                if source in maps:
                    returned = f"list[{annotated}] that map {source!r} returns"
            if why := find_misfit(produced, make_shape(annotation, "validation")):
                taken = describe_annotation(annotation, handlers[slug])
                yield f"the handler of step {slug!r} takes {name!r} as {taken}, which the {returned} can't be: {why}"

    for slug, said in maps.items():
        if slug in handlers and (problem := _find_item_problem(handlers[slug], hints.get(slug, {}), said, results)):
            yield problem


def _find_item_problem(
    handler: PythonHandler, hints: Mapping[str, Any], said: MapRules, results: Mapping[str, Shape]
) -> str | None:
    """Return why no element of what a map maps over can be its item; None if it may be one."""
    if ITEM not in hints or said.over is None or said.over == PAYLOAD or said.path or said.over not in results:
        return None
    array = results[said.over].resolve()
    why = f"it is no list, but {array.schema['type']}" if array.type not in (None, "array") else None
    if why is None and array.type == "array":
        why = find_misfit(array.pick(array.schema.get("items")), make_shape(hints[ITEM], "validation"))
    if why is None:
        return None
    taken = describe_annotation(hints[ITEM], handler)
    return (
        f"the handler of map {handler.step_slug!r} takes 'item' as {taken}, which an element of what step "
        f"{said.over!r} returns can't be: {why}"
    )


def _read_hints(handler: PythonHandler) -> Mapping[str, Any] | None:
    """Return the annotations of a handler, or None if one is invalid. Another check reports that."""
    try:
        return handler.hints
    except UsageError:
        return None


def describe_annotation(hint: Any, handler: PythonHandler) -> str:  # noqa: ANN401  any annotation
    """Return an annotation as its file has it, or nearly so."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    module = getattr(handler.function, "__module__", None)
    text = "None" if hint is type(None) else inspect.formatannotation(hint, base_module=module)
    return text.replace(f"{module}.", "").replace("pydantic.types.", "") if module else text
