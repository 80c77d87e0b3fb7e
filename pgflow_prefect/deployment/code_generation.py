"""From a definition to a file of handlers, one stub a step; and again, without touching what a person wrote."""

import ast
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pgflow_prefect.deployment.handler_files import find_workflow, load_module
from pgflow_prefect.errors import UsageError
from pgflow_prefect.graph import build_graph, sort_steps
from pgflow_prefect.models import WorkflowDefinition, to_identifier

MOST_ARGUMENTS = 8
"""A step with more upstream steps than this gets them all as one argument."""

HEADER = '''"""Handlers of the pgflow workflow {name}; its steps and dependencies are in the database."""

from pydantic import JsonValue

from pgflow_prefect import Workflow

workflow = Workflow({slug})
'''

STUB = '''@{workflow}.step({slug}unimplemented=True)
async def {name}({arguments}) -> JsonValue:
    """{docstring}"""
    raise NotImplementedError({message})
'''

FOOTER = "flow = workflow.flow\n"


@dataclass(frozen=True)
class ImportReport:
    """What an import did to a file.

    Attributes:
        path: the file.
        created: it was not there before.
        added: the steps that got a stub.
        gone: the steps that the file has handlers of and the database no longer defines.
        stubs: the steps whose handler is a stub, the added ones among them.
    """

    path: Path
    created: bool
    added: tuple[str, ...]
    gone: tuple[str, ...]
    stubs: tuple[str, ...]


def import_workflow(definition: WorkflowDefinition, path: Path) -> ImportReport:
    """Write the file of a workflow's handlers, or add stubs for the steps that it lacks.

    A handler that is there stays as it is, to the letter. The file is replaced in one move, or not at all.

    Raises:
        UsageError: the file can't be imported, or holds the handlers of another workflow.
    """
    graph = build_graph(definition)
    order = sort_steps(graph)
    if not path.exists():
        stubs = [make_stub(slug, list(graph.predecessors(slug))) for slug in order]
        text = "\n\n".join(
            [HEADER.format(slug=_literal(definition.slug), name=_in_docstring(definition.slug)), *stubs, FOOTER]
        )
        _replace(path, text)
        return ImportReport(path, created=True, added=tuple(order), gone=(), stubs=tuple(order))

    module = load_module(str(path))
    workflow = find_workflow(module, definition.slug, str(path))
    present = {*workflow.handlers, *workflow.stubs}
    added = tuple(slug for slug in order if slug not in present)
    if added:
        name = next(name for name, value in vars(module).items() if value is workflow)
        stubs = [make_stub(slug, list(graph.predecessors(slug)), name) for slug in added]
        _replace(path, insert_stubs(path.read_text(encoding="utf-8"), stubs, name))
    gone = tuple(slug for slug in sorted(present) if slug not in graph)
    return ImportReport(path, created=False, added=added, gone=gone, stubs=(*workflow.stubs, *added))


def make_stub(slug: str, upstream: Collection[str], workflow: str = "workflow") -> str:
    """Return the Python source of one step's stub; the database holds no types, so it takes and returns JSON.

    Args:
        slug: the step.
        upstream: the slugs that it waits for.
        workflow: the name of the `Workflow` in the file.
    """
    name = to_identifier(slug)
    if not upstream:
        arguments = "payload: JsonValue"
    elif len(upstream) > MOST_ARGUMENTS:
        arguments = "upstream: dict[str, JsonValue]"
    else:
        arguments = ", ".join(f"{to_identifier(each)}: JsonValue" for each in sorted(upstream))
    return STUB.format(
        workflow=workflow,
        slug="" if name == slug else f"{_literal(slug)}, ",
        name=name,
        arguments=arguments,
        docstring=f"Stand in for the work of step {_in_docstring(slug)}: write it, and take `unimplemented` out.",
        message=_literal(f"step {slug}"),
    )


def insert_stubs(source: str, stubs: Collection[str], workflow: str) -> str:
    """Return a file's source with stubs after its last handler, or at its end where it has none."""
    place = 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _is_handler(node, workflow):
            place = node.end_lineno or 0
    lines = source.splitlines(keepends=True)
    place = place or len(lines)
    before = "".join(lines[:place]).rstrip("\n")
    after = "".join(lines[place:]).lstrip("\n")
    return (
        "\n\n\n".join(part for part in (before, *(stub.rstrip("\n") for stub in stubs), after) if part).rstrip() + "\n"
    )


def _is_handler(node: ast.FunctionDef | ast.AsyncFunctionDef, workflow: str) -> bool:
    decorators = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
    return any(ast.unparse(each) == f"{workflow}.step" for each in decorators)


def _literal(text: str) -> str:
    """Return the string as Python source, in double quotes where that needs no escapes."""
    return f'"{text}"' if text.isprintable() and not set(text) & {'"', "\\"} else repr(text)


def _in_docstring(text: str) -> str:
    """Return the string so that it can't end a docstring, nor be taken for an escape in one."""
    return repr(text).replace('"', "'").replace("\\", "/")


def _replace(path: Path, text: str) -> None:
    """Write a file so that at each moment it is the old one or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as part:
            part.write(text)
        Path(part.name).chmod(path.stat().st_mode if path.exists() else 0o644)
        Path(part.name).replace(path)
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from error
