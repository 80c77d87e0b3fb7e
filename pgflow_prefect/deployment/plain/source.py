"""The source of a workflow's handlers without this package: what an exported file takes over from theirs."""

import ast
import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.python import PythonHandler

KEPT = frozenset({"Branch", "Skip", "StepContext", "AsyncStepContext", "ItemContext", "AsyncItemContext"})
"""Names of this package that an exported file has itself."""

_PACKAGE = "pgflow_prefect"
_DECLARED = frozenset({"step", "map"})


@dataclass(frozen=True)
class HandlerSource:
    """What an exported file has of the handlers' file.

    Attributes:
        code: its source, without workflows and without this package.
        functions: the names of the handlers in it, by step slug.
        lost: sentences on what is left out.
        imports: the top-level packages that it imports.
    """

    code: str
    functions: Mapping[str, str]
    lost: tuple[str, ...]
    imports: frozenset[str]


NO_SOURCE = HandlerSource("", {}, (), frozenset())


def read_source(path: Path, handlers: Mapping[str, PythonHandler]) -> HandlerSource:
    """Return the part of a file that its handlers need.

    Args:
        path: the file of handlers.
        handlers: the functions that are no stubs, by step slug.

    Raises:
        UsageError: the file can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} can't be read: export needs the source of the handlers") from error
    return _Cutter(text, _find_names(handlers)).cut()


def _find_names(handlers: Mapping[str, PythonHandler]) -> dict[str, str]:
    """Return the names of those handlers that are functions at the top of a file."""
    names = {slug: getattr(inspect.unwrap(each.function), "__qualname__", "") for slug, each in handlers.items()}
    return {slug: name for slug, name in names.items() if name.isidentifier()}


class _Cutter:
    """Takes the statements of a file that stay."""

    def __init__(self, text: str, names: Mapping[str, str]) -> None:
        self._text, self._names = text, names
        self._lines = text.splitlines(keepends=True)
        self._body = ast.parse(text).body
        self._workflows = {*self._find_workflows()}
        self._lost: list[str] = []
        self._imports: set[str] = set()

    def cut(self) -> HandlerSource:
        """Return what stays."""
        there: set[str] = set()
        parts = []
        for node in self._body:
            kept = self._take(node)
            if kept is not None:
                parts.append(kept)
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    there.add(node.name)
                elif isinstance(node, ast.ImportFrom):  # of a function that another module has
                    there.update(each.name for each in node.names if each.asname is None)
        functions = {slug: name for slug, name in self._names.items() if name in there}
        return HandlerSource("".join(parts).strip("\n"), functions, tuple(self._lost), frozenset(self._imports))

    def _find_workflows(self) -> Iterator[str]:
        for node in self._body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                called = node.value.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                if name == "Workflow":
                    yield from (each.id for each in node.targets if isinstance(each, ast.Name))

    def _take(self, node: ast.stmt) -> str | None:
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                return None  # the docstring
            case ast.ImportFrom() | ast.Import():
                return self._take_import(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                return self._take_function(node)
        if self._names_workflow(node):
            if not _is_known(node):
                self._lose(node)
            return None
        return self._copy(node)

    def _lose(self, node: ast.stmt) -> None:
        self._lost.append(f"line {node.lineno} of the handlers' file is left out: {ast.unparse(node)[:100]}")

    def _take_import(self, node: ast.Import | ast.ImportFrom) -> str | None:
        if isinstance(node, ast.Import):
            tops = {each.name.partition(".")[0] for each in node.names}
        else:
            tops = {"" if node.level else (node.module or "").partition(".")[0]}
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return None
        if _PACKAGE not in tops:
            self._imports |= tops - {""}
            if "" in tops:
                self._lost.append(
                    f"line {node.lineno} imports {ast.unparse(node)[:80]}: keep that module beside the file"
                )
            return self._copy(node)
        names = [each.name for each in node.names if each.name not in {*KEPT, "Workflow"}]
        renamed = [each for each in node.names if each.asname is not None and each.name in KEPT]
        if names:
            self._lost.append(
                f"the handlers' file uses {', '.join(names)} of pgflow_prefect, which is not there any more"
            )
        return "".join(f"{each.asname} = {each.name}\n" for each in renamed) or None

    def _take_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
        ours = [each for each in node.decorator_list if self._names_workflow(each)]
        if any(_is_stub(each) for each in ours):
            return None
        kept = [each for each in node.decorator_list if each not in ours]
        lines = "".join(self._get_lines(each.lineno, each.end_lineno) for each in kept)
        return f"\n\n{lines}{self._get_lines(node.lineno, node.end_lineno)}"

    def _names_workflow(self, node: ast.AST) -> bool:
        return any(isinstance(each, ast.Name) and each.id in self._workflows for each in ast.walk(node)) or (
            isinstance(node, ast.Assign)
            and any(isinstance(each, ast.Name) and each.id in self._workflows for each in node.targets)
        )

    def _copy(self, node: ast.stmt) -> str:
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        before = "\n\n" if isinstance(node, ast.ClassDef) else ""
        return f"{before}{self._get_lines(first, node.end_lineno)}"

    def _get_lines(self, first: int, last: int | None) -> str:
        text = "".join(self._lines[first - 1 : last])
        return text if text.endswith("\n") else f"{text}\n"


def _is_known(node: ast.stmt) -> bool:
    """Tell whether a statement makes the workflow or its flow: an exported file has these otherwise."""
    if not isinstance(node, ast.Assign):
        return False
    called = node.value.func if isinstance(node.value, ast.Call) else node.value
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return name in {"Workflow", "flow"}


def _is_stub(decorator: ast.expr) -> bool:
    keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
    return any(each.arg == "unimplemented" and ast.unparse(each.value) == "True" for each in keywords)


def find_branches(source: HandlerSource) -> frozenset[str]:
    """Return the steps whose handlers may choose branches: those that name `Branch`."""
    if not source.code:
        return frozenset()
    found = {
        node.name
        for node in ast.parse(source.code).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _mentions(node, {"Branch"})
    }
    return frozenset(slug for slug, name in source.functions.items() if name in found)


def _mentions(node: ast.AST, names: Collection[str]) -> bool:
    return any(isinstance(each, ast.Name) and each.id in names for each in ast.walk(node)) or any(
        isinstance(each, ast.Constant) and isinstance(each.value, str) and any(name in each.value for name in names)
        for each in ast.walk(node)
    )


def list_names(source: HandlerSource) -> frozenset[str]:
    """Return the names that the source has at its top."""
    return list_top(source.code)


def list_top(code: str) -> frozenset[str]:
    """Return the names that a source has at its top: of functions, classes, imports and assignments."""
    found: set[str] = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update((each.asname or each.name).partition(".")[0] for each in node.names)
        else:
            found.update(
                each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
            )
    return frozenset(found)
