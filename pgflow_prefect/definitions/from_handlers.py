"""Derives a definition from a workflow's handlers: an argument that names another step is a dependency."""

import unicodedata
from collections.abc import Collection, Iterator, Mapping

from pgflow_prefect.definitions.graph import find_problems
from pgflow_prefect.definitions.maps import find_source_problems
from pgflow_prefect.definitions.model import RESERVED_NAMES, Dep, WorkflowDefinition, to_identifier
from pgflow_prefect.errors import InvalidDefinitionError
from pgflow_prefect.wording import suggest_each

Names = Mapping[str, Collection[str]]
"""Names by each step's slug."""


def derive_definition(
    workflow_slug: str,
    steps: Collection[str],
    arguments: Names,
    after: Names,
    optional: Names | None = None,
    *,
    sources: Mapping[str, str] | None = None,
) -> WorkflowDefinition:
    """Return the definition of handlers: a step waits for the steps that its handler's arguments name.

    Args:
        workflow_slug: the workflow.
        steps: the slugs of all its steps.
        arguments: the names of each handler's arguments.
        after: the slugs of further steps that a step waits for.
        optional: the arguments with a default, which may name no step.
        sources: the steps that maps map over, and wait for.

    Returns:
        The definition, its steps in the order given, its deps in the order of the steps that wait.

    Raises:
        InvalidDefinitionError: with all problems: an argument or an `after` that names no step, slugs
            that collide or that PostgreSQL can't store, cycles, no steps at all.
    """
    slugs = {to_identifier(slug): slug for slug in steps}
    known = set(steps)
    deps: dict[Dep, None] = {}
    for slug in steps:
        named = [slugs[name] for name in arguments.get(slug, ()) if name in slugs]
        named += [upstream for upstream in after.get(slug, ()) if upstream in known]
        if sources and sources.get(slug) in known:
            named.append(sources[slug])
        deps |= dict.fromkeys(Dep(upstream, slug) for upstream in named)
    definition = WorkflowDefinition(slug=workflow_slug, steps=tuple(steps), deps=tuple(deps))
    problems = [
        *find_unstorable(workflow_slug, steps),
        *_find_unknown_arguments(arguments, slugs, optional or {}),
        *_find_unknown_upstream(after, known),
        *find_source_problems(sources or {}, known),
        *_find_joins_of_nothing(definition, arguments),
        *(find_problems(definition) if steps else ["it has no steps: decorate a function with @workflow.step"]),
    ]
    if problems:
        raise InvalidDefinitionError(workflow_slug, problems)
    return definition


def find_missing_deps(definition: WorkflowDefinition, after: Names) -> Iterator[str]:
    """Yield a sentence for each dep of an `after` that the database does not have."""
    steps, deps = set(definition.steps), set(definition.deps)
    for slug, upstream in after.items():
        for each in upstream:
            if slug in steps and Dep(each, slug) not in deps:
                yield (
                    f"step {slug!r} is to come after {each!r}, which is no upstream step of it in the database: "
                    "write it there with `pgflow-prefect push`, or take it out of `after`"
                )


def find_unstorable(workflow_slug: str, steps: Collection[str]) -> Iterator[str]:
    """Yield a sentence for each slug that PostgreSQL can't store, or that a terminal would obey."""
    for slug in [workflow_slug, *steps]:
        if "\0" in slug or any("\ud800" <= character <= "\udfff" for character in slug):
            yield f"the slug {slug!r} has a character that PostgreSQL can't store: rename it"
        elif any(unicodedata.category(character) == "Cc" for character in slug):
            yield f"the slug {slug!r} has a control character: rename it"


def _find_unknown_arguments(arguments: Names, slugs: Mapping[str, str], optional: Names) -> Iterator[str]:
    unknown = [
        (slug, name)
        for slug, names in arguments.items()
        for name in names
        if name not in slugs and name not in RESERVED_NAMES and name not in optional.get(slug, ())
    ]
    suggestions = suggest_each((name for _, name in unknown), slugs.keys() | RESERVED_NAMES)
    for (slug, name), (_, suggestion) in zip(unknown, suggestions, strict=True):
        yield f"the handler of step {slug!r} takes {name!r}, which is no step of this workflow{suggestion}"


def _find_unknown_upstream(after: Names, known: Collection[str]) -> Iterator[str]:
    unknown = [(slug, each) for slug, upstream in after.items() for each in upstream if each not in known]
    for (slug, each), (_, suggestion) in zip(unknown, suggest_each((each for _, each in unknown), known), strict=True):
        yield f"step {slug!r} is to come after {each!r}, which is no step of this workflow{suggestion}"


def _find_joins_of_nothing(definition: WorkflowDefinition, arguments: Names) -> Iterator[str]:
    waiting = {dep.downstream for dep in definition.deps}
    for slug, names in arguments.items():
        if "upstream" in names and slug not in waiting:
            yield (
                f"the handler of step {slug!r} takes the results of all its upstream steps, and nothing says which "
                "these are: name them, @workflow.step(after=[…])"
            )
