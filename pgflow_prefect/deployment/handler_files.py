"""Finds and loads the Python file of a workflow's handlers."""

import asyncio
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from pgflow_prefect.definitions.model import to_identifier
from pgflow_prefect.deployment.handler_modules import ModuleClashError, find_loaded, load_file, load_named
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.raised import describe, is_from_signal
from pgflow_prefect.wording import suggest
from pgflow_prefect.workflow import Workflow

T = TypeVar("T")

DIRECTORY = Path("flows")
"""The folder of handlers, relative to the working directory."""

_INSTALLED = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_NOT_THE_USERS = (str(Path(__file__).parent.parent), *_INSTALLED, "<")
"""The beginnings of file names that belong to Python, to a library, or to no file."""


def default_path(workflow_slug: str, directory: Path = DIRECTORY) -> Path:
    """Return the file where `import` writes a workflow's handlers, and where `run` looks for them."""
    return directory / f"{to_identifier(workflow_slug)}.py"


def refuse_shadowing(workflow_slug: str, path: Path) -> None:
    """Check that a new file does not hide a module of Python or of a package from the files beside it.

    Raises:
        UsageError: the file would hide one.
    """
    name = path.stem
    if path.exists() or not _is_module(name):
        return
    raise UsageError(
        f"{path} would hide the module {name!r} of Python or of an installed package from all files beside it: rename "
        f"the workflow {workflow_slug!r}, or write its handlers into a file of another name and give that as --handlers"
    )


def _is_module(name: str) -> bool:
    if name in sys.stdlib_module_names or name in sys.builtin_module_names:
        return True
    here = str(Path.cwd())
    elsewhere = [each for each in sys.path if each and each != here]  # the user's own module hides nothing
    try:
        found = PathFinder.find_spec(name, elsewhere)
    except (ImportError, ValueError):
        return False
    return found is not None and found.loader is not None  # without it, the directory only has the same name


BY_ROWS = "rows of pgflow_prefect.bindings"
"""The source of a workflow that has no handlers in Python."""


def load_workflow(workflow_slug: str, handlers: str | None = None, *, has_rows: bool = False) -> tuple[Workflow, str]:
    """Load the handlers of a workflow.

    Args:
        workflow_slug: the workflow.
        handlers: a file (`path/to/file.py`) or a module (`package.module`); by default `flows/<identifier>.py`.
        has_rows: rows bind some or all of its steps, so it needs no file.

    Returns:
        The workflow, and the file or module that it was found in, or `BY_ROWS`.

    Raises:
        UsageError: there is no such file or module, it can't be imported, or it has no handlers of this workflow.
    """
    if handlers is None:
        path = default_path(workflow_slug)
        if not path.is_file() and has_rows:
            return Workflow(workflow_slug), BY_ROWS
        if not path.is_file():
            raise UsageError(
                f"workflow {workflow_slug!r} has no handlers here: {path} does not exist; "
                f"write it with `pgflow-prefect import {workflow_slug}`, name another file with --handlers, or say "
                f"who does its steps with `pgflow-prefect bind {workflow_slug}`"
            )
        handlers = str(path)
    return find_workflow(load_module(handlers), workflow_slug, handlers), handlers


def find_handlers(workflow_slug: str, handlers: str | None = None) -> tuple[Workflow | None, str]:
    """Load the handlers of a workflow if they are here; for arguments and return value, see `load_workflow`.

    Returns:
        No workflow if none was named and the file that `import` would write does not exist.

    Raises:
        UsageError: the file or module can't be loaded, or the named one does not exist.
    """
    path = default_path(workflow_slug)
    if handlers is None and not path.is_file():
        return None, str(path)
    return load_workflow(workflow_slug, handlers)


def load_workflows(sources: Iterable[str]) -> dict[str, tuple[Workflow, str]]:
    """Load all workflows of several files or modules, by slug, each with where it was found.

    Raises:
        UsageError: one can't be imported, has no workflow, or makes the same workflow as another.
    """
    found = {source: list_workflows(load_module(source)) for source in sources}
    for source, workflows in found.items():
        if not workflows:
            raise UsageError(f"{source} has no handlers: it has no Workflow")
    return _gather(found)


