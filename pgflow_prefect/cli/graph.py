"""`graph`, `timeline`: pictures for the terminal, and for documents."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from cyclopts import Parameter
from cyclopts.validators import Number

from pgflow_prefect.cli.console import STYLES, out
from pgflow_prefect.cli.files import write_output
from pgflow_prefect.cli.options import AsJson, Dsn, RunId, make_settings
from pgflow_prefect.errors import InvalidDefinitionError, UsageError

if TYPE_CHECKING:
    from uuid import UUID

    from rich.text import Text

    from pgflow_prefect.database.run_names import RunName
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.definitions.graph import Graph
    from pgflow_prefect.render.progress import Look, Progress
    from pgflow_prefect.render.timeline import Timeline
    from pgflow_prefect.settings import Settings

GraphFormat: TypeAlias = Literal["text", "mermaid", "svg", "dot", "json"]
TimelineFormat: TypeAlias = Literal["text", "svg", "json"]
Output = Annotated[Path | None, Parameter(help="Write into this file instead of to standard output.")]


def graph(
    workflow: str | None = None,
    /,
    *,
    run: Annotated[str | None, Parameter(show_default=False)] = None,
    format: GraphFormat = "text",  # noqa: A002
    output: Output = None,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Draw a workflow, or a run of it with the state of each step, its duration and its attempts.

    Example: `pgflow-prefect graph greeting --format svg --output greeting.svg`

    Parameters
    ----------
    workflow
        The workflow's slug; not needed with --run.
    run
        Draw this run: its id, the beginning of its id, or latest. Its definition is the one that it began with.
    format
        A tree of lines for the terminal; a Mermaid flowchart, an SVG picture or Graphviz's DOT for documents; or
        node-link data in JSON.
    """
    import anyio
    from rich.text import Text

    from pgflow_prefect.database.run_names import parse_run_name
    from pgflow_prefect.render.text import describe_graph, draw_text, write_path

    if workflow is None and run is None:
        raise UsageError("name a WORKFLOW to draw, or give --run RUN_ID to draw a run")
    name = None if run is None else parse_run_name(run)
    shown, progress = anyio.run(_load_graph, make_settings(dsn), workflow, name)
    chosen = "json" if json else format
    if chosen != "text":
        write_output(_find_drawer(chosen)(shown, progress) + "\n", output)
        return
    if progress is None:
        about = [describe_graph(shown)]
    else:
        about = [progress.summary, f"critical path of the run: {write_path(progress.critical) or '-'}"]
    if output is None and out.is_terminal:
        out.print(_colour_lines(shown, progress), *map(Text, about), sep="\n", soft_wrap=True)
    else:
        write_output("\n".join([draw_text(shown, progress), *about, ""]), output)


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

    A bar is a step's latest attempt, until now where it goes on; a step that was never claimed has none. The critical
    path goes back from the step that ended last, each time to the upstream step that ended last. On a pipe, start and
    duration are in seconds, counted from the beginning of the run.

    Example: `pgflow-prefect timeline latest --format svg --output run.svg`

    Parameters
    ----------
    format
        A chart as wide as the terminal, an SVG picture, or JSON.
    top
        Only so many steps: those that took longest.
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
        write_output(_to_json(list_rows(chart)) + "\n", output)
    elif format == "svg":
        write_output(draw_timeline_svg(chart) + "\n", output)
    elif output is None and out.is_terminal:
        out.print(Text("\n").join(_draw_chart(chart, out.width)), soft_wrap=True)
    else:
        write_output("".join("\t".join(row) + "\n" for row in [COLUMNS, *write_rows(chart)]), output)


def _find_drawer(format: str) -> Callable[[Graph, Progress | None], str]:  # noqa: A002
    """Return what draws a graph, and the progress of a run where one is shown, in a format for documents."""
    from pgflow_prefect.render.dot import draw_dot
    from pgflow_prefect.render.mermaid import draw_mermaid
    from pgflow_prefect.render.node_link import make_node_link
    from pgflow_prefect.render.svg import draw_svg

    return {
        "mermaid": draw_mermaid,
        "svg": draw_svg,
        "dot": draw_dot,
        "json": lambda graph, progress: _to_json(make_node_link(graph, progress)),
    }[format]


async def _load_graph(settings: Settings, workflow: str | None, run: RunName | None) -> tuple[Graph, Progress | None]:
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.definitions.graph import build_graph, find_problems

    async with open_store(settings, size=1, only_reads=True) as store:
        if run is not None:
            return await _read_progress(store, await store.find_run_id(run), workflow)
        assert workflow is not None
        definition = await store.load_definition(workflow)
    if problems := find_problems(definition):
        raise InvalidDefinitionError(workflow, problems)
    return build_graph(definition), None


async def _load_run(settings: Settings, run: RunName) -> tuple[Graph, Progress]:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        return await _read_progress(store, await store.find_run_id(run))


async def _read_progress(store: Store, run_id: UUID, workflow: str | None = None) -> tuple[Graph, Progress]:
    from pgflow_prefect.definitions.graph import build_graph
    from pgflow_prefect.render.progress import trace_progress

    run = await store.read_run(run_id)
    if workflow not in {None, run.workflow_slug}:
        raise UsageError(f"run {run_id} is one of workflow {run.workflow_slug!r}, not of {workflow!r}: leave that out")
    shown = build_graph(await store.load_run_definition(run_id))
    states = {state.step_slug: state for state in await store.list_step_ends(run_id, shown)}
    return shown, trace_progress(shown, run, states, await store.read_clock())


def _to_json(value: object) -> str:
    return jsonlib.dumps(value, indent=2, ensure_ascii=False)


def _find_style(look: Look | None) -> str:
    return STYLES[look] if look else ""


def _colour_lines(shown: Graph, progress: Progress | None) -> Text:
    from rich.text import Text

    from pgflow_prefect.render.text import write_lines

    return Text("\n").join(
        Text.assemble((line.before, "dim"), line.name, "  " if line.note else "", (line.note, _find_style(line.look)))
        + Text(line.after, "dim")
        for line in write_lines(shown, progress)
    )


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
        style = _find_style(row.mark.look)
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
