"""Modules of handler files whose own name is taken: `pgflow_prefect.by_path.statistics_1f0c2d3e`.

Two files may have one name, and a file may have the name of a library. Such a file gets a name of its own here.
Importing this package is enough to import such a module again by that name. A child process of a handler does so,
`multiprocessing` with the start method spawn for one: it has the parent's `sys.path`, and the file is in one of the
directories of that.
"""

import hashlib
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_DIGITS = 8


def name_module(path: Path) -> str:
    """Return the name of a file's module in this package; of no other file's.

    Args:
        path: absolute, without links.
    """
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:_DIGITS]
    return f"{__name__}.{_to_identifier(path)}_{digest}"


def make_spec(name: str, path: Path, loader: SourceFileLoader | None = None) -> ModuleSpec:
    """Return what a file is imported by under a name of this package; relative imports find what is beside it.

    Args:
        name: what `name_module` returned.
        path: the file.
        loader: reads it; Python's own where none is given.
    """
    spec = spec_from_file_location(
        name,
        path,
        loader=loader or SourceFileLoader(name, str(path)),
        submodule_search_locations=[str(path.parent)],
    )
    assert spec is not None
    return spec


class _Finder(MetaPathFinder):
    """Finds modules of this package in the directories of `sys.path`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{__name__}.") or fullname.count(".") != __name__.count(".") + 1:
            return None
        stem = fullname.removeprefix(f"{__name__}.")[: -_DIGITS - 1]
        for directory in [*sys.path]:
            for file in _list_files(Path(directory), stem):
                if name_module(file) == fullname:
                    return make_spec(fullname, file)
        return None


def _list_files(directory: Path, identifier: str) -> list[Path]:
    try:
        return [each.resolve() for each in directory.iterdir() if _to_identifier(each) == identifier]
    except OSError:  # an archive, or gone
        return []


def _to_identifier(path: Path) -> str:
    return re.sub(r"\W", "_", path.stem)


__path__ = []  # everything in it comes from the finder

if not any(isinstance(each, _Finder) for each in sys.meta_path):
    sys.meta_path.append(_Finder())
