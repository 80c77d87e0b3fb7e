"""What `graph` and `timeline` share."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pgflow_prefect.cli.console import STYLES
from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from uuid import UUID

    from pgflow_prefect.database.store import Store
    from pgflow_prefect.definitions.graph import Graph
    from pgflow_prefect.render.progress import Look, Progress

Output = Annotated[Path | None, Parameter(help="Write into this file instead of to standard output.")]


async def read_progress(store: Store, run_id: UUID, workflow: str | None = None) -> tuple[Graph, Progress]:
    """Return the graph of a run, and how far each step is.

    Raises:
        UsageError: the run belongs to another workflow than the named one.
    """
    from pgflow_prefect.definitions.graph import build_graph
    from pgflow_prefect.render.progress import trace_progress

    run = await store.read_run(run_id)
    if workflow not in {None, run.workflow_slug}:
        raise UsageError(
            f"run {run_id} belongs to workflow {run.workflow_slug!r}, not to {workflow!r}. Name the run alone"
        )
    shown = build_graph(await store.load_run_definition(run_id))
    states = {state.step_slug: state for state in await store.list_step_ends(run_id, shown)}
    return shown, trace_progress(shown, run, states, await store.read_clock())


def to_json(value: object) -> str:
    """Write a value as indented JSON."""
    return jsonlib.dumps(value, indent=2, ensure_ascii=False)


def find_style(look: Look | None) -> str:
    """Return the terminal style for a step's state."""
    return STYLES[look] if look else ""
