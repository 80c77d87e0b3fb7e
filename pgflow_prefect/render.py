"""Pictures of a workflow's graph: for a terminal, and as Mermaid for documents."""

import networkx as nx

from pgflow_prefect.graph import Graph, find_critical_path, find_layers


def draw_text(graph: Graph) -> str:
    """Return the graph as a tree of lines: each step once, under one of its upstream steps, the others after `╾`."""
    return "\n".join(nx.generate_network_text(graph, sources=find_layers(graph)[0] if len(graph) else None))


def draw_mermaid(graph: Graph) -> str:
    """Return the graph as a Mermaid flowchart, as Markdown viewers show it.

    Source: https://mermaid.js.org/syntax/flowchart.html
    """
    ids = {slug: f"step{number}" for number, slug in enumerate(graph)}
    lines = ["flowchart TD"]
    lines += [f'    {ids[slug]}["{_escape_mermaid(slug)}"]' for slug in graph]
    lines += [f"    {ids[upstream]} --> {ids[downstream]}" for upstream, downstream in graph.edges]
    return "\n".join(lines)


def describe_graph(graph: Graph) -> str:
    """Return the graph's size and its critical path, in one sentence."""
    critical = find_critical_path(graph)
    shown = critical if len(critical) <= 8 else [*critical[:4], "…", *critical[-3:]]  # noqa: PLR2004  fits a line
    return (
        f"{len(graph)} steps, {graph.number_of_edges()} dependencies, {len(critical)} layers; "
        f"critical path: {' -> '.join(shown)}"
    )


def _escape_mermaid(text: str) -> str:
    return "".join(
        f"#{ord(character)};" if character in '"#<>&`[]' or not character.isprintable() else character
        for character in text
    )
