"""`graph`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from cyclopts import Parameter

from pgflow_prefect.cli.console import out
from pgflow_prefect.cli.drawing import Output, find_style, read_progress, to_json
from pgflow_prefect.cli.files import write_output
from pgflow_prefect.cli.options import AsJson, Dsn, make_settings
from pgflow_prefect.errors import InvalidDefinitionError, UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from pgflow_prefect.database.run_names import RunName
    from pgflow_prefect.definitions.graph import Graph
    from pgflow_prefect.render.progress import Progress
    from pgflow_prefect.settings import Settings

GraphFormat: TypeAlias = Literal["text", "mermaid", "svg", "dot", "json"]


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
        The workflow's slug. Not needed with --run.
    run
        Draw this run: its id, the beginning of its id, or latest. It is drawn with the definition that it began with.
    format
        text: a tree of lines for the terminal. mermaid, svg, dot: for documents. json: node-link data.
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


def _find_drawer(format: str) -> Callable[[Graph, Progress | None], str]:  # noqa: A002
    """Return the function that draws a graph, with the progress of a run if there is one, in this format."""
    from pgflow_prefect.render.dot import draw_dot
    from pgflow_prefect.render.mermaid import draw_mermaid
    from pgflow_prefect.render.node_link import make_node_link
    from pgflow_prefect.render.svg import draw_svg

    return {
        "mermaid": draw_mermaid,
        "svg": draw_svg,
        "dot": draw_dot,
        "json": lambda graph, progress: to_json(make_node_link(graph, progress)),
    }[format]


async def _load_graph(settings: Settings, workflow: str | None, run: RunName | None) -> tuple[Graph, Progress | None]:
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.definitions.graph import build_graph, find_problems

    async with open_store(settings, size=1, only_reads=True) as store:
        if run is not None:
            return await read_progress(store, await store.find_run_id(run), workflow)
        assert workflow is not None
        definition = await store.load_definition(workflow)
    if problems := find_problems(definition):
        raise InvalidDefinitionError(workflow, problems)
    return build_graph(definition), None


def _colour_lines(shown: Graph, progress: Progress | None) -> Text:
    from rich.text import Text

    from pgflow_prefect.render.text import write_lines

    return Text("\n").join(
        Text.assemble((line.before, "dim"), line.name, "  " if line.note else "", (line.note, find_style(line.look)))
        + Text(line.after, "dim")
        for line in write_lines(shown, progress)
    )
