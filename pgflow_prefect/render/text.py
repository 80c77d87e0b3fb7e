"""A workflow's graph as lines of text, for a terminal."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import networkx as nx

from pgflow_prefect.definitions.graph import Graph, find_critical_path, find_layers, sort_steps
from pgflow_prefect.render.labels import clean
from pgflow_prefect.render.palette import PAINTS
from pgflow_prefect.render.progress import Look, Progress
from pgflow_prefect.render.rules import describe_rules

DEEPEST = 40
"""The most layers of a tree, because every layer is an indentation of four columns."""

_NUMBER = re.compile("\0(\\d+)\0")


class Line(NamedTuple):
    """A line of the picture.

    Attributes:
        before: the lines that lead to the step.
        name: the step's slug.
        look: its state, if the picture shows a run.
        note: that state, its duration and attempts in words; without a run, the rules of the step.
        after: its other upstream steps.
    """

    before: str
    name: str
    look: Look | None
    note: str
    after: str

    def __str__(self) -> str:
        note = f"  {self.note}" if self.note else ""
        return f"{self.before}{self.name}{note}{self.after}"


def draw_text(graph: Graph, progress: Progress | None = None) -> str:
    """Return the graph as a tree of lines: each step once, under one of its upstream steps, the others after `╾`.

    A graph that is too deep becomes a list, with each step below its upstream steps.
    """
    return "\n".join(map(str, write_lines(graph, progress)))


def write_lines(graph: Graph, progress: Progress | None = None) -> Iterator[Line]:
    """Yield the lines of the picture."""
    layers = find_layers(graph)
    if len(layers) > DEEPEST:
        yield from _write_list(graph, progress)
        return
    slugs = list(graph)
    marked = nx.relabel_nodes(graph, {slug: number for number, slug in enumerate(slugs)})
    nx.set_node_attributes(marked, {number: f"\0{number}\0" for number in marked}, "label")
    numbers = {slug: number for number, slug in enumerate(slugs)}
    sources = [numbers[slug] for slug in layers[0]] if layers else None
    for line in nx.generate_network_text(marked, sources=sources):
        before, *found = _NUMBER.split(line, maxsplit=1)
        if not found:  # `...`: its downstream steps are drawn elsewhere
            yield Line(before, "", None, "", "")
            continue
        slug, after = slugs[int(found[0])], _NUMBER.sub(lambda match: clean(slugs[int(match[1])]), found[1])
        yield Line(before, clean(slug), *_describe(graph, slug, progress), after)


def _write_list(graph: Graph, progress: Progress | None) -> Iterator[Line]:
    for slug in sort_steps(graph):
        after = _list(graph.predecessors(slug))
        yield Line("", clean(slug), *_describe(graph, slug, progress), after)


def _list(slugs: Iterable[str]) -> str:
    listed = ", ".join(map(clean, slugs))
    return f" ╾ {listed}" if listed else ""


def _describe(graph: Graph, slug: str, progress: Progress | None) -> tuple[Look | None, str]:
    if progress is None:
        said = describe_rules(graph, slug)
        return None, f"({said})" if said else ""
    mark = progress.marks[slug]
    return mark.look, " ".join(filter(None, [PAINTS[mark.look].sign, mark.look, mark.measures]))


def describe_graph(graph: Graph) -> str:
    """Return the graph's size and its critical path, in one sentence."""
    critical = find_critical_path(graph)
    return (
        f"{len(graph)} steps, {graph.number_of_edges()} dependencies, {len(critical)} layers; "
        f"critical path: {write_path(critical)}"
    )


def write_path(slugs: Iterable[str]) -> str:
    """Return a chain of steps as `a -> b -> c`; a long one without its middle."""
    names = list(map(clean, slugs))
    shown = names if len(names) <= 8 else [*names[:4], "…", *names[-3:]]  # noqa: PLR2004  fits a line
    return " -> ".join(shown)
