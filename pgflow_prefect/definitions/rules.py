"""What is wrong with the rules of a definition, and with the handlers that execute it."""

from collections.abc import Collection, Iterator, Mapping

from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.definitions.maps import find_source
from pgflow_prefect.definitions.model import StepRules, WhenUnmet, WorkflowDefinition, to_identifier


def find_rule_problems(definition: WorkflowDefinition, rules: Mapping[str, StepRules]) -> Iterator[str]:
    """Yield a sentence for each rule of the handlers' file that is not the database's, and for what contradicts itself.

    A file that says nothing of rules has no such problem: the database's are in force.
    """
    graph = build_graph(definition) if any(each.map is not None for each in rules.values()) else None
    known = set(definition.steps)
    for slug, said in rules.items():
        there = definition.find_rules(slug)
        if there.map is not None and graph is not None and slug in known:  # a file always says the source
            source = find_source(there.map, list(graph.predecessors(slug)))
            there = there.model_copy(update={"map": there.map.model_copy(update={"over": source})})
        if slug in known and _compare(said) != _compare(there):
            yield (
                f"the rules of step {slug!r} are others in the database: write them there with `pgflow-prefect push`, "
                "or take them out of the file"
            )
    if definition.when_failed == "stop":
        for slug in definition.steps:
            if definition.find_rules(slug).needs_to_go_on:
                yield (
                    f"step {slug!r} needs the run to go on after a failure, and when_failed='stop' ends it: take one "
                    "of them out"
                )


def _compare(rules: StepRules) -> dict[str, object]:
    """Return what decides whether a step is executed."""
    return {name: each for name, each in rules.said.items() if name not in {"fails_run", "is_setup"}}


def find_missing_defaults(definition: WorkflowDefinition, required: Mapping[str, Collection[str]]) -> Iterator[str]:
    """Yield a sentence for each argument without a default whose step may have no result.

    Args:
        definition: the workflow.
        required: for each handler, the names of its arguments that have no default.
    """
    graph = build_graph(definition)
    for slug, names in required.items():
        if slug not in graph:
            continue
        for upstream in graph.predecessors(slug):
            if to_identifier(upstream) in names and (why := find_lack(definition, slug, upstream)):
                yield (
                    f"the handler of step {slug!r} needs the result of {upstream!r}, and may run without it, for "
                    f"{why}: give that argument a default"
                )


def find_lack(definition: WorkflowDefinition, slug: str, upstream: str) -> str | None:
    """Return why a step may run without the result of another one, as far as the definition says; None: it does not."""
    rules, above = definition.find_rules(slug), definition.find_rules(upstream)
    if rules.may_lack_input:
        return f"its rule is {rules.rule}"
    if rules.rule is not None:
        return None
    has_condition = above.only_if is not None or above.unless is not None
    if has_condition and above.when_unmet is WhenUnmet.SKIP:
        return "that step is skipped where its condition is not met"
    if above.when_exhausted is WhenUnmet.SKIP:
        return "that step is skipped where it fails"
    return None
