"""A definition as the SQL that makes it: for `psql -f`, for an SQL editor, for a migration."""

from collections.abc import Iterable

from psycopg import sql

from pgflow_prefect.definitions.graph import build_graph, sort_steps
from pgflow_prefect.definitions.model import WorkflowDefinition

HEADER = "-- The pgflow workflow {name}. Adds what is missing; again: changes nothing.\nBEGIN;\n"
FOOTER = "COMMIT;\n"

# One statement for all rows of a table: the engine looks for cycles once a statement.
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

    Each step stands after those that it waits for. The text is right whatever `standard_conforming_strings` says.
    The definition must have no cycle.
    """
    order = sort_steps(build_graph(definition))
    place = {slug: number for number, slug in enumerate(order)}
    deps = sorted(definition.deps, key=lambda dep: (place[dep.downstream], place[dep.upstream]))
    quoted = {slug: _quote(slug) for slug in order}
    workflow = _quote(definition.slug)
    parts = [
        HEADER.format(name=repr(definition.slug)),  # in which no line ends: it must not end the comment
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
    """Return a literal of characters that survive a clipboard, and every editor's notion of where a line ends."""
    literal = sql.Literal(text).as_string(None).lstrip()  # E'…' if it has a backslash, and then a space before it
    if text.isprintable():
        return literal
    escaped = "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in literal)
    return escaped if escaped.startswith("E") else f"E{escaped}"
