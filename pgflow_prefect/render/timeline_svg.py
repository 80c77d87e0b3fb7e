"""A run's Gantt chart as an SVG picture."""

from collections import Counter
from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

from pgflow_prefect.render.labels import clean, cut, format_instant, measure
from pgflow_prefect.render.palette import PAINTS
from pgflow_prefect.render.svg import HEADING, MARGIN, NAME_COLUMN, name_paints, templates, write_legend, write_tip
from pgflow_prefect.render.timeline import Row, Timeline, describe_timeline

_CHART = 760.0
"""The width of the bars' part, in pixels."""

_ROW = 24.0
_BAR = 14.0
_LONGEST_NAME = 32  # columns
_NOTE = 150.0  # the width of the text beside a bar

_DAY = 86400
_TICKS = (
    *(part * 10**power for power in range(-6, 0) for part in (1, 2, 5)),
    *(1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, _DAY),
)
"""Steps of an axis that people expect, in seconds."""

_MOST_TICKS = 8


class Bar(NamedTuple):
    """A row of the chart for the template; a step that did not work has no width.

    `earlier` is the width of the earlier attempts, which end where the latest one begins.
    """

    y: float
    name: str
    look: str
    sign: str
    x: float
    width: float
    earlier: float
    note: str
    tip: str


class Tick(NamedTuple):
    """A line across the chart."""

    x: float
    label: str


def draw_timeline_svg(timeline: Timeline) -> str:
    """Return the chart as an SVG document: a row for each step, a bar for each that has worked."""
    progress = timeline.progress
    names = max((measure(cut(clean(row.slug), _LONGEST_NAME)) for row in timeline.rows), default=0)
    left = names * NAME_COLUMN + 34
    legend = list(write_legend(Counter(row.mark.look for row in timeline.rows), left + _CHART))
    top = MARGIN + 3 * HEADING + legend[-1].y + 16
    return templates.get_template("timeline.svg.jinja").render(
        width=left + _CHART + _NOTE + 2 * MARGIN,
        height=top + len(timeline.rows) * _ROW + MARGIN,
        margin=MARGIN,
        heading=HEADING,
        top=top,
        left=left,
        length=len(timeline.rows) * _ROW,
        title=clean(progress.run.workflow_slug),
        summary="; ".join(describe_timeline(timeline)),
        legend=legend,
        ticks=list(_list_ticks(timeline)),
        bars=[_make_bar(place * _ROW, row, timeline) for place, row in enumerate(timeline.rows)],
        bar_height=_BAR,
        paints=name_paints(),
    )


def _make_bar(y: float, row: Row, timeline: Timeline) -> Bar:
    mark = row.mark
    x = width = earlier = 0.0
    if row.start is not None and row.end is not None:
        x = (row.start - timeline.first) / timeline.span * _CHART
        width = max((row.end - row.start) / timeline.span * _CHART, 1.5)
        if row.first_start is not None:
            earlier = (row.start - row.first_start) / timeline.span * _CHART
    look = f"{mark.look} critical" if row.is_critical else str(mark.look)
    note = mark.measures or str(mark.look)
    name = cut(clean(row.slug), _LONGEST_NAME)
    return Bar(y, name, look, PAINTS[mark.look].sign, x, width, earlier, note, write_tip(row.slug, mark))


def _list_ticks(timeline: Timeline) -> Iterator[Tick]:
    apart = find_tick(timeline.span)
    for number in range(ceil(timeline.first / apart), int(timeline.last / apart) + 1):
        seconds = number * apart
        yield Tick((seconds - timeline.first) / timeline.span * _CHART, format_instant(seconds, apart))


def find_tick(span: float) -> float:
    """Return the seconds between two lines across a chart of this length in seconds."""
    least = span / _MOST_TICKS
    return next((tick for tick in _TICKS if tick >= least), ceil(least / _DAY) * _DAY)
