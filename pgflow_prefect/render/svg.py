"""A workflow's graph as an SVG picture of its own: no font, script or style sheet from elsewhere."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice, pairwise
from typing import NamedTuple

import jinja2

from pgflow_prefect.definitions.graph import Graph
from pgflow_prefect.render.groups import Group, find_groups
from pgflow_prefect.render.labels import clean, cut, measure
from pgflow_prefect.render.layout import Box, Layout, Point, lay_out
from pgflow_prefect.render.palette import PAINTS, PLAIN, Paint
from pgflow_prefect.render.progress import Look, Mark, Progress
from pgflow_prefect.render.rules import describe_rules, is_conditional, is_map, list_rules

MARGIN = 24.0
HEADING = 22.0
"""The height of a line above the picture, in pixels."""

NAME_COLUMN, _NOTE_COLUMN = 7.9, 6.4
"""The width of a character in pixels: of a name in a monospaced font, and of a note, with a margin."""

_LONGEST_NAME = 36  # columns; the tool tip has the whole name
_INDENT = 14.0
_MOST_FRAMES = 200
_FRAME = 7.0  # between a group's box and its steps: less than half of what is between two steps
_SIGN = 17.0  # the width of a sign before a name

templates = jinja2.Environment(
    loader=jinja2.PackageLoader("pgflow_prefect.render", "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
templates.filters |= {"clean": clean, "px": lambda number: f"{number:.1f}".removesuffix(".0")}


class Entry(NamedTuple):
    """An entry of the legend; its place is in pixels."""

    x: float
    y: float
    look: str
    sign: str
    text: str


class Step(NamedTuple):
    """A step's box, as the template draws it."""

    box: Box
    look: str
    sign: str
    name: str
    note: str
    tip: str
    indent: float
    is_map: bool = False


class Frame(NamedTuple):
    """The box around a group of steps, as the template draws it."""

    box: Box
    tip: str


class Line(NamedTuple):
    """A dep's line, as the template draws it."""

    path: str
    look: str
    tip: str


def draw_svg(graph: Graph, progress: Progress | None = None) -> str:
    """Return the graph as an SVG document; for a run, with the colours of states and the critical path.

    It has a background of its own, light or dark as the reader prefers.
    """
    layout = lay_out(graph, lambda slug: measure_step(slug, progress, graph), find_height(progress, graph))
    title = clean(str(graph.graph.get("slug", "")))
    summary = f"{len(graph)} steps, {graph.number_of_edges()} dependencies"
    if progress is not None:
        summary = progress.summary
    widest = max(layout.width, 320.0, measure(title) * 9.5, measure(summary) * _NOTE_COLUMN)
    legend = list(write_legend(Counter(mark.look for mark in progress.marks.values()), widest)) if progress else []
    top = MARGIN + 2 * HEADING + (legend[-1].y + HEADING if legend else 0.0) + 8
    return templates.get_template("graph.svg.jinja").render(
        width=widest + 2 * MARGIN,
        height=top + layout.height + MARGIN,
        margin=MARGIN,
        heading=HEADING,
        top=top,
        title=title,
        summary=summary,
        legend=legend,
        frames=list(islice(_list_frames(find_groups(graph), layout.boxes), _MOST_FRAMES)),
        lines=_list_lines(graph, layout, progress),
        steps=[_make_step(graph, slug, box, progress) for slug, box in layout.boxes.items()],
        paints=name_paints(),
    )


def _list_frames(group: Group, boxes: Mapping[str, Box], depth: int = 0) -> Iterator[Frame]:
    """Yield the boxes around groups, the outer ones first; none around a group that other steps stand between."""
    for inner in group.groups:
        slugs = set(inner.list_slugs())
        space = max(_FRAME - 2 * depth, 2)
        left = min(boxes[slug].x for slug in slugs) - space
        top = min(boxes[slug].y for slug in slugs) - space
        right = max(boxes[slug].x + boxes[slug].width for slug in slugs) + space
        bottom = max(boxes[slug].y + boxes[slug].height for slug in slugs) + space
        if not any(
            box.x < right and box.x + box.width > left and box.y < bottom and box.y + box.height > top
            for slug, box in boxes.items()
            if slug not in slugs
        ):
            yield Frame(Box(left, top, right - left, bottom - top), clean(inner.name))
        yield from _list_frames(inner, boxes, depth + 1)


