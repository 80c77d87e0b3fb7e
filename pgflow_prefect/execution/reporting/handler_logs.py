"""Shows records of the user's own loggers in Prefect, under the task run of the step that wrote them."""

import logging
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from inspect import unwrap
from pathlib import Path
from typing import Any

from prefect.context import FlowRunContext, TaskRunContext

from pgflow_prefect.prefect_api.internals import APILogHandler

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})

_scanned: dict[str, int] = {}
"""For each handler's module: the number of loaded modules at the last search for modules beside it."""


class _StepLogHandler(APILogHandler):
    """Prefect's handler, but silent outside of a run, where Prefect's own would warn."""

    def emit(self, record: logging.LogRecord) -> None:
        if TaskRunContext.get() is not None or FlowRunContext.get() is not None:
            super().emit(record)


HANDLER = _StepLogHandler()


def show_logs(functions: Iterable[Callable[..., Any]]) -> None:
    """Show the loggers of handlers' files in Prefect, and those of the modules beside and beneath them.

    A logger has the name of its module, as with `logging.getLogger(__name__)`. A level that the user has set stays.
    Otherwise Prefect's level applies (PREFECT_LOGGING_LEVEL).
    """
    for module in {str(getattr(unwrap(each), "__module__", None)) for each in functions}:
        if _scanned.get(module) != len(sys.modules):
            _scanned[module] = len(sys.modules)
            for name in {module, *_list_beside(module)}:
                _show(logging.getLogger(name))


def _list_beside(module: str) -> Iterator[str]:
    """Yield the names of the user's modules whose files are in the folder of a module's file, or beneath it."""
    file = _find_file(module)
    if file is None or file.startswith(_INSTALLED):
        return
    folder = str(Path(file).parent)
    for name in [*sys.modules]:
        other = _find_file(name)
        if other is not None and other.startswith(f"{folder}/") and not other.startswith(_INSTALLED):
            yield name


def _find_file(module: str) -> str | None:
    found = sys.modules.get(module)
    file = vars(found).get("__file__") if found is not None and hasattr(found, "__dict__") else None
    return file if isinstance(file, str) else None


def _show(logger: logging.Logger) -> None:
    lineage = [*_list_lineage(logger)]
    if any(isinstance(handler, APILogHandler) for each in lineage for handler in each.handlers):
        return
    logger.addHandler(HANDLER)
    set_by = next((each for each in lineage if each.level != logging.NOTSET), logging.getLogger())
    level = logging.getLogger("prefect.extra").getEffectiveLevel()
    if set_by is logging.getLogger() and set_by.level > level:
        logger.setLevel(level)


def _list_lineage(logger: logging.Logger) -> Iterator[logging.Logger]:
    """Yield a logger and the parents to which its records propagate."""
    found: logging.Logger | None = logger
    while found is not None:
        yield found
        found = found.parent if found.propagate else None
