"""What a step that is a run of another workflow gives that run, and what is wrong with such steps."""

from collections.abc import Collection, Iterator

from pgflow_prefect.definitions.model import PAYLOAD, ChildRules, WorkflowDefinition, to_identifier
from pgflow_prefect.wording import suggest

ITEM = "item"
"""The key of an item in the input of a map."""


def resolve_child(said: ChildRules, steps: Collection[str], *, is_map: bool) -> ChildRules:
    """Return what is said of a child with a path in the place of one text: `look.order`.

    Slugs may have dots. So the longest beginning counts that is a step, by its slug or by its name in Python. The
    path's first part is a key of the input as SQL functions get it.
    """
    if said.payload is None or len(said.payload) != 1:
        return said
    keys = {PAYLOAD: PAYLOAD, **({ITEM: ITEM} if is_map else {})}
    for slug in steps:
        key = f"{slug}_" if slug in keys else slug
        keys |= {to_identifier(slug): key, key: key}
    parts = said.payload[0].split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in keys:
            return said.model_copy(update={"payload": (keys[name], *parts[length:])})
    return said.model_copy(update={"payload": tuple(parts)})


def sort_by_children(definitions: Collection[WorkflowDefinition]) -> list[WorkflowDefinition]:
    """Return definitions, each after those of its children; otherwise in their order. A cycle is left to PostgreSQL."""
    known = {each.slug: each for each in definitions}
    placed: dict[str, WorkflowDefinition] = {}
    begun: set[str] = set()
    for first in definitions:
        path = [first.slug]
        while path:
            slug = path[-1]
            below = [each.workflow for each in known[slug].children.values() if each.workflow in known]
            begun.add(slug)
            if following := next((each for each in below if each not in begun), None):
                path.append(following)
            else:
                placed.setdefault(path.pop(), known[slug])
    return [*placed.values()]


def find_child_problems(
    definition: WorkflowDefinition, known: Collection[str], handlers: Collection[str]
) -> Iterator[str]:
    """Yield a sentence for each step that is a run of a workflow and can't be one.

    Args:
        definition: the workflow.
        known: the slugs of the workflows in the database.
        handlers: the steps that the file has functions for.
    """
    upstream: dict[str, set[str]] = {slug: set() for slug in definition.steps}
    for dep in definition.deps:
        upstream[dep.downstream].add(dep.upstream)
    for slug, child in definition.children.items():
        if child.workflow not in known:
            yield (
                f"step {slug!r} is a run of workflow {child.workflow!r}, which the database does not have"
                f"{suggest(child.workflow, known)}: push that workflow first"
            )
        if slug in handlers:
            yield (
                f"step {slug!r} is a run of workflow {child.workflow!r}, and its function here is never executed: "
                "remove it"
            )
        is_map = definition.find_rules(slug).map is not None
        keys = {PAYLOAD, *([ITEM] if is_map else []), *(_find_key(each, is_map=is_map) for each in upstream[slug])}
        if child.payload is not None and child.payload[0] not in keys:
            yield (
                f"step {slug!r} takes the payload of its run from {child.payload[0]!r}, which is not in its input"
                f"{suggest(child.payload[0], keys)}: name a step that it waits for, or `payload`"
            )


def _find_key(slug: str, *, is_map: bool) -> str:
    return f"{slug}_" if slug == PAYLOAD or (is_map and slug == ITEM) else slug
