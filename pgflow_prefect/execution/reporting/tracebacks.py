"""Shortens tracebacks in Prefect's log: they begin at the user's code, because all steps share the frames above."""

import logging
import sysconfig
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import anyio
import prefect

from pgflow_prefect.errors import HandlerRaisedError, PgflowPrefectError

_OURS = str(Path(__file__).parents[2])
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib")})
_STANDARD = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib")})
_ON_THE_WAY = (_OURS, str(Path(anyio.__file__).parent), str(Path(prefect.__file__).parent))

ExceptionInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None]


def trim(error: BaseException) -> ExceptionInfo | None:
    """Return the exception to log: the handler's error, from the handler's first line on.

    None for an error of this package without a line of the user's code, because its message says everything.
    """
    if isinstance(error, HandlerRaisedError) and error.__cause__ is not None:
        error = error.__cause__
    begin = _find_begin(error)
    if begin is None and isinstance(error, PgflowPrefectError):
        return None
    return type(error), error, begin or error.__traceback__


def _find_begin(error: BaseException) -> TracebackType | None:
    """Return the first frame of the user's code that this package called."""
    traceback = _find_ours(error)
    while traceback is not None and _is_on_the_way(_get_file(traceback)):
        traceback = traceback.tb_next
    return traceback


def _find_ours(error: BaseException) -> TracebackType | None:
    traceback = error.__traceback__
    while traceback is not None and not _get_file(traceback).startswith(_OURS):
        traceback = traceback.tb_next
    return traceback


def _is_on_the_way(file: str) -> bool:
    is_standard = file.startswith((*_STANDARD, "<frozen")) and not file.startswith(_INSTALLED)
    return is_standard or file.startswith(_ON_THE_WAY)


def _get_file(traceback: TracebackType) -> str:
    return traceback.tb_frame.f_code.co_filename


class _Trimmed(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
            error = record.exc_info[1]
            if _find_ours(error) is not None:  # another flow of this process may log here, too
                record.exc_info = trim(error)
        return True


_TRIMMED = _Trimmed()


def trim_tracebacks() -> None:
    """Shorten tracebacks in Prefect's logs of runs in this process; one call is enough."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_TRIMMED)
