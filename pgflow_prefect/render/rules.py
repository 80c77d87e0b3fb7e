"""What pictures say of a step's rules: when it runs, for what, and what becomes of it where it does not."""

import json
from collections.abc import Iterator

from pgflow_prefect.definitions.graph import Graph
from pgflow_prefect.render.labels import clean, cut

_LONGEST_PATTERN = 40  # columns; the tool tip has all of it
_LONGEST = 60


def is_map(graph: Graph, slug: str) -> bool:
    """Tell whether a step is executed once for each element of an array."""
    return "map_over" in graph.nodes[slug]


def is_conditional(graph: Graph, slug: str) -> bool:
    """Tell whether a step has a condition, or a rule of its own."""
    return not {"rule", "only_if", "unless"}.isdisjoint(graph.nodes[slug])


def describe_rules(graph: Graph, slug: str) -> str:
    """Return a step's rules in one line, each pattern cut to a width; empty for a plain step."""
    return cut("; ".join(_list_rules(graph, slug, longest=_LONGEST_PATTERN)), _LONGEST)


def list_rules(graph: Graph, slug: str) -> list[str]:
    """Return a step's rules, a line each, with whole patterns."""
    return [*_list_rules(graph, slug, longest=None)]


def _list_rules(graph: Graph, slug: str, longest: int | None) -> Iterator[str]:
    said = graph.nodes[slug]
    if "rule" in said:
        yield str(said["rule"])
    if "map_over" in said:
        yield f"for each of {clean(str(said['map_over']))}"
    if "child" in said:
        yield f"runs {clean(str(said['child']))}"
    for name, word in (("only_if", "if"), ("unless", "unless")):
        if name in said:
            pattern = clean(json.dumps(said[name], ensure_ascii=False, sort_keys=True))
            yield f"{word} {pattern if longest is None else cut(pattern, longest)}"
    if (unmet := said.get("when_unmet", "skip")) != "skip":
        yield f"otherwise {unmet}"
    if "when_exhausted" in said:
        yield f"{said['when_exhausted']} where it fails"
