"""Shows the log lines of handlers that are executed in this process."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefect.context import TaskRunContext

from pgflow_prefect.services.console_lines import HandlersFormatter, is_end
from pgflow_prefect.wording import clean


class _LinesHandler(logging.Handler):
    """Passes on what handlers log and print, and what Prefect says of their attempts, but not how they ended."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write = write
        self.setFormatter(_LinesFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        if TaskRunContext.get() is None or is_end(record):
            return
        try:
            self._write(self.format(record))
        except Exception:  # noqa: BLE001  as of the standard library's handlers
            self.handleError(record)


class _LinesFormatter(HandlersFormatter):
    """Writes a record with its step. The run is known: there is only one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's own name
        context = TaskRunContext.get()
        step = clean(context.task_run.name) if context is not None else record.name
        return f"{record.asctime} {record.levelname} {step}: {record.message}"


@contextmanager
def show_handler_lines(write: Callable[[str], None]) -> Iterator[None]:
    """Call `write` with each line that a handler logs or prints, until the block ends.

    Args:
        write: called with a text without its last line break, in the thread of the handler.
    """
    handler = _LinesHandler(write)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
