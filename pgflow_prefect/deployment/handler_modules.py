"""Loads a file of handlers as a module: chooses its name, and resolves its imports.

A module has the name that Python would give it, `orders` or `flows.orders`, if that name is free. Then child processes
of its handlers can import it by that name from the directories of `sys.path`, and its loggers have a familiar name.
"""

import importlib
import sys
import sysconfig
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType

from pgflow_prefect import by_path
from pgflow_prefect.deployment.imports import find_imports
from pgflow_prefect.errors import UsageError

_STANDARD = [
    each
    for each in sys.path
    if each.startswith((sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")))
    and not {"site-packages", "dist-packages"} & {*Path(each).parts}
]
"""The folders of the standard library."""


class ModuleClashError(UsageError):
    """A module's name would mean two modules."""


@dataclass(frozen=True)
class Home:
    """The place of a file of handlers among all modules.

    Attributes:
        path: the file.
        name: its module's.
        directories: searched first for its imports.
        names: the top-level names that it imports, directly or not.
        origins: the file or folder of a name, if there is one.
        own: the names that are found in its directories.
    """

    path: Path
    name: str
    directories: tuple[Path, ...]
    names: frozenset[str]
    origins: Mapping[str, Path]
    own: frozenset[str]


_homes: dict[Path, Home] = {}


def load_file(path: Path) -> ModuleType:
    """Execute a file of handlers as a module, and return that.

    Args:
        path: absolute, without links.

    Raises:
        ModuleClashError: it imports a name that means another module in a file that was loaded before.
        Exception: the file raised it.
    """
    importlib.invalidate_caches()
    home = _make_home(path)
    _refuse_clash(home)
    known = _homes.get(path)
    _homes[path] = home
    if "." in home.name and not home.name.startswith(by_path.__name__):
        importlib.import_module(home.name.rpartition(".")[0])
    present = sys.modules.get(home.name)
    if present is not None and known is None and _find_origin(present.__spec__) == path:
        return present  # another file of handlers has just imported it
    module = _execute(home)
    _refuse_stale(home)
    return module


def load_named(name: str) -> ModuleType:
    """Import a module of handlers by its name; the working directory comes first.

    Raises:
        ModuleClashError: it imports a name that means another module in a file that was loaded before.
        Exception: the module raised it.
    """
    importlib.invalidate_caches()
    directory = Path.cwd()
    _import_from([directory])
    base = directory.joinpath(*name.split("."))
    for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
        if path.is_file():
            found = find_imports(path, [directory])
            names = found.names | {name.partition(".")[0]}
            home = Home(path, name, (directory,), names, *_find_origins(names, [directory], path))
            _refuse_clash(home)
            _homes[path] = home
            module = importlib.import_module(name)
            _refuse_stale(home)
            return module
    return importlib.import_module(name)


def find_loaded(path: Path) -> ModuleType | None:
    """Return the module that was loaded from a file; None if it was not loaded."""
    home = _homes.get(path)
    return sys.modules.get(home.name) if home is not None else None


# The name


def _make_home(path: Path) -> Home:
    level = find_imports(path, []).level
    depth = min(max(_count_packages(path), level), len(path.parents) - 1)
    roots = [path.parents[depth]] if depth else []
    directories = tuple(dict.fromkeys([path.parent, *roots, Path.cwd()]))
    _import_from(directories)
    found = find_imports(path, directories)
    name = ".".join([*path.parts[-1 - depth : -1], path.stem])
    names = set(found.names)
    if _is_free(name, path):
        names |= {name.partition(".")[0]} if depth else set()
    else:
        name = by_path.name_module(path)
    return Home(path, name, directories, frozenset(names), *_find_origins(names, directories, path))


def _count_packages(path: Path) -> int:
    count = 0
    while count < len(path.parents) - 1 and (path.parents[count] / "__init__.py").is_file():
        count += 1
    return count


def _is_free(name: str, path: Path) -> bool:
    """Tell whether every process with this `sys.path` would find the file, and nothing else, under a name."""
    first, *others = name.split(".")
    if path.suffix != ".py" or not all(map(str.isidentifier, name.split("."))) or first in sys.stdlib_module_names:
        return False
    wanted = path.parents[len(others) - 1] if others else path
    present = sys.modules.get(first)
    if present is not None and _find_origin(present.__spec__) != wanted:
        return False
    return _find_origin(PathFinder.find_spec(first)) == wanted


def _find_origin(spec: ModuleSpec | None) -> Path | None:
    """Return the file of a module, or the folder of a package; None if it has several or none."""
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        folders = [*spec.submodule_search_locations]
        return Path(folders[0]).resolve() if len(folders) == 1 else None
    return Path(spec.origin).resolve() if spec.origin is not None and spec.has_location else None


# What imports find


def _import_from(directories: Sequence[Path]) -> None:
    """Let imports find modules in these directories, after installed modules: child processes know only `sys.path`."""
    for directory in directories:
        if str(directory) not in sys.path:
            sys.path.append(str(directory))
    if not any(isinstance(each, _Finder) for each in sys.meta_path):
        place = sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else len(sys.meta_path)
        sys.meta_path.insert(place, _Finder())


def _find_origins(
    names: Collection[str], directories: Sequence[Path], path: Path
) -> tuple[dict[str, Path], frozenset[str]]:
    """Return `origins` and `own` of `Home`; names of the standard library always mean the standard library."""
    origins: dict[str, Path] = {}
    own = set()
    for name in {*names} - sys.stdlib_module_names:
        spec = _find_own(name, directories, path)
        if spec is not None:
            own.add(name)
        if (origin := _find_origin(spec or _find_installed(name))) is not None:
            origins[name] = origin
    return origins, frozenset(own)


def _find_own(name: str, directories: Sequence[Path], importer: Path) -> ModuleSpec | None:
    """Return the user's module that a name means in a file; None for an installed module, or if there is none.

    The standard library always wins. Then, as in Python, a module beside the file wins over an installed one. A file of
    handlers does not win, nor does a folder that only has the name: people name `flows/pandas.py` after its use.
    """
    own = PathFinder.find_spec(name, [*map(str, directories)])
    if own is None:
        return None
    is_weak = own.loader is None or own.origin == str(importer) or _holds_handlers(own)
    return None if is_weak and _find_installed(name) else own


def _find_installed(name: str) -> ModuleSpec | None:
    """Return the installed module or package of a name."""
    users = {directory for home in _homes.values() for directory in home.directories} | {Path.cwd()}
    spec = PathFinder.find_spec(name, [each for each in sys.path if Path(each).resolve() not in users])
    return spec if spec is not None and spec.loader is not None else None


def _holds_handlers(spec: ModuleSpec) -> bool:
    if spec.origin is None or not spec.origin.endswith(".py"):
        return False
    return b"pgflow_prefect" in Path(spec.origin).read_bytes()


class _Finder(MetaPathFinder):
    """Finds the modules that files of handlers import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None:  # in a package, which is found already
            return None
        if fullname in sys.stdlib_module_names:  # also where the working directory comes first in `sys.path`
            return PathFinder.find_spec(fullname, _STANDARD)
        for home in _list_active():
            if fullname not in home.own:
                continue
            origin = home.origins.get(fullname)
            loaded = find_loaded(origin) if origin is not None else None
            if loaded is not None and loaded.__name__ != fullname:
                return ModuleSpec(fullname, _Alias(loaded), origin=str(origin))
            return PathFinder.find_spec(fullname, [*map(str, home.directories)])
        return None


class _Alias(Loader):
    """Imports a file of handlers that was loaded under another name, without executing it again."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = self._module


def _list_active() -> Iterator[Home]:
    """Yield the files that are loaded, or are being loaded."""
    for home in [*_homes.values()]:
        module = sys.modules.get(home.name)
        if module is not None and getattr(module, "__file__", None) == str(home.path):
            yield home


def _refuse_clash(home: Home) -> None:
    """Refuse a file in which a name means another module than in this process so far.

    Raises:
        ModuleClashError: with both modules.
    """
    for other in _list_active():
        for name in sorted(home.origins.keys() & other.origins.keys()):
            ours, theirs = home.origins[name], other.origins[name]
            if other.path != home.path and ours != theirs:
                raise ModuleClashError(
                    f"{home.path} and {other.path} both import {name!r}, and mean different modules: {ours} and "
                    f"{theirs}. One process can have one module of a name: start a process for each file, or rename "
                    "one of the modules"
                )
    for name in sorted(home.own & home.origins.keys()):
        present = sys.modules.get(name)
        there = _find_origin(present.__spec__) if present is not None else None
        if there not in {None, home.origins[name]}:
            raise ModuleClashError(
                f"{home.path} imports {name!r}, which is {home.origins[name]}, and this process has {there} under that "
                "name already: rename the module"
            )


def _refuse_stale(home: Home) -> None:
    """Refuse a file that imported a module of another file, which may have changed `sys.path`.

    Raises:
        ModuleClashError: with both modules.
    """
    for name in sorted(home.names - home.own - sys.stdlib_module_names):
        present = sys.modules.get(name)
        there = _find_origin(present.__spec__) if present is not None else None
        meant = _find_origin(PathFinder.find_spec(name)) if there is not None else None
        if meant not in {None, there}:
            raise ModuleClashError(
                f"{home.path} imports {name!r}, which is {meant}, and this process has {there} under that name "
                "already: start a process for each file, or rename one of the modules"
            )


# Executing it


class _UncachedLoader(SourceFileLoader):
    """Compiles the source each time, because Python's cache confuses files of the same size and second."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _execute(home: Home) -> ModuleType:
    loader = _UncachedLoader(home.name, str(home.path))
    if home.name.startswith(by_path.__name__):
        spec = by_path.make_spec(home.name, home.path, loader)
    else:
        found = spec_from_file_location(home.name, home.path, loader=loader)
        assert found is not None
        spec = found
    module = module_from_spec(spec)
    sys.modules[home.name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        sys.modules.pop(home.name, None)
        raise
    package, _, stem = home.name.rpartition(".")
    if package:
        setattr(sys.modules[package], stem, module)
    return module