def write_legend(counts: Counter[Look], width: float) -> Iterator[Entry]:
    """Yield an entry for each state that occurs, in rows of this width, and one for the critical path."""
    entries = [(str(look), paint.sign, f"{look} {counts[look]}") for look, paint in PAINTS.items() if counts[look]]
    x = y = 0.0
    for look, sign, text in [*entries, ("critical", "━", "critical path")]:
        length = _SIGN + measure(text) * _NOTE_COLUMN + 16
        if x and x + length > width:
            x, y = 0.0, y + HEADING
        yield Entry(x, y, look, sign, text)
        x += length


def name_paints() -> list[tuple[str, Paint]]:
    """Return the paints by the classes of the template."""
    return [("plain", PLAIN), *((str(look), paint) for look, paint in PAINTS.items())]


def find_height(progress: Progress | None, graph: "Graph | None" = None) -> float:
    """Return the height of a step's box, in pixels; without a run, higher where a step of the graph has rules."""
    has_notes = progress or (graph is not None and any(describe_rules(graph, slug) for slug in graph))
    return 46 if has_notes else 34


def measure_step(slug: str, progress: Progress | None, graph: "Graph | None" = None) -> float:
    """Return the width of a step's box, in pixels; without a run, wide enough for the rules that the graph has."""
    name = measure(cut(clean(slug), _LONGEST_NAME)) * NAME_COLUMN + 2 * _INDENT
    if progress is None:
        said = "" if graph is None else describe_rules(graph, slug)
        return max(name, 60.0, measure(said) * _NOTE_COLUMN + 2 * _INDENT if said else 0.0)
    return max(name + _SIGN, measure(_write_note(progress.marks[slug])) * _NOTE_COLUMN + 2 * _INDENT + _SIGN)


def _write_note(mark: Mark) -> str:
    return ", ".join(filter(None, [mark.look, mark.measures]))


def _make_step(graph: Graph, slug: str, box: Box, progress: Progress | None) -> Step:
    name = cut(clean(slug), _LONGEST_NAME)
    rules, has_items = list_rules(graph, slug), is_map(graph, slug)
    shape = " conditional" if is_conditional(graph, slug) else ""
    if progress is None:
        tip = "\n".join([clean(slug), *rules])
        return Step(box, f"plain{shape}", "", name, describe_rules(graph, slug), tip, _INDENT, has_items)
    mark = progress.marks[slug]
    look = f"{mark.look} critical" if slug in progress.critical_steps else str(mark.look)
    tip = "\n".join([write_tip(slug, mark), *rules])
    sign, note = PAINTS[mark.look].sign, _write_note(mark)
    return Step(box, f"{look}{shape}", sign, name, note, tip, _INDENT + _SIGN, has_items)


def write_tip(slug: str, mark: Mark) -> str:
    """Return the tool tip of a step of a run, in lines."""
    said = [clean(slug), _write_note(mark)]
    if mark.started_at is not None:
        said.append(f"began {mark.started_at:%Y-%m-%d %H:%M:%S %Z}")
    if mark.handler:
        said.append(f"done by {clean(mark.handler)}")
    if mark.error:
        said.append(cut(clean(mark.error), 200))
    return "\n".join(said)


def _list_lines(graph: Graph, layout: Layout, progress: Progress | None) -> list[Line]:
    chain = progress.critical if progress else ()
    critical = set(pairwise(chain))
    # Critical lines come last, and so on top.
    edges = sorted(graph.edges, key=critical.__contains__)
    return [
        Line(
            _write_path(layout.lines[edge], downwards=layout.downwards),
            "critical" if edge in critical else "plain",
            " → ".join(map(clean, edge)),
        )
        for edge in edges
    ]


def _write_path(points: list[Point], *, downwards: bool) -> str:
    """Return the path through these points: a curve between two layers, a straight line through one."""
    (x, y), *rest = points
    path = [f"M{x:.1f},{y:.1f}"]
    for place, (next_x, next_y) in enumerate(rest):
        if place % 2:
            path.append(f"L{next_x:.1f},{next_y:.1f}")
        elif downwards:
            middle = (y + next_y) / 2
            path.append(f"C{x:.1f},{middle:.1f} {next_x:.1f},{middle:.1f} {next_x:.1f},{next_y:.1f}")
        else:
            middle = (x + next_x) / 2
            path.append(f"C{middle:.1f},{y:.1f} {middle:.1f},{next_y:.1f} {next_x:.1f},{next_y:.1f}")
        x, y = next_x, next_y
    return "".join(path)
