"""Holds back the log lines of runs that Prefect is not told of yet, and sends them once it is."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, cast
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.context import TaskRunContext
from prefect.settings import get_current_settings

from pgflow_prefect.execution.handler_logs import HANDLER
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.ids import is_placeholder
from pgflow_prefect.prefect_api.internals import APILogHandler

MOST_LINES, MOST_BYTES = 1_000, 16 * 1024 * 1024
"""What is held back: lines of one run, and bytes of all runs of this process. Later lines are left out, and counted."""

_OTHERWISE = 500
"""About how many bytes a line has beside its message: names, ids and times."""

_LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "prefect.extra")

_PAYLOAD_SIZE = "__payload_size__"
"""What Prefect's handler adds to a line for itself."""

Line = dict[str, Any]
"""What Prefect's API takes for one line of a log."""


@dataclass
class HeldLines:
    """The lines of one run.

    Attributes:
        lines: as Prefect's API takes them.
        size: their bytes.
        left_out: how many more there were.
        flow_run_id: Prefect's flow run, once it shows the run.
    """

    lines: list[Line] = field(default_factory=list)
    size: int = 0
    left_out: int = 0
    flow_run_id: UUID | None = None

    def release(self, flow_run_id: UUID) -> list[Line]:
        """Return the lines as those of a flow run."""
        found = [{**each, "flow_run_id": str(flow_run_id)} for each in self.lines]
        if found and self.left_out:
            last = {**found[-1], "message": f"{self.left_out} more lines were not kept until the run was shown"}
            found.append(last)
        return found


class HeldLogs:
    """The lines of all runs of this process that Prefect is not told of. Any thread may write a line."""

    def __init__(self) -> None:
        self._runs: dict[UUID, HeldLines] = {}  # by placeholder
        self._size = 0
        self._lock = Lock()

    def begin(self, placeholder: UUID) -> HeldLines:
        """Hold back the lines of a run from now on, until `end`."""
        _filter_handlers()
        with self._lock:
            lines = self._runs[placeholder] = HeldLines()
        return lines

    def end(self, placeholder: UUID) -> None:
        """Let later lines of a run go nowhere: the run has ended."""
        with self._lock:
            self._runs.pop(placeholder, None)

    def forget(self, lines: HeldLines) -> None:
        """Make room: these lines are sent, or their run is not to be shown."""
        with self._lock:
            self._size -= lines.size
            lines.lines, lines.size = [], 0

    def take(self, placeholder: UUID, handler: APILogHandler, record: logging.LogRecord) -> bool:
        """Hold a line back, and tell whether it is to be sent at once instead."""
        lines = self._runs.get(placeholder)
        if lines is None:
            return False
        if lines.flow_run_id is not None:
            record.flow_run_id = str(lines.flow_run_id)
            return True
        if not get_current_settings().logging.to_api.enabled or not getattr(record, "send_to_api", True):
            return False
        try:
            prepared = handler.prepare(record)
        except Exception:  # noqa: BLE001  as of any handler: what can't be formatted harms no run
            handler.handleError(record)
            return False
        prepared.pop(_PAYLOAD_SIZE, None)
        size = _measure(prepared)
        with self._lock:
            if len(lines.lines) >= MOST_LINES or self._size + size > MOST_BYTES:
                lines.left_out += 1
            else:
                lines.lines.append(prepared)
                lines.size += size
                self._size += size
        return False


HELD = HeldLogs()
"""The lines of this process."""


class _Filter(logging.Filter):
    """Keeps lines of unshown runs from one of Prefect's handlers."""

    def __init__(self, handler: APILogHandler) -> None:
        super().__init__()
        self._handler = handler

    def filter(self, record: logging.LogRecord) -> bool:
        placeholder = _find_placeholder(record)
        return placeholder is None or HELD.take(placeholder, self._handler, record)


def _find_placeholder(record: logging.LogRecord) -> UUID | None:
    """Return the placeholder that a line names in place of a flow run; None for any other line."""
    named = getattr(record, "flow_run_id", None)
    if named is None:
        context = TaskRunContext.get()
        named = context.task_run.flow_run_id if context is not None else None
    try:
        found = named if isinstance(named, UUID) or named is None else UUID(str(named))
    except ValueError:  # "<unknown>"
        return None
    return found if found is not None and is_placeholder(found) else None


def _filter_handlers() -> None:
    for handler in _list_handlers():
        if not any(isinstance(each, _Filter) for each in handler.filters):
            handler.addFilter(_Filter(handler))


def _list_handlers() -> Iterator[APILogHandler]:
    yield HANDLER
    for name in _LOGGERS:
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            yield from (each for each in logger.handlers if isinstance(each, APILogHandler))
            logger = logger.parent if logger.propagate else None


async def send_lines(client: PrefectClient, lines: Sequence[Line]) -> None:
    """Send lines to Prefect's API, with as few requests as its limit of a batch allows.

    Raises:
        PrefectUnavailableError: it does not answer.
    """
    for some in _split(lines, get_current_settings().logging.to_api.batch_size):
        with ask_prefect("log lines of runs"):
            await cast("Any", client).request("POST", "/logs/", json=some)  # not a route that its types know


def _measure(line: Line) -> int:
    return len(str(line["message"]).encode("utf-8", "replace")) + _OTHERWISE


def _split(lines: Iterable[Line], most: int) -> Iterator[list[Line]]:
    """Yield lines in portions of about so many bytes."""
    some: list[Line] = []
    size = 0
    for line in lines:
        length = _measure(line)
        if some and size + length > most // 2:
            yield some
            some, size = [], 0
        some.append(line)
        size += length
    if some:
        yield some
