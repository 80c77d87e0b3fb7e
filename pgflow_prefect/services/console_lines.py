"""Formats the log lines of handlers in a flow run's process, for the service that started it.

The process loads this module while it imports Prefect. So nothing here may import Prefect, directly or indirectly.
"""

import logging

from pgflow_prefect.wording import CleanBlockFormatter

_STEPS = "prefect.task_runs"
_SAID_BY_STATE = "Task run failed with exception"
_ENDS = (_SAID_BY_STATE, "Finished in state", "Crash detected!")
_RETRY = "Retry %s/%s"


def is_end(record: logging.LogRecord) -> bool:
    """Tell whether a record says only how a step ended, which the service says in its own words."""
    text = str(record.msg)
    return text.startswith(_ENDS) and _RETRY not in text


class HandlersFilter(logging.Filter):
    """Passes log records of handlers, and warnings of other code, but not Prefect's messages about flow runs."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to show this record."""
        if record.name == _STEPS or record.name.startswith(f"{_STEPS}."):
            return True
        return not record.name.startswith(("prefect", "pgflow_prefect", "httpx"))


class HandlersFormatter(CleanBlockFormatter):
    """Formats a record like the service's own lines, with its flow run and step."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line. The error that ends a step has no traceback here, because Prefect's UI shows it."""
        text = super().format(record)
        if record.exc_info and str(record.msg).startswith(_SAID_BY_STATE):
            return text.partition("\n")[0]
        return text

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's own name
        """Return the line without traceback or stack."""
        step = getattr(record, "task_run_name", None)
        place = f"{getattr(record, 'flow_run_name', None)}, step {step}" if step else record.name
        return f"{record.asctime} {record.levelname} {place}: {record.message}"

    def usesTime(self) -> bool:  # noqa: N802  logging's own name
        """Tell logging that the format uses the time."""
        return True
