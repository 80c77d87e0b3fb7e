"""A workflow's graph as a Mermaid flowchart, which Markdown viewers show.

Source: https://mermaid.js.org/syntax/flowchart.html
"""

import re
from collections.abc import Iterator, Mapping
from itertools import count

from pgflow_prefect.definitions.graph import Graph
from pgflow_prefect.render.groups import Group, find_groups
from pgflow_prefect.render.labels import clean
from pgflow_prefect.render.layout import goes_down
from pgflow_prefect.render.palette import PAINTS
from pgflow_prefect.render.progress import Progress
from pgflow_prefect.render.rules import describe_rules, is_conditional, is_map
from pgflow_prefect.render.svg import find_height, measure_step

_FORMULA = re.compile(r"\$(?=\$)")
_INK = "#1f2328"  # on each fill of the palette: Mermaid's own text is light on a dark page


def draw_mermaid(graph: Graph, progress: Progress | None = None) -> str:
    """Return the graph as a flowchart; for a run, each step has the colour of its state, and its duration.

    It has the direction of the SVG picture.
    """
    ids = {slug: f"step{number}" for number, slug in enumerate(graph)}
    downwards = goes_down(graph, lambda slug: measure_step(slug, progress, graph), find_height(progress, graph))
    lines = ["flowchart TD" if downwards else "flowchart LR"]
    nodes = {}
    for slug in graph:
        begin, end = _find_shape(graph, slug)
        label = _write_label(graph, slug, progress)
        nodes[slug] = f'{ids[slug]}{begin}"{label}"{end}{_name_class(slug, progress)}'
    lines += _write_group(find_groups(graph), nodes, "    ", count())
    lines += [f"    {ids[upstream]} --> {ids[downstream]}" for upstream, downstream in graph.edges]
    if progress is not None:
        lines += _define_classes(progress)
    return "\n".join(lines)


def _find_shape(graph: Graph, slug: str) -> tuple[str, str]:
    """Return the signs around a label: a map is a box with double sides, a step with a condition is a hexagon."""
    if is_map(graph, slug):
        return "[[", "]]"
    return ("{{", "}}") if is_conditional(graph, slug) else ("[", "]")


def _write_group(group: Group, nodes: Mapping[str, str], margin: str, numbers: Iterator[int]) -> Iterator[str]:
    """Yield the lines of a group: its steps, and its groups as boxes around theirs."""
    for slug in group.slugs:
        yield f"{margin}{nodes[slug]}"
    for inner in group.groups:
        yield f'{margin}subgraph group{next(numbers)}["{_escape(inner.name)}"]'
        yield from _write_group(inner, nodes, f"{margin}    ", numbers)
        yield f"{margin}end"


def _write_label(graph: Graph, slug: str, progress: Progress | None) -> str:
    if progress is None:
        said = describe_rules(graph, slug)
        return f"{_escape(slug)}<br/>{_escape(said)}" if said else _escape(slug)
    mark = progress.marks[slug]
    return f"{_escape(slug)}<br/>{PAINTS[mark.look].sign} {', '.join(filter(None, [mark.look, mark.measures]))}"


def _name_class(slug: str, progress: Progress | None) -> str:
    return "" if progress is None else f":::{progress.marks[slug].look}"


def _define_classes(progress: Progress) -> Iterator[str]:
    looks = {mark.look for mark in progress.marks.values()}
    for look, paint in PAINTS.items():
        if look in looks:
            yield f"    classDef {look} fill:{paint.fill},stroke:{paint.line},color:{_INK}"


def _escape(text: str) -> str:
    """Return a text that Mermaid shows unchanged: without quotes, entities, tags, code, directives and formulas."""
    shown = _FORMULA.sub("$\u2060", clean(text))  # two dollars begin a formula even as entities
    return "".join(f"#{ord(character)};" if character in '"#<>&`[]%\\' else character for character in shown)
