"""Reads the annotations of a handler, for any kind of function and any source of its names."""

import ast
import functools
import inspect
import linecache
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import MethodType
from typing import Any, get_type_hints


def find_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a handler by argument, and of its result as `return`.

    A name that the file imports under `TYPE_CHECKING` only is imported now: at this time no circle of imports is left.

    Args:
        function: a function, a method, a `functools.partial`, or an object with `__call__`.

    Raises:
        NameError: an annotation names something that is not defined; the message says where it is imported.
        TypeError: the function has no readable annotations.
    """
    annotated = _find_annotated(function)
    resolved: dict[str, Any] = {}
    while True:
        try:
            return get_type_hints(annotated, localns=resolved or None, include_extras=True)
        except NameError as error:
            if error.name is None or error.name in resolved:
                raise
            resolved[error.name] = _import_guarded(annotated, error)


def _find_annotated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that has the annotations."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, MethodType) or inspect.isroutine(function) or inspect.isclass(function):
        return function
    found: Callable[..., Any] = type(function).__call__
    return found


def _import_guarded(function: Callable[..., Any], missing: NameError) -> Any:  # noqa: ANN401  whatever has the name
    """Import what a file imports under `TYPE_CHECKING` only.

    Raises:
        NameError: no such import has the name, or it fails.
    """
    assert missing.name is not None
    for node in _list_guarded(function):
        for each in node.names:
            if (each.asname or each.name.partition(".")[0]) != missing.name:
                continue
            try:
                return _import(node, each, inspect.unwrap(function).__globals__)
            except Exception as error:
                raise NameError(
                    f"{missing}: line {node.lineno} imports it under TYPE_CHECKING only, and importing it now fails: "
                    f"{type(error).__name__}: {error}. Move the import out of `if TYPE_CHECKING:`",
                    name=missing.name,
                ) from error
    raise missing


def _import(node: ast.Import | ast.ImportFrom, alias: ast.alias, names: dict[str, Any]) -> Any:  # noqa: ANN401
    if isinstance(node, ast.Import):
        module = import_module(alias.name)
        return module if alias.asname else sys.modules[alias.name.partition(".")[0]]
    package = names.get("__package__") or names.get("__name__")
    source = import_module("." * node.level + (node.module or ""), package)
    if hasattr(source, alias.name):
        return getattr(source, alias.name)
    return import_module(f"{source.__name__}.{alias.name}")


def _list_guarded(function: Callable[..., Any]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that stand under `if TYPE_CHECKING:` in the file of a function."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return
    try:
        tree = ast.parse("".join(linecache.getlines(code.co_filename)))
    except SyntaxError:
        return
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING"):
            for node in block.body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    yield node
