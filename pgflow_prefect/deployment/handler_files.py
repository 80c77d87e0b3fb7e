"""The Python file that holds a workflow's handlers: where it is, and loading it."""

import hashlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from pgflow_prefect.errors import UsageError
from pgflow_prefect.graph import suggest
from pgflow_prefect.models import to_identifier
from pgflow_prefect.workflow import Workflow

DIRECTORY = Path("flows")
"""Where handlers are kept, relative to the working directory."""

_INSTALLED = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_NOT_THE_USERS = (str(Path(__file__).parent.parent), *_INSTALLED, "<")
"""What the names of files begin with that are Python's, a library's, or none."""


def default_path(workflow_slug: str, directory: Path = DIRECTORY) -> Path:
    """Return the file in which `import` writes a workflow's handlers, and `run` looks for them."""
    return directory / f"{to_identifier(workflow_slug)}.py"


BY_ROWS = "rows of pgflow_prefect.bindings"
"""The source of a workflow that has no handlers in Python."""


def load_workflow(workflow_slug: str, handlers: str | None = None, *, has_rows: bool = False) -> tuple[Workflow, str]:
    """Load the handlers of a workflow.

    Args:
        workflow_slug: the workflow.
        handlers: a file (`path/to/file.py`) or a module (`package.module`); `flows/<identifier>.py` where not given.
        has_rows: rows say who does its steps, or some of them: then it needs no file.

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
    """Load the handlers of a workflow as far as they are here; arguments and return value as of `load_workflow`.

    Returns:
        No workflow where nothing was named and the file that `import` would write does not exist.

    Raises:
        UsageError: the file or module is there and can't be loaded, or what is named is not there.
    """
    path = default_path(workflow_slug)
    if handlers is None and not path.is_file():
        return None, str(path)
    return load_workflow(workflow_slug, handlers)


def load_workflows(sources: Iterable[str]) -> dict[str, tuple[Workflow, str]]:
    """Load all workflows of several files or modules, by slug, each with where it was found.

    Raises:
        UsageError: one can't be imported, has no workflow, or has one that another has, too.
    """
    found: dict[str, tuple[Workflow, str]] = {}
    for source in sources:
        workflows = {value.slug: value for value in vars(load_module(source)).values() if isinstance(value, Workflow)}
        if not workflows:
            raise UsageError(f"{source} has no handlers: it has no Workflow")
        for slug, workflow in workflows.items():
            if slug in found:
                raise UsageError(f"workflow {slug!r} has handlers in both {found[slug][1]} and {source}: name one")
            found[slug] = (workflow, source)
    return found


def load_module(source: str) -> ModuleType:
    """Import a file or a module, so that what is beside it can be imported, too.

    Raises:
        UsageError: with the place in the user's code where it went wrong.
    """
    is_file = source.endswith(".py") or Path(source).is_file()
    if is_file and not Path(source).is_file():
        raise UsageError(f"there is no file {source}")
    try:
        return _load_file(Path(source).resolve()) if is_file else _load_named(source)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and not is_file and error.name and source.startswith(error.name):
            raise UsageError(f"there is no module {source!r}: is it a file? then name it with its .py") from error
        raise UsageError(f"{source} can't be imported: {_locate(error)}") from error


def find_workflow(module: ModuleType, workflow_slug: str, source: str) -> Workflow:
    """Return the `Workflow` of this slug among a module's names.

    Raises:
        UsageError: there is none; the message has those that there are.
    """
    found = {value.slug: value for value in vars(module).values() if isinstance(value, Workflow)}
    if workflow_slug in found:
        return found[workflow_slug]
    there = f"it has those of {', '.join(map(repr, found))}" if found else "it has no Workflow at all"
    raise UsageError(f"{source} has no handlers of workflow {workflow_slug!r}{suggest(workflow_slug, found)}: {there}")


class _UncachedLoader(SourceFileLoader):
    """Compiles the source each time: Python's cache takes a file of the same size and second for the same file."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _load_file(path: Path) -> ModuleType:
    # A name of its own: the user's file may be called as a package is.
    name = f"pgflow_handlers_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_UncachedLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _import_from(path.parent)
    spec.loader.exec_module(module)
    return module


def _load_named(name: str) -> ModuleType:
    _import_from(Path.cwd())
    return importlib.import_module(name)


def _import_from(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def _locate(error: BaseException) -> str:
    """Return what went wrong, and the last line of the user's code on the way there."""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return reason  # has file and line
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_THE_USERS)]
    return f"{reason} ({own[-1].filename}, line {own[-1].lineno})" if own else reason
