"""A workflow's graph in the language of Graphviz.

Source: https://graphviz.org/doc/info/lang.html
"""

from collections.abc import Iterator, Mapping

from pgflow_prefect.definitions.graph import Graph
from pgflow_prefect.render.groups import Group, find_groups
from pgflow_prefect.render.labels import clean
from pgflow_prefect.render.palette import PAINTS, PLAIN
from pgflow_prefect.render.progress import Progress
from pgflow_prefect.render.rules import describe_rules, is_conditional, is_map

_HEAD = """\
digraph {name} {{
    graph [rankdir=LR, bgcolor="transparent"]
    node [shape=box, style="rounded,filled", fontname="sans-serif", fontsize=11, fontcolor="#1f2328", \
fillcolor="{fill}", color="{line}"]
    edge [color="{line}", arrowsize=0.7]"""


def draw_dot(graph: Graph, progress: Progress | None = None) -> str:
    """Return the graph as a `digraph`; for a run, each step has the colour of its state, and its duration.

    Nodes have the steps' slugs as names; only labels replace characters that no picture can show.
    """
    lines = [_HEAD.format(name=_quote(str(graph.graph.get("slug", ""))), fill=PLAIN.fill, line=PLAIN.line)]
    nodes = {slug: f"{_quote(slug)} [{_list_attributes(graph, slug, progress)}]" for slug in graph}
    lines += _write_group(find_groups(graph), nodes, "    ")
    lines += [f"    {_quote(upstream)} -> {_quote(downstream)}" for upstream, downstream in graph.edges]
    return "\n".join([*lines, "}"])


def _write_group(group: Group, nodes: Mapping[str, str], margin: str) -> Iterator[str]:
    """Yield the lines of a group: its steps, and its groups as boxes around theirs."""
    for slug in group.slugs:
        yield f"{margin}{nodes[slug]}"
    for inner in group.groups:
        yield f"{margin}subgraph {_quote(f'cluster_{inner.name}')} {{"  # Graphviz draws a box for such a name only
        yield f'{margin}    graph [label={_write_label(inner.name)}, style="rounded,dashed", color="{PLAIN.line}"]'
        yield from _write_group(inner, nodes, f"{margin}    ")
        yield f"{margin}}}"


def _list_attributes(graph: Graph, slug: str, progress: Progress | None) -> str:
    said = describe_rules(graph, slug)
    shape = ", peripheries=2" if is_map(graph, slug) else ""
    if is_conditional(graph, slug):
        shape += ', style="rounded,filled,dashed"'
    if progress is None:
        return f"label={_write_label(slug, *([said] if said else []))}{shape}"
    return _list_attributes_of_run(slug, progress) + shape


def _list_attributes_of_run(slug: str, progress: Progress) -> str:
    mark = progress.marks[slug]
    paint = PAINTS[mark.look]
    said = f"{paint.sign} {', '.join(filter(None, [mark.look, mark.measures]))}"
    tooltip = _write_label(f"{slug}: {mark.error}" if mark.error else slug)
    attributes = f'label={_write_label(slug, said)}, fillcolor="{paint.fill}", color="{paint.line}", tooltip={tooltip}'
    return f"{attributes}, penwidth=2" if slug in progress.critical_steps else attributes


def _write_label(*lines: str) -> str:
    # A label knows escapes of its own, such as \N for the node's name, and HTML's entities.
    shown = (clean(line).replace("\\", "\\\\").replace("&", "&amp;").replace('"', '\\"') for line in lines)
    return '"{}"'.format("\\n".join(shown))


def _quote(text: str) -> str:
    r"""Return a name that stands for this slug and no other: a backslash is doubled, for `\"` would not end it."""
    return '"{}"'.format(text.replace("\\", "\\\\").replace('"', '\\"'))
