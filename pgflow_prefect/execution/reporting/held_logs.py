"""Holds back the log lines of unshown runs, and sends them when a run is shown."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, cast
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.context import TaskRunContext
from prefect.settings import get_current_settings

from pgflow_prefect.execution.reporting.handler_logs import HANDLER
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.ids import is_placeholder
from pgflow_prefect.prefect_api.internals import APILogHandler

MOST_LINES, MOST_BYTES = 1_000, 16 * 1024 * 1024
"""The most lines of one run, and the most bytes of all runs of this process. Later lines are left out and counted."""

_OTHERWISE = 500
"""The bytes of a line beside its message, roughly: names, ids and times."""

_LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "prefect.extra")

_PAYLOAD_SIZE = "__payload_size__"
"""A field that Prefect's handler adds to a line for its own use."""

Line = dict[str, Any]
"""One line of a log, as Prefect's API takes it."""


@dataclass
class HeldLines:
    """The lines of one run.

    Attributes:
        lines: as Prefect's API takes them.
        size: their bytes.
        left_out: the number of lines that were left out.
        flow_run_id: Prefect's flow run; None until it shows the run.
    """

    lines: list[Line] = field(default_factory=list)
    size: int = 0
    left_out: int = 0
    flow_run_id: UUID | None = None

    def release(self, flow_run_id: UUID) -> list[Line]:
        """Return the lines as lines of a flow run."""
        found = [{**each, "flow_run_id": str(flow_run_id)} for each in self.lines]
        if found and self.left_out:
            last = {**found[-1], "message": f"{self.left_out} more lines were not kept until the run was shown"}
            found.append(last)
        return found


class HeldLogs:
    """The lines of all unshown runs of this process. Any thread may write a line."""

    def __init__(self) -> None:
        self._runs: dict[UUID, HeldLines] = {}  # by placeholder
        self._size = 0
        self._lock = Lock()
        self._is_filtering = False

    def begin(self, placeholder: UUID) -> HeldLines:
        """Hold back the lines of a run from now on, until `end`."""
        if not self._is_filtering:  # Prefect configures its handlers before a flow run begins
            self._is_filtering = True
            _filter_handlers()
        with self._lock:
            lines = self._runs[placeholder] = HeldLines()
        return lines

    def end(self, placeholder: UUID) -> None:
        """Drop later lines of a run, because it has ended."""
        with self._lock:
            self._runs.pop(placeholder, None)

    def forget(self, lines: HeldLines) -> None:
        """Make room after these lines were sent, or if their run stays unshown."""
        with self._lock:
            self._size -= lines.size
            lines.lines, lines.size = [], 0

    def take(self, placeholder: UUID, handler: APILogHandler, record: logging.LogRecord) -> bool:
        """Hold back a line; return True if it must be sent at once instead."""
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
        except Exception:  # noqa: BLE001  a line that can't be formatted must not harm a run
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
    """Return the placeholder that a line names as its flow run; None for any other line."""
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
            await cast("Any", client).request("POST", "/logs/", json=some)  # Prefect's types do not know this route


def _measure(line: Line) -> int:
    return len(str(line["message"]).encode("utf-8", "replace")) + _OTHERWISE


def _split(lines: Iterable[Line], most: int) -> Iterator[list[Line]]:
    """Yield lines in portions of roughly so many bytes."""
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
