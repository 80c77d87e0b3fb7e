"""A workflow's definition as a directed acyclic graph: order, layers, critical path, and problems."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import JsonValue

from pgflow_prefect.definitions.model import RESERVED_NAMES, StepRules, WorkflowDefinition, to_identifier
from pgflow_prefect.wording import suggest, suggest_each

# Only functions that use networkx import it: the import takes as long as all others of a command that only reads.
if TYPE_CHECKING:
    import networkx as nx

CYCLES_SHOWN = 20
"""The most cycles that are named: n steps can have more than 2**n cycles."""


Graph: TypeAlias = "nx.DiGraph[str]"

_DRAWN = frozenset({"rule", "only_if", "unless", "when_unmet", "when_exhausted"})


def build_graph(definition: WorkflowDefinition) -> Graph:
    """Return the definition as a graph: a node for each step's slug, an edge from each upstream step downwards.

    A node has the rules of its step by their names, a map has `map_over`, and a run of another workflow has `child`.
    """
    import networkx as nx  # noqa: PLC0415

    graph: Graph = nx.DiGraph(slug=definition.slug)
    graph.add_nodes_from(definition.steps)
    graph.add_edges_from(definition.deps)
    for slug, rules in definition.rules.items():
        if slug in graph:
            graph.nodes[slug].update(_list_drawn(rules, sorted(graph.predecessors(slug))))
    return graph


def _list_drawn(rules: StepRules, upstream: Sequence[str]) -> dict[str, JsonValue]:
    """Return the rules of a step that pictures show, by their names."""
    drawn = {name: each for name, each in rules.said.items() if name in _DRAWN}
    if rules.map is not None:
        drawn["map_over"] = rules.map.over or next(iter(upstream), "payload")
    if rules.child is not None:
        drawn["child"] = rules.child.workflow
    return drawn


def sort_steps(graph: Graph) -> list[str]:
    """Return the slugs, each after its upstream steps; otherwise in alphabetical order."""
    import networkx as nx  # noqa: PLC0415

    return list(nx.lexicographical_topological_sort(graph))


def order_steps(definition: WorkflowDefinition) -> list[str]:
    """Return a workflow's slugs as `sort_steps` does; in alphabetical order if its steps have a cycle."""
    import networkx as nx  # noqa: PLC0415

    graph = build_graph(definition)
    known = set(definition.steps)  # a dependency may name another
    return (
        [slug for slug in sort_steps(graph) if slug in known] if nx.is_directed_acyclic_graph(graph) else sorted(known)
    )


def find_layers(graph: Graph) -> list[list[str]]:
    """Return the slugs by depth: the roots, then steps that wait for roots only, and so on; each alphabetically."""
    import networkx as nx  # noqa: PLC0415

    return [sorted(layer) for layer in nx.topological_generations(graph)]


def find_critical_path(graph: Graph) -> list[str]:
    """Return a longest chain of steps, from a root to a leaf: each run has to execute these one after the other."""
    import networkx as nx  # noqa: PLC0415

    return nx.dag_longest_path(graph)


def find_last_path(graph: Graph, ends: Mapping[str, Any]) -> list[str]:
    """Return a run's critical path: the steps that decided when the run ended.

    The search goes backwards. It begins at the step that ended last, and goes on to the upstream step that ended last,
    because the step had to wait for that one.

    Args:
        graph: the workflow.
        ends: when each step ended, or other comparable values; steps without an end are left out.
    """
    path: list[str] = []
    candidates: Iterable[str] = graph
    while ended := [slug for slug in candidates if slug in ends]:
        path.append(max(ended, key=ends.__getitem__))
        candidates = graph.predecessors(path[-1])
    return path[::-1]


def find_ancestors(graph: Graph, slug: str) -> set[str]:
    """Return all steps that a step waits for, directly or indirectly."""
    import networkx as nx  # noqa: PLC0415

    return set(nx.ancestors(graph, slug))


def find_descendants(graph: Graph, slug: str) -> set[str]:
    """Return all steps that wait for a step, directly or indirectly."""
    import networkx as nx  # noqa: PLC0415

    return set(nx.descendants(graph, slug))


def find_leaves(graph: Graph) -> list[str]:
    """Return the slugs that no step waits for, in the definition's order."""
    return [slug for slug, out_degree in graph.out_degree() if out_degree == 0]


def find_problems(definition: WorkflowDefinition, handlers: Mapping[str, Collection[str]] | None = None) -> list[str]:
    """Return all problems of a definition, and of its handlers if they are given.

    Args:
        definition: the workflow.
        handlers: for each step that has a handler, the names of the handler's arguments that have no default.

    Returns:
        A sentence for each problem; empty if there is none. Linear in steps and deps.
    """
    graph = build_graph(definition)
    problems = [*_find_definition_problems(definition, graph), *find_cycles(graph)]
    if handlers is not None:
        problems += _find_handler_problems(definition, handlers)
        for slug, arguments in handlers.items():
            if slug in graph:
                problems += _find_argument_problems(slug, arguments, list(graph.predecessors(slug)))
    return problems


def find_cycles(graph: Graph) -> Iterator[str]:
    """Yield a sentence for each cycle, and one for each group of steps with too many cycles to list."""
    import networkx as nx  # noqa: PLC0415

    if nx.is_directed_acyclic_graph(graph):
        return
    components = nx.strongly_connected_components(graph)
    tangles = [nodes for nodes in components if len(nodes) > 1 or graph.has_edge(min(nodes), min(nodes))]
    for tangle in sorted(tangles, key=min):
        cycles = nx.simple_cycles(graph.subgraph(tangle))
        for cycle in islice(cycles, CYCLES_SHOWN):
            first = cycle.index(min(cycle))
            path = [*cycle[first:], *cycle[:first], cycle[first]]
            yield f"its steps wait for each other: {' -> '.join(path)}"
        if next(cycles, None) is not None:
            yield f"there are more cycles among the {len(tangle)} steps around {min(tangle)!r}"


def _find_definition_problems(definition: WorkflowDefinition, graph: Graph) -> Iterator[str]:
    if not definition.steps:
        yield "it has no steps: insert them into pgflow.steps"
    known = set(definition.steps)
    for slug, suggestion in suggest_each(sorted(set(graph) - known), known):
        yield f"a dependency names the step {slug!r}, which does not exist{suggestion}"
    slugs_by_name = defaultdict(list)
    for slug in definition.steps:
        slugs_by_name[to_identifier(slug)].append(slug)
    for name, slugs in slugs_by_name.items():
        if len(slugs) > 1:
            listed = ", ".join(map(repr, sorted(slugs)))
            yield f"the steps {listed} have the same Python name {name!r}: rename all but one"


def _find_handler_problems(definition: WorkflowDefinition, handlers: Mapping[str, Collection[str]]) -> Iterator[str]:
    known = set(definition.steps)
    # A step without a handler is external, which is no problem.
    uncovered = [slug for slug in definition.steps if slug not in handlers]
    unused = [slug for slug in handlers if slug not in known]
    for slug, suggestion in suggest_each(unused, uncovered or known):
        yield f"handler {slug!r} fits no step{suggestion}"


def _find_argument_problems(slug: str, arguments: Collection[str], upstream: Collection[str]) -> Iterator[str]:
    names = {to_identifier(each) for each in upstream}
    for argument in arguments:
        if argument not in names and argument not in RESERVED_NAMES:
            yield (
                f"the handler of step {slug!r} takes {argument!r}, which is no upstream step of it"
                f"{suggest(argument, names | RESERVED_NAMES)}"
            )
