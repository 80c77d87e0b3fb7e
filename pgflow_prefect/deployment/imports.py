"""Finds the imports in the text of a Python file, without executing it."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MOST_FILES = 100
"""Files that are read for one file of handlers, so that it never reads a project's whole application."""


@dataclass(frozen=True)
class FoundImports:
    """The imports of a file, and of the modules that it imports.

    Attributes:
        names: top-level names, such as `helpers` of `import helpers.mail`.
        level: how many directories up the file itself imports relatively: 1 for `from . import x`, 0 for not at all.
    """

    names: frozenset[str]
    level: int


@dataclass
class _Search:
    beneath: Path
    directories: Sequence[Path]
    names: set[str] = field(default_factory=set)
    seen: set[Path] = field(default_factory=set)
    waiting: list[Path] = field(default_factory=list)

    def add(self, file: Path) -> None:
        is_near = len(self.seen) < MOST_FILES and file.is_relative_to(self.beneath)
        if is_near and file not in self.seen and file.is_file():
            self.seen.add(file)
            self.waiting.append(file)

    def follow(self, base: Path, parts: Sequence[str]) -> None:
        """Also read each file beneath a directory that an import of this dotted name executes."""
        for part in parts:
            self.add(base / f"{part}.py")
            base /= part
            self.add(base / "__init__.py")

    def read(self, file: Path) -> int:
        level = 0
        for node in _parse(file):
            if isinstance(node, ast.Call):
                self.take(_find_dynamic(node))
            elif isinstance(node, ast.Import):
                self.take(name.name for name in node.names)
            elif node.level == 0:
                self.take(f"{node.module}.{name.name}" for name in node.names)
            else:
                level = max(level, node.level)
                for name in node.names:
                    beneath = [*(node.module or "").split("."), name.name]
                    self.follow(file.parents[min(node.level, len(file.parents)) - 1], [*filter(None, beneath)])
        return level

    def take(self, dotted: Iterator[str]) -> None:
        for each in dotted:
            parts = each.split(".")
            self.names.add(parts[0])
            for directory in self.directories:
                if (directory / parts[0]).is_dir() or (directory / f"{parts[0]}.py").is_file():
                    self.follow(directory, parts)
                    break


def find_imports(file: Path, directories: Sequence[Path]) -> FoundImports:
    """Return the imports of a file, also in functions, and of the files beside and beneath it that it imports.

    Args:
        file: a Python file.
        directories: searched for modules by name.
    """
    search = _Search(file.parent, directories)
    search.seen.add(file)
    level = search.read(file)
    while search.waiting:
        search.read(search.waiting.pop())
    return FoundImports(frozenset(search.names), level)


def _parse(file: Path) -> Iterator[ast.Import | ast.ImportFrom | ast.Call]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # its import will say what is wrong
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
            yield node


def _find_dynamic(call: ast.Call) -> Iterator[str]:
    """Yield the name in `importlib.import_module("helpers")`."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    first = call.args[0] if call.args else None
    if name in {"import_module", "__import__"} and isinstance(first, ast.Constant) and isinstance(first.value, str):
        yield first.value
