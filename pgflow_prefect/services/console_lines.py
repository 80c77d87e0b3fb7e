"""How a flow run's process writes the log lines of its handlers, for the service that started it to show.

The process loads this while it imports Prefect: nothing here may import Prefect, or anything that does.
"""

import logging

from pgflow_prefect.wording import CleanBlockFormatter

_STEPS = "prefect.task_runs"
_SAID_BY_STATE = "Task run failed with exception"


class HandlersFilter(logging.Filter):
    """Lets through what handlers write, and other code's warnings, but not what Prefect says of flow runs."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a person who watches a service wants to see this."""
        if record.name == _STEPS or record.name.startswith(f"{_STEPS}."):
            return True
        return not record.name.startswith(("prefect", "pgflow_prefect", "httpx"))


class HandlersFormatter(CleanBlockFormatter):
    """Writes a line as the service writes its own, with the flow run and the step that it belongs to."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; of an error that ends a step, without the traceback, which Prefect's UI has."""
        text = super().format(record)
        if record.exc_info and str(record.msg).startswith(_SAID_BY_STATE):
            return text.partition("\n")[0]
        return text

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's own name
        """Return the line without what follows it."""
        step = getattr(record, "task_run_name", None)
        place = f"{getattr(record, 'flow_run_name', None)}, step {step}" if step else record.name
        return f"{record.asctime} {record.levelname} {place}: {record.message}"

    def usesTime(self) -> bool:  # noqa: N802  logging's own name
        """Have the time put into each record."""
        return True
