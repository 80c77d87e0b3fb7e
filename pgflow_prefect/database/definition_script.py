"""Writes a definition as SQL, for `psql -f`, an SQL editor or a migration."""

from collections.abc import Iterable

from psycopg import sql

from pgflow_prefect.definitions.graph import build_graph, sort_steps
from pgflow_prefect.definitions.model import WorkflowDefinition

HEADER = "-- The pgflow workflow {name}. Adds what is missing; again: changes nothing.\nBEGIN;\n"
FOOTER = "COMMIT;\n"

# One statement for all rows of a table, because the engine looks for cycles once in each statement.
WORKFLOW = """\
INSERT INTO pgflow.workflows (slug) VALUES
{rows}
ON CONFLICT DO NOTHING;
"""
STEPS = """\
INSERT INTO pgflow.steps (workflow_slug, slug) VALUES
{rows}
ON CONFLICT DO NOTHING;
"""
DEPS = """\
INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug) VALUES
{rows}
ON CONFLICT DO NOTHING;
"""


def write_script(definition: WorkflowDefinition) -> str:
    """Return the SQL that defines a workflow, in one transaction; the same text for the same definition.

    Each step stands after its upstream steps. The text does not depend on `standard_conforming_strings`.
    The definition must have no cycle.
    """
    order = sort_steps(build_graph(definition))
    place = {slug: number for number, slug in enumerate(order)}
    deps = sorted(definition.deps, key=lambda dep: (place[dep.downstream], place[dep.upstream]))
    quoted = {slug: _quote(slug) for slug in order}
    workflow = _quote(definition.slug)
    parts = [
        HEADER.format(name=repr(definition.slug)),  # without line ends, which would end the comment
        WORKFLOW.format(rows=_list_rows([(workflow,)])),
    ]
    if order:
        parts.append(STEPS.format(rows=_list_rows((workflow, quoted[slug]) for slug in order)))
    if deps:
        parts.append(DEPS.format(rows=_list_rows((workflow, quoted[up], quoted[down]) for up, down in deps)))
    return "".join([*parts, FOOTER])


def _list_rows(rows: Iterable[tuple[str, ...]]) -> str:
    return ",\n".join(f"    ({', '.join(row)})" for row in rows)


def _quote(text: str) -> str:
    """Return a literal whose characters survive a clipboard, and every editor's rules for line ends."""
    literal = sql.Literal(text).as_string(None).lstrip()  # E'…' if it has a backslash, and then a space before it
    if text.isprintable():
        return literal
    escaped = "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in literal)
    return escaped if escaped.startswith("E") else f"E{escaped}"
