"""Writes a file of handlers for a definition, one stub a step, and later adds stubs without touching other code."""

import ast
import builtins
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

from pydantic import JsonValue

from pgflow_prefect.definitions.graph import build_graph, sort_steps
from pgflow_prefect.definitions.maps import find_source
from pgflow_prefect.definitions.model import (
    NO_RULES,
    StepRules,
    WorkflowDefinition,
    to_identifier,
)
from pgflow_prefect.definitions.origin import HERE, NOTHING, Origin
from pgflow_prefect.definitions.rules import find_lack
from pgflow_prefect.deployment.handler_files import find_workflow, load_module
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.python import ITEM
from pgflow_prefect.wording import clean

MOST_ARGUMENTS = 8
"""A stub with more upstream steps than this gets their results as one argument."""

LINE_LENGTH = 88
"""Longer lines get an argument a line, with a comma after the last, which all formatters keep."""

HEADER = '''"""Handlers of the pgflow workflow {name}; its steps and dependencies are in the database.{more}"""

from pydantic import JsonValue

from pgflow_prefect import {names}

{assignment}
'''

STUB = '''{decorator}
{signature}
    """Write the work of step {step} here, and remove `unimplemented`.{more}"""
{body}
'''

CHILD_IMPORT = "from pgflow_prefect import Child\n"
"""The import that a step needs that is a run of another workflow."""

FOOTER = "flow = workflow.flow\n"
IMPORT = "from pydantic import JsonValue\n"
"""The import that the annotations of a stub need."""

NAMES = ("JsonValue", "Workflow", "workflow", "flow")
"""Names that the file uses: a step of such a name gets a function of another name."""


@dataclass(frozen=True)
class ImportReport:
    """The changes of a file by an import.

    Attributes:
        path: the file.
        created: the file is new.
        added: the steps that got a stub.
        gone: steps with a handler in the file that the database no longer defines.
        stubs: the steps whose handler is a stub, the added ones among them.
    """

    path: Path
    created: bool
    added: tuple[str, ...]
    gone: tuple[str, ...]
    stubs: tuple[str, ...]


@dataclass(frozen=True)
class PlannedImport:
    """An import that is not written yet.

    Attributes:
        report: what it changes.
        content: the file's new content; None if it stays as it is.
    """

    report: ImportReport
    content: bytes | None

    def write(self) -> ImportReport:
        """Write the file in one move, and return what has changed.

        Raises:
            UsageError: it can't be written.
        """
        if self.content is not None:
            replace_file(self.report.path, self.content)
        return self.report


def import_workflow(definition: WorkflowDefinition, path: Path, origin: Origin = HERE) -> ImportReport:
    """Write the file of a workflow's handlers, or add stubs for the steps that it lacks.

    Existing handlers stay unchanged. The file is replaced in one move, or not at all.

    Raises:
        UsageError: the file can't be imported, or holds the handlers of another workflow.
    """
    return plan_import(definition, path, origin).write()


def plan_import(definition: WorkflowDefinition, path: Path, origin: Origin = HERE) -> PlannedImport:
    """Return what `import_workflow` would write.

    Raises:
        UsageError: the file can't be imported, or holds the handlers of another workflow.
    """
    graph = build_graph(definition)
    upstream = {slug: list(graph.predecessors(slug)) for slug in sort_steps(graph)}
    if not path.exists():
        header = HEADER.format(
            name=_in_docstring(definition.slug),
            names="Child, Workflow" if definition.children else "Workflow",
            more=_write_lines(origin.lines, ""),
            assignment=_join(
                "workflow = Workflow",
                [_literal(definition.slug), *_write_options(definition), *_write_keywords(origin.options)],
            ),
        )
        stubs = make_stubs(upstream, taken=NAMES, definition=definition, origin=origin)
        text = "\n\n".join([header, *stubs, FOOTER])
        written = tuple(slug for slug in upstream if slug not in definition.children)
        report = ImportReport(path, created=True, added=tuple(upstream), gone=(), stubs=written)
        return PlannedImport(report, text.encode())

    module = load_module(str(path))
    workflow = find_workflow(module, definition.slug, str(path))
    present = {*workflow.handlers, *workflow.stubs, *(definition.children.keys() & workflow.bindings.keys())}
    added = {slug: upstream[slug] for slug in upstream if slug not in present}
    content = None
    if added:
        names = vars(module)
        name = next(name for name, value in names.items() if value is workflow)
        json_type = "JsonValue" if names.get("JsonValue", JsonValue) is JsonValue else "object"
        stubs = make_stubs(added, name, json_type, taken=names, definition=definition, origin=origin)
        imported = "" if "JsonValue" in names else IMPORT
        if "Child" not in names and not added.keys().isdisjoint(definition.children):
            imported += CHILD_IMPORT
        content = insert_stubs(path.read_bytes(), stubs, name, imported)
    gone = tuple(slug for slug in sorted(present) if slug not in graph)
    report = ImportReport(
        path,
        created=False,
        added=tuple(added),
        gone=gone,
        stubs=(*workflow.stubs, *(slug for slug in added if slug not in definition.children)),
    )
    return PlannedImport(report, content)


