"""Removes control characters from what Prefect's loggers of runs write to a console or a journal."""

import logging
from collections.abc import Iterator

from prefect.context import FlowRunContext, TaskRunContext

from pgflow_prefect.prefect_api.internals import JsonFormatter
from pgflow_prefect.wording import CleanBlockFormatter, CleanFormatter, escape_json

_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
"""These loggers write the errors and the output of handlers, and how a flow run ends."""


class _RunFormatter(CleanBlockFormatter):
    """Writes records as another formatter does, and cleans those of runs."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        if not _is_of_run(record):
            return self._inner.format(record)
        written = self._inner.format(self.clean(record))
        return escape_json(written) if isinstance(self._inner, JsonFormatter) else written

    def formatException(self, ei: object) -> str:  # noqa: N802  the standard library's name
        return self._inner.formatException(ei)  # type: ignore[arg-type]


def clean_consoles() -> None:
    """Clean the log records of runs on all consoles of this process; one call is enough.

    Prefect's API gets the texts unchanged.
    """
    for handler in _list_handlers():
        if isinstance(handler, logging.StreamHandler):
            inner = handler.formatter or logging.Formatter()
            if not isinstance(inner, CleanBlockFormatter | CleanFormatter):
                handler.setFormatter(_RunFormatter(inner))


def _list_handlers() -> Iterator[logging.Handler]:
    for name in _LOGGERS:
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            yield from logger.handlers
            logger = logger.parent if logger.propagate else None


def _is_of_run(record: logging.LogRecord) -> bool:
    return record.name.startswith(_LOGGERS) or TaskRunContext.get() is not None or FlowRunContext.get() is not None
