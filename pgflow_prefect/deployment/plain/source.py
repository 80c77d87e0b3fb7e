"""The source of a workflow's handlers without this package: what an exported file takes over from theirs."""

import ast
import inspect
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pgflow_prefect
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.python import PythonHandler

KEPT = frozenset({"Branch", "Skip", "FailedStep", "StepContext", "AsyncStepContext", "ItemContext", "AsyncItemContext"})
"""Names of this package that an exported file has itself."""

_PACKAGE = "pgflow_prefect"
_EVERYTHING = frozenset(pgflow_prefect.__all__)
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
        text = path.read_text(encoding="utf-8-sig")
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
        self._names = names
        # Python's lines: str.splitlines would also end them at a form feed, or at a separator within a text.
        self._lines = [f"{line}\n" for line in text.split("\n")]
        self._body = ast.parse(text).body
        self._shared = _find_shared_lines(self._body)
        self._gone = {_PACKAGE, *_find_gone(self._body)}
        self._workflows = {*self._find_workflows()}
        self._uses: dict[str, set[str]] = {}  # the names that a function uses, by its own
        self._lost: list[str] = []
        self._imports: set[str] = set()

    def cut(self) -> HandlerSource:
        """Return what stays."""
        defined: Counter[str] = Counter()
        there: set[str] = set()
        parts = []
        for node in self._body:
            kept = self._take(node)
            if kept is not None:
                parts.append(kept)
                defined.update(_list_defined(node))
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    there.add(node.name)
                elif isinstance(node, ast.ImportFrom):  # of a function that another module has
                    there.update(each.name for each in node.names if each.asname is None)
        # A name that is defined twice is that of its last function, perhaps of another step.
        functions = {slug: name for slug, name in self._names.items() if name in there and defined[name] == 1}
        for name in self._uses:
            if name in there and (used := sorted(each for each in self._uses[name] if each in self._gone)):
                self._lost.append(f"function {name} uses {', '.join(used)}, which is not there any more: it fails")
        return HandlerSource("".join(parts).strip("\n"), functions, tuple(self._lost), frozenset(self._imports))

    def _find_workflows(self) -> Iterator[str]:
        called = {"Workflow"}
        for node in self._body:
            if isinstance(node, ast.ImportFrom):
                called |= {each.asname for each in node.names if each.name == "Workflow" and each.asname is not None}
            elif _get_called(node) in called:
                yield from _list_defined(node)

    def _take(self, node: ast.stmt) -> str | None:
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                return None  # the docstring
            case ast.ImportFrom() | ast.Import():
                return self._take_import(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                return self._take_function(node)
        if _is_for_type_checks(node) and _imports_ours(node):
            return None  # no import of it is ever executed
        if _is_main(node) or _imports_ours(node) or self._needs_gone(node):
            self._drop(node)
            return None
        return self._copy(node)

    def _drop(self, node: ast.stmt) -> None:
        """Leave a statement out; what it would have defined is gone, too."""
        self._gone |= _list_defined(node)
        if not self._is_known(node):
            self._lose(node)

    def _is_known(self, node: ast.stmt) -> bool:
        """Tell whether a statement makes the workflow or its flow: an exported file has these otherwise."""
        names = _list_defined(node)
        if names and names <= self._workflows:
            return True
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        return isinstance(value, ast.Attribute) and value.attr == "flow"

    def _lose(self, node: ast.AST, what: str = "") -> None:
        line = getattr(node, "lineno", 0)
        self._lost.append(f"line {line} of the handlers' file is left out: {what}{ast.unparse(node)[:100]}")

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
        if isinstance(node, ast.Import):
            return self._take_other_imports(node)
        names = [each.name for each in node.names if each.name not in {*KEPT, "Workflow"}]
        renamed = [each for each in node.names if each.asname is not None and each.name in KEPT]
        if names:
            self._lost.append(
                f"the handlers' file uses {', '.join(names)} of pgflow_prefect, which is not there any more"
            )
        return "".join(f"{each.asname} = {each.name}\n" for each in renamed) or None

    def _take_other_imports(self, node: ast.Import) -> str | None:
        """Return an `import` of several modules without those of this package."""
        others = [each for each in node.names if each.name.partition(".")[0] != _PACKAGE]
        self._imports |= {each.name.partition(".")[0] for each in others}
        self._lost.append("the handlers' file uses the module pgflow_prefect, which is not there any more")
        return f"{ast.unparse(ast.Import(names=others))}\n" if others else None

    def _take_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
        ours = [each for each in node.decorator_list if self._needs_gone(each)]
        if any(_is_stub(each) for each in ours):
            return None
        arguments = node.args
        if any(each is not None and self._needs_gone(each) for each in [*arguments.defaults, *arguments.kw_defaults]):
            self._drop(node)
            return None
        for each in ours:
            if not self._declares(each):
                self._lose(each, f"of function {node.name}, @")
        self._uses[node.name] = _list_used(node)
        kept = [each for each in node.decorator_list if each not in ours]
        if id(node) in self._shared:
            node.decorator_list = kept
            return f"\n\n{ast.unparse(node)}\n"
        lines = "".join(self._get_decorator(each) for each in kept)
        return f"\n\n{lines}{self._get_lines(node.lineno, node.end_lineno)}"

    def _declares(self, decorator: ast.expr) -> bool:
        """Tell whether a decorator is one of a workflow that declares a step: the exported file has these otherwise."""
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        return (
            isinstance(called, ast.Attribute)
            and called.attr in _DECLARED
            and isinstance(called.value, ast.Name)
            and called.value.id in self._workflows
        )

    def _get_decorator(self, decorator: ast.expr) -> str:
        return f"@{ast.unparse(decorator)}\n"

    def _needs_gone(self, node: ast.AST) -> bool:
        """Tell whether a part of the file needs a name that is gone, also by the functions that it names."""
        seen: set[str] = set()
        waiting = [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
        while waiting:
            name = waiting.pop()
            if name in self._gone:
                return True
            if name not in seen:
                seen.add(name)
                waiting += self._uses.get(name, ())
        return False

    def _copy(self, node: ast.stmt) -> str:
        if id(node) in self._shared:
            return f"{ast.unparse(node)}\n"
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        before = "\n\n" if isinstance(node, ast.ClassDef) else ""
        return f"{before}{self._get_lines(first, node.end_lineno)}"

    def _get_lines(self, first: int, last: int | None) -> str:
        return "".join(self._lines[first - 1 : last])


def _find_shared_lines(body: Sequence[ast.stmt]) -> set[int]:
    """Return the ids of the statements that have a line together with another."""
    shared: set[int] = set()
    for above, node in pairwise(body):
        if node.lineno == above.end_lineno:
            shared |= {id(above), id(node)}
    return shared


def _find_gone(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Return the names that a file imports from this package, and that an exported file does not have."""
    for top in body:
        for node in ast.walk(top):
            names = node.names if isinstance(node, ast.Import | ast.ImportFrom) and _is_ours(node) else []
            for each in names:
                if isinstance(node, ast.ImportFrom) and each.name not in KEPT:
                    yield from _EVERYTHING - KEPT if each.name == "*" else [each.asname or each.name]
                elif isinstance(node, ast.Import) and each.name.partition(".")[0] == _PACKAGE:
                    yield each.asname or _PACKAGE


def _is_ours(node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.ImportFrom):
        return not node.level and (node.module or "").partition(".")[0] == _PACKAGE
    return any(each.name.partition(".")[0] == _PACKAGE for each in node.names)


def _imports_ours(node: ast.AST) -> bool:
    return any(isinstance(each, ast.Import | ast.ImportFrom) and _is_ours(each) for each in ast.walk(node))


def _is_main(node: ast.stmt) -> bool:
    """Tell whether a statement is the part of a file for its use as a program: an exported file has its own."""
    return isinstance(node, ast.If) and any(
        isinstance(each, ast.Name) and each.id == "__name__" for each in ast.walk(node.test)
    )


def _is_for_type_checks(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING" and not node.orelse


def _get_called(node: ast.stmt) -> str:
    """Return the name of what an assignment calls."""
    if not (isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call)):
        return ""
    called = node.value.func
    return called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")


def _list_used(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Return the names of the file that a function uses when it is called."""
    own = {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}
    parts = [*node.body, node.args, *([node.returns] if node.returns is not None else [])]
    names = [each for part in parts for each in ast.walk(part) if isinstance(each, ast.Name)]
    own |= {each.id for each in names if isinstance(each.ctx, ast.Store)}
    return ({each.id for each in names} - own) | ({_PACKAGE} if _imports_ours(node) else set())


def _is_stub(decorator: ast.expr) -> bool:
    keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
    return any(each.arg == "unimplemented" and ast.unparse(each.value) == "True" for each in keywords)


def find_branches(source: HandlerSource) -> frozenset[str]:
    """Return the steps whose handlers may choose branches: those that name `Branch`, or a function that does."""
    body, names = ast.parse(source.code).body, {"Branch"}
    while new := {name for node in body if _mentions(node, names) for name in _list_defined(node)} - names:
        names |= new
    return frozenset(slug for slug, name in source.functions.items() if name in names)


def find_whole(source: HandlerSource) -> bool:
    """Tell whether the source gives an argument `whole` somewhere, as `Branch` takes it."""
    return any(isinstance(each, ast.keyword) and each.arg == "whole" for each in ast.walk(ast.parse(source.code)))


def list_attributes(source: HandlerSource) -> frozenset[str]:
    """Return the names of all attributes that the source reads."""
    return frozenset(each.attr for each in ast.walk(ast.parse(source.code)) if isinstance(each, ast.Attribute))


def _mentions(node: ast.stmt, names: Collection[str]) -> bool:
    """Tell whether a statement uses one of these names, or has the text of an annotation with `Branch`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        used = _list_used(node)
    else:
        used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return not used.isdisjoint(names) or any(
        isinstance(each, ast.Constant) and isinstance(each.value, str) and "Branch" in each.value
        for each in ast.walk(node)
    )


def list_names(source: HandlerSource) -> frozenset[str]:
    """Return the names that the source has at its top."""
    return list_top(source.code)


def list_top(code: str) -> frozenset[str]:
    """Return the names that a source has at its top: of functions, classes, imports and assignments."""
    return frozenset(name for node in ast.parse(code).body for name in _list_defined(node))


def _list_defined(node: ast.stmt) -> set[str]:
    """Return the names that a statement at the top of a file defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    found: set[str] = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Import | ast.ImportFrom):
            found.update((name.asname or name.name).partition(".")[0] for name in each.names)
        elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(each.name)
        elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            found.add(each.id)
    return found