def make_stubs(
    steps: Mapping[str, Collection[str]],
    workflow: str = "workflow",
    json_type: str = "JsonValue",
    taken: Iterable[str] = (),
    *,
    definition: WorkflowDefinition | None = None,
    origin: Origin = HERE,
) -> list[str]:
    """Return the Python source of each step's stub; it takes and returns JSON, because the database has no types.

    A step that is a run of another workflow is bound to that workflow.

    Args:
        steps: the steps, each with the slugs of its upstream steps.
        workflow: the name of the `Workflow` in the file.
        json_type: the file's name of the type for any JSON value.
        taken: names with another meaning in the file; no stub gets one of them.
        definition: says which rules the steps have, and which results they may lack.
        origin: says what else a stub gets.
    """
    names = {*taken, *dir(builtins)}
    stubs = []
    for slug, upstream in steps.items():
        name = to_identifier(slug)
        while name in names:
            name += "_"
        names.add(name)
        slugs = [] if name == slug else [_literal(slug)]
        message = [_literal(f"step {slug}")]
        rules = definition.find_rules(slug) if definition is not None else NO_RULES
        if rules.child is not None:
            stubs.append(_write_child(slug, rules, upstream, workflow))
            continue
        from_origin = origin.steps.get(slug, NOTHING)
        lacking = [each for each in upstream if definition is not None and find_lack(definition, slug, each)]
        stubs.append(
            STUB.format(
                decorator=_join(
                    f"@{workflow}.{'step' if rules.map is None else 'map'}",
                    [
                        *slugs,
                        *_write_keywords(_list_said(rules, upstream)),
                        *_write_keywords(from_origin.options),
                        "unimplemented=True",
                    ],
                ),
                signature=_join(
                    f"async def {name}", _make_arguments(rules, upstream, json_type, lacking), f" -> {json_type}:"
                ),
                step=_in_docstring(slug),
                more=_write_lines(from_origin.lines, "    "),
                body=indent(_join("raise NotImplementedError", message, width=LINE_LENGTH - 4), "    "),
            )
        )
    return stubs


def _write_child(slug: str, rules: StepRules, upstream: Collection[str], workflow: str) -> str:
    """Return the call that binds a step to the workflow that it is a run of."""
    assert rules.child is not None
    options: dict[str, JsonValue] = {"retries": rules.child.retries} if rules.child.retries else {}
    if rules.child.payload is not None:
        options["payload"] = ".".join(rules.child.payload)
    if rules.child.max_children is not None:
        options["max_children"] = rules.child.max_children
    child = f"Child({', '.join([_literal(rules.child.workflow), *_write_keywords(options)])})"
    source = None if rules.map is None else find_source(rules.map, upstream)
    said: dict[str, JsonValue] = {}
    if after := [each for each in sorted(upstream) if each != source]:
        said["after"] = [*after]
    said |= {name: each for name, each in _list_said(rules, upstream).items() if name != "child"}
    call = f"{workflow}.{'bind' if rules.map is None else 'bind_map'}"
    return _join(call, [_literal(slug), child, *_write_keywords(said)]) + "\n"


def _write_options(definition: WorkflowDefinition) -> list[str]:
    return _write_keywords({name: each for name, each in definition.said.items() if name != "rules"})


def _list_said(rules: StepRules, upstream: Collection[str]) -> dict[str, JsonValue]:
    """Return what is said of a step by the names of the decorator's arguments; a map says what it maps over, always."""
    said = {name: each for name, each in rules.said.items() if name != "map"}
    if rules.map is None:
        return said
    over = ".".join([find_source(rules.map, upstream), *rules.map.path])
    options = rules.map.model_dump(mode="json", exclude_defaults=True, exclude={"over", "path"})
    return {"over": over, **options, **said}


def _write_keywords(said: Mapping[str, JsonValue]) -> list[str]:
    return [f"{name}={_write_json(each)}" for name, each in said.items()]


def _write_json(value: JsonValue) -> str:
    """Return a JSON value as Python source, as formatters write it."""
    if isinstance(value, str):
        return _literal(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_write_json, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_write_json(each)}' for key, each in value.items())}}}"
    return repr(value)