def load_directory() -> dict[str, tuple[Workflow, str]]:
    """Load all workflows of flows/*.py, as `load_workflows` does; files without a workflow are modules of the others.

    Raises:
        UsageError: one can't be imported, or makes the same workflow as another.
    """
    return _gather({source: list_workflows(load_module(source)) for source in sorted(map(str, DIRECTORY.glob("*.py")))})


def _gather(found: Mapping[str, Mapping[str, Workflow]]) -> dict[str, tuple[Workflow, str]]:
    by_slug: dict[str, dict[str, Workflow]] = {}
    for source, workflows in found.items():
        for slug, workflow in workflows.items():
            by_slug.setdefault(slug, {})[source] = workflow
    return {slug: _choose_source(slug, by_source) for slug, by_source in by_slug.items()}


def _choose_source(slug: str, by_source: dict[str, Workflow]) -> tuple[Workflow, str]:
    """Return a workflow and its file: if several files have it, the one that makes it.

    Raises:
        UsageError: several files make it.
    """
    own = [source for source, each in by_source.items() if each.source == _find_file(source)]
    sources = own if len(own) == 1 else [*by_source]
    if len(sources) > 1:
        raise UsageError(f"workflow {slug!r} has handlers in both {sources[0]} and {sources[1]}: name one")
    return by_source[sources[0]], sources[0]


def _find_file(source: str) -> Path | None:
    file = getattr(find_module(source), "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None


def list_workflows(module: ModuleType) -> dict[str, Workflow]:
    """Return the workflows among a module's names, by slug."""
    workflows = {value.slug: value for value in vars(module).values() if isinstance(value, Workflow)}
    for workflow in workflows.values():
        workflow.belong_to(module)
    return workflows


def load_module(source: str) -> ModuleType:
    """Import a file or a module, so that it can import the modules beside it.

    Within an event loop, a thread imports it. At the top of a file, `Secret.load(…)` then returns the secret; in the
    event loop it would return a coroutine.

    Raises:
        UsageError: with the place of the error in the user's code.
    """
    if is_file(source) and not Path(source).is_file():
        raise UsageError(f"there is no file {source}")
    try:
        return _outside_event_loop(lambda: load_file(_resolve(source)) if is_file(source) else load_named(source))
    except ModuleClashError as error:
        raise UsageError(f"{source} can't be imported: {error}") from error
    except BaseException as error:
        if is_from_signal(error):
            raise
        if isinstance(error, ModuleNotFoundError) and not is_file(source) and source.startswith(error.name or source):
            raise UsageError(f"there is no module {source!r}. {_suggest_file(source)}") from error
        raise UsageError(f"{source} can't be imported: {_locate(error)}") from error


def _suggest_file(source: str) -> str:
    """Return what to write for what is no module: it may be a workflow's name, or a file's without its end."""
    for path in (default_path(source), Path(f"{source}.py")):
        if path.is_file():
            return f"Did you mean the file {path}?"
    return "If it is a file, name it with its .py"


def find_module(source: str) -> ModuleType | None:
    """Return the module that was loaded from a file or module, without executing it again; None if it was not."""
    return find_loaded(_resolve(source)) if is_file(source) else sys.modules.get(source)


def is_file(source: str) -> bool:
    """Tell whether this names a file of handlers, and not a module."""
    return source.endswith(".py") or Path(source).is_file()


def _resolve(source: str) -> Path:
    return Path(source).resolve()


def _outside_event_loop(function: Callable[[], T]) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function()
    with ThreadPoolExecutor(1, "pgflow-import") as thread:
        return thread.submit(function).result()


def find_workflow(module: ModuleType, workflow_slug: str, source: str) -> Workflow:
    """Return the `Workflow` of this slug among a module's names.

    Raises:
        UsageError: there is none; the message lists the others.
    """
    found = list_workflows(module)
    if workflow_slug in found:
        return found[workflow_slug]
    there = f"it has those of {', '.join(map(repr, found))}" if found else "it has no Workflow at all"
    raise UsageError(f"{source} has no handlers of workflow {workflow_slug!r}{suggest(workflow_slug, found)}: {there}")


def _locate(error: BaseException) -> str:
    """Return the error in words, and the last line of the user's code in its traceback."""
    reason = describe(error)
    if isinstance(error, SyntaxError):
        return reason  # has file and line
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_THE_USERS)]
    return f"{reason} ({own[-1].filename}, line {own[-1].lineno})" if own else reason
