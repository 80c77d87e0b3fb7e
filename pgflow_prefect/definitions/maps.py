"""What a map maps over, as its handler's file says it, and what is wrong with the maps of a workflow."""

from collections.abc import Collection, Iterator, Mapping

from pgflow_prefect.definitions.children import resolve_child
from pgflow_prefect.definitions.model import PAYLOAD, MapRules, StepRules, WorkflowDefinition, to_identifier
from pgflow_prefect.wording import suggest


def resolve_map(said: MapRules, steps: Collection[str]) -> MapRules:
    """Return what is said of a map with a slug and a path in the place of one text: `payload.rows`.

    Slugs may have dots. So the longest beginning counts that is a step, by its slug or by its name in Python.
    """
    if said.over is None or said.path or said.over in steps:
        return said
    slugs = {to_identifier(slug): slug for slug in steps} | {slug: slug for slug in steps}
    parts = said.over.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in slugs or name == PAYLOAD:
            return said.model_copy(update={"over": slugs.get(name, name), "path": tuple(parts[length:])})
    return said.model_copy(update={"over": parts[0], "path": tuple(parts[1:])})


def find_source(said: MapRules, upstream: Collection[str]) -> str:
    """Return what a map maps over: where nothing says it, the only step that it waits for, or else the payload."""
    return said.over or (next(iter(upstream)) if len(upstream) == 1 else PAYLOAD)


def resolve_rules(rules: Mapping[str, StepRules], steps: Collection[str]) -> dict[str, StepRules]:
    """Return the rules of a file's steps, with what their maps map over and what their children get resolved."""
    return {
        slug: each.model_copy(
            update={
                "map": None if each.map is None else resolve_map(each.map, steps),
                "child": None if each.child is None else resolve_child(each.child, steps, is_map=each.map is not None),
            }
        )
        for slug, each in rules.items()
    }


def find_sources(rules: Mapping[str, StepRules]) -> dict[str, str]:
    """Return the upstream step of each map that maps over one."""
    return {
        slug: each.map.over
        for slug, each in rules.items()
        if each.map is not None and each.map.over is not None and each.map.over != PAYLOAD
    }


def find_source_problems(sources: Mapping[str, str], steps: Collection[str]) -> Iterator[str]:
    """Yield a sentence for each map over something that is neither a step nor the payload."""
    for slug, source in sources.items():
        if source not in steps:
            yield (
                f"step {slug!r} maps over {source!r}, which is no step of this workflow, nor `payload`"
                f"{suggest(source, {*steps, PAYLOAD})}"
            )


def find_map_problems(definition: WorkflowDefinition, handlers: Mapping[str, bool]) -> Iterator[str]:
    """Yield a sentence for each handler that is one of a map where its step is none, and the other way round.

    Args:
        definition: the workflow.
        handlers: for each step with a handler in Python, whether that is one of a map.
    """
    maps, known = definition.maps, set(definition.steps)
    for slug, is_map in handlers.items():
        if slug in known and is_map and slug not in maps:
            yield (
                f"the handler of step {slug!r} is one of a map, and the step is none in the database: write it there "
                "with `pgflow-prefect push`"
            )
        elif slug in maps and not is_map:
            yield (
                f"step {slug!r} is a map in the database, and its handler is not: decorate it with "
                f"@workflow.map(over={maps[slug].over!r}), and let it take `item`"
            )