def _write_lines(lines: Iterable[str], margin: str) -> str:
    """Return further lines of a docstring, which neither end it nor become escapes, and its last line."""
    written = [_escape_docstring(line) for line in lines]
    return "".join(f"\n{margin}{line}".rstrip(" ") for line in ["", *written]) + f"\n{margin}" if written else ""


def _escape_docstring(line: str) -> str:
    return clean(line).rstrip().replace("\\", "\\\\").replace('"""', "'''")


def _make_arguments(rules: StepRules, upstream: Collection[str], json_type: str, lacking: Collection[str]) -> list[str]:
    """Return the arguments of a stub; those whose result may be lacking have a default, and so stand last.

    A map gets an item, and the results of the other steps that it waits for.
    """
    if not upstream and rules.map is None:
        return [f"payload: {json_type}"]
    source = None if rules.map is None else find_source(rules.map, upstream)
    others = {each: _name_argument(each, rules) for each in sorted(upstream) if each != source}
    arguments = [] if rules.map is None else [f"{ITEM}: {json_type}"]
    if len(others) > MOST_ARGUMENTS:
        return [*arguments, f"upstream: dict[str, {json_type}]"]
    arguments += [f"{name}: {json_type}" for each, name in others.items() if each not in lacking]
    return arguments + [f"{name}: {json_type} = None" for each, name in others.items() if each in lacking]


def _name_argument(slug: str, rules: StepRules) -> str:
    """Return the argument that gets the result of an upstream step; a map has another one called `item`."""
    name = to_identifier(slug)
    return f"{name}_" if rules.map is not None and name == ITEM else name


def insert_stubs(source: bytes, stubs: Iterable[str], workflow: str, imported: str = "") -> bytes:
    """Return a file's source with stubs after its last handler, or at its end if it has none.

    Args:
        source: the file.
        stubs: from `make_stubs`.
        workflow: the name of the `Workflow` in the file.
        imported: an import that the stubs need; it goes after the last import above them.
    """
    newline = b"\r\n" if b"\r\n" in source else b"\n"
    if not source.endswith((b"\n", b"\r")):
        source += newline
    body = ast.parse(source).body
    handlers = [
        node
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _is_handler(node, workflow)
    ]
    imports = [node.end_lineno or 0 for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = source.splitlines(keepends=True)
    place = _find_end(lines, handlers[-1].end_lineno or 0) if handlers else len(lines)
    top = max((line for line in imports if line <= place), default=place)
    above, between, below = (b"".join(part) for part in (lines[:top], lines[top:place], lines[place:]))
    added = "\n\n" + "\n\n".join(stubs)
    if below.strip():
        blank = below[: len(below) - len(below.lstrip(b"\r\n"))].count(b"\n")
        added += "\n" * (2 - blank)
    inserted = [text.encode().replace(b"\n", newline) for text in (imported, added)]
    return b"".join((above, inserted[0], between, inserted[1], below))


def _find_end(lines: list[bytes], place: int) -> int:
    """Return the line after a function; Python's parser, which ignores comments, says that it ends at `place`."""
    for number, line in enumerate(lines[place:], place + 1):
        if line.strip() and not line[:1].isspace():
            break
        if line.strip():
            place = number
    return place


def _is_handler(node: ast.FunctionDef | ast.AsyncFunctionDef, workflow: str) -> bool:
    decorators = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
    return any(ast.unparse(each) in {f"{workflow}.step", f"{workflow}.map"} for each in decorators)


def _join(head: str, arguments: list[str], tail: str = "", width: int = LINE_LENGTH) -> str:
    """Return a call, or the head of a function, on one line or on several."""
    line = f"{head}({', '.join(arguments)}){tail}"
    if len(line) <= width:
        return line
    return "\n".join([f"{head}(", *(f"    {argument}," for argument in arguments), f"){tail}"])


def _literal(text: str) -> str:
    """Return the string as Python source, with quotes as formatters choose them: single ones only to save escapes."""
    if text.count('"') > text.count("'"):
        return repr(text)
    body = repr("'\"" + text)[4:-1]  # of both kinds, repr takes single quotes
    return '"' + body.replace("\\'", "'").replace('"', '\\"') + '"'


def _in_docstring(text: str) -> str:
    """Return the string for a docstring, so that it neither ends it nor becomes an escape."""
    return repr(text).replace('"', "'").replace("\\", "/")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it is the old one or the new one at each moment."""
    path = path.resolve()  # where a link leads to
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
            part.write(content)
        Path(part.name).chmod(path.stat().st_mode if path.exists() else 0o644)
        Path(part.name).replace(path)
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from error
