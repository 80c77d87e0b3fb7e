"""A workflow's graph as node-link data, which networkx, D3 and others read."""

import networkx as nx

from pgflow_prefect.definitions.graph import Graph
from pgflow_prefect.render.progress import Progress


def make_node_link(graph: Graph, progress: Progress | None = None) -> dict[str, object]:
    """Return the graph as JSON values; `networkx.node_link_graph(data, edges="edges")` reads it again.

    Returns:
        `nodes`, each with `id`; `edges`, each with `source` and `target`; `graph` with the workflow's slug. For a run,
        each node has `state`, `attempts`, `started_at`, `ended_at`, `seconds`, `handler`, `error` and `critical`, and
        `graph` has `run`, `status`, `ended_as` and `now`.
    """
    shown = graph.copy()
    if progress is not None:
        run = progress.run
        shown.graph |= {
            "run": str(run.id),
            "status": str(run.status),
            "ended_as": run.ended_as,
            "now": progress.now.isoformat(),
        }
        for slug, mark in progress.marks.items():
            shown.nodes[slug].update(
                state=str(mark.look),
                attempts=mark.attempts,
                started_at=mark.started_at and mark.started_at.isoformat(),
                ended_at=mark.ended_at and mark.ended_at.isoformat(),
                seconds=mark.seconds,
                handler=mark.handler,
                error=mark.error,
                critical=slug in progress.critical_steps,
            )
    return dict(nx.node_link_data(shown, edges="edges"))
