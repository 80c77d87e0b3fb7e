"""Writes a definition as SQL, for `psql -f`, an SQL editor or a migration."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from psycopg import sql
from pydantic import JsonValue

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
_COLUMNS = {"only_if": "required_input_pattern", "unless": "forbidden_input_pattern"}
"""The columns of a step's conditions, by our names."""

_MAP_COLUMNS = {"over": "map_over", "path": "map_path"}
"""Likewise, of a map."""

_CHILD_COLUMNS = {"workflow": "child_workflow", "payload": "child_payload", "retries": "child_retries"}
"""Likewise, of a step that is a run of another workflow."""

WORKFLOW_RULES = """\
UPDATE pgflow.workflows SET when_failed = {when_failed}, failed_by = {failed_by}
WHERE slug = {workflow} AND (when_failed, failed_by) IS DISTINCT FROM ({when_failed}, {failed_by});
"""
STEP_RULES = """\
UPDATE pgflow.steps SET {columns}
WHERE workflow_slug = {workflow} AND slug = {step} AND ({differences});
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
        WORKFLOW.format(rows=_list_rows([(workflow,), *((each,) for each in _list_children(definition))])),
    ]
    if order:
        parts.append(STEPS.format(rows=_list_rows((workflow, quoted[slug]) for slug in order)))
    if deps:
        parts.append(DEPS.format(rows=_list_rows((workflow, quoted[up], quoted[down]) for up, down in deps)))
    return "".join([*parts, *_write_rules(definition, order), FOOTER])


def _list_children(definition: WorkflowDefinition) -> list[str]:
    """Return the workflows that steps are runs of: their rows must be there, whichever script is executed first."""
    return [_quote(slug) for slug in sorted({child.workflow for child in definition.children.values()})]


def _write_rules(definition: WorkflowDefinition, order: Sequence[str]) -> Iterator[str]:
    """Yield the statements that say what is said beside steps and deps; none for a plain workflow."""
    workflow = _quote(definition.slug)
    if definition.when_failed is not None or definition.failed_by != "steps":
        when_failed = "NULL" if definition.when_failed is None else _quote(definition.when_failed)
        yield WORKFLOW_RULES.format(when_failed=when_failed, failed_by=_quote(definition.failed_by), workflow=workflow)
    for slug in order:
        if said := definition.find_rules(slug).said:
            written = [*_list_columns(said)]
            yield STEP_RULES.format(
                columns=", ".join(f"{column} = {each}" for column, each in written),
                differences=" OR ".join(f"{column} IS DISTINCT FROM {each}" for column, each in written),
                workflow=workflow,
                step=_quote(slug),
            )


def _list_columns(said: Mapping[str, JsonValue]) -> Iterator[tuple[str, str]]:
    """Yield the columns of a step for what is said of it, with their values in SQL."""
    for name, each in said.items():
        if name == "map":
            assert isinstance(each, dict)
            yield "step_type", _quote("map")
            yield from ((_MAP_COLUMNS.get(part, part), _write_value(part, value)) for part, value in each.items())
        elif name == "child":
            assert isinstance(each, dict)
            yield from ((_CHILD_COLUMNS.get(part, part), _write_value(part, value)) for part, value in each.items())
        else:
            yield _COLUMNS.get(name, name), _write_value(name, each)


def _write_value(name: str, value: JsonValue) -> str:
    if name in _COLUMNS:
        return _quote(json.dumps(value, sort_keys=True))
    if isinstance(value, list):
        return f"ARRAY[{', '.join(_quote(str(each)) for each in value)}]::text[]"
    return _quote(value) if isinstance(value, str) else str(value).lower()


def _list_rows(rows: Iterable[tuple[str, ...]]) -> str:
    return ",\n".join(f"    ({', '.join(row)})" for row in rows)


def _quote(text: str) -> str:
    """Return a literal whose characters survive a clipboard, and every editor's rules for line ends."""
    literal = sql.Literal(text).as_string(None).lstrip()  # E'…' if it has a backslash, and then a space before it
    if text.isprintable():
        return literal
    escaped = "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in literal)
    return escaped if escaped.startswith("E") else f"E{escaped}"
