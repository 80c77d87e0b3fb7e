"""`timeline`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from cyclopts import Parameter
from cyclopts.validators import Number

from pgflow_prefect.cli.console import out
from pgflow_prefect.cli.drawing import Output, find_style, read_progress, to_json
from pgflow_prefect.cli.files import write_output
from pgflow_prefect.cli.options import AsJson, Dsn, RunId, make_settings

if TYPE_CHECKING:
    from rich.text import Text

    from pgflow_prefect.database.run_names import RunName
    from pgflow_prefect.definitions.graph import Graph
    from pgflow_prefect.render.progress import Progress
    from pgflow_prefect.render.timeline import Timeline
    from pgflow_prefect.settings import Settings

TimelineFormat: TypeAlias = Literal["text", "svg", "json"]


def timeline(
    run_id: RunId,
    /,
    *,
    format: TimelineFormat = "text",  # noqa: A002
    top: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    output: Output = None,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Show when each step of a run began, how long it took, and which steps decided when the run ended.

    A bar is a step's latest attempt. A step that was never claimed has none. The critical path goes back from the step
    that ended last, always to the upstream step that ended last. On a pipe, start and duration are seconds since the
    run began.

    Example: `pgflow-prefect timeline latest --format svg --output run.svg`

    Parameters
    ----------
    format
        A chart as wide as the terminal, an SVG picture, or JSON.
    top
        Show only this many steps: those that took longest.
    """
    import anyio
    from rich.text import Text

    from pgflow_prefect.database.run_names import parse_run_name
    from pgflow_prefect.render.timeline import COLUMNS, list_rows, make_timeline, write_rows
    from pgflow_prefect.render.timeline_svg import draw_timeline_svg

    shown, progress = anyio.run(_load_run, make_settings(dsn), parse_run_name(run_id))
    chart = make_timeline(shown, progress)
    if top is not None:
        chart = chart.take_longest(top)
    if json or format == "json":
        write_output(to_json(list_rows(chart)) + "\n", output)
    elif format == "svg":
        write_output(draw_timeline_svg(chart) + "\n", output)
    elif output is None and out.is_terminal:
        out.print(Text("\n").join(_draw_chart(chart, out.width)), soft_wrap=True)
    else:
        write_output("".join("\t".join(row) + "\n" for row in [COLUMNS, *write_rows(chart)]), output)


async def _load_run(settings: Settings, run: RunName) -> tuple[Graph, Progress]:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1, only_reads=True) as store:
        return await read_progress(store, await store.find_run_id(run))


def _draw_chart(chart: Timeline, width: int) -> Iterable[Text]:
    from rich.text import Text

    from pgflow_prefect.render.labels import clean, cut, measure
    from pgflow_prefect.render.palette import PAINTS
    from pgflow_prefect.render.text import write_path
    from pgflow_prefect.render.timeline import describe_timeline, draw_axis, draw_bar

    names = [cut(clean(row.slug), max(width // 3, 8)) for row in chart.rows]
    longest = max(map(measure, names), default=0)
    notes = [row.mark.measures or str(row.mark.look) for row in chart.rows]
    room = max(width - longest - max(map(len, notes), default=0) - 6, 10)
    if any(row.start is not None for row in chart.rows):
        yield Text(" " * (longest + 3) + draw_axis(chart, room), "dim")
    for row, name, note in zip(chart.rows, names, notes, strict=True):
        left, bar = draw_bar(row, chart, room)
        style = find_style(row.mark.look)
        yield Text.assemble(
            ("*" if row.is_critical else " ", "bold"),
            (name + " " * (longest - measure(name)), "bold" if row.is_critical else ""),
            "  ",
            left,
            (bar, style),
            " " * (room - len(left) - len(bar)),
            (f" {PAINTS[row.mark.look].sign} ", style),
            note,
        )
    yield from map(Text, describe_timeline(chart))
    yield Text(f"* critical path: {write_path(chart.progress.critical) or '-'}")
