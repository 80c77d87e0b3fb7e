"""Reads from Prefect what a run's flow runs have logged."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from logging import getLevelName
from typing import cast
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    LogFilter,
    LogFilterFlowRunId,
    LogFilterTaskRunId,
    LogFilterTimestamp,
)
from prefect.client.schemas.objects import Log
from prefect.client.schemas.sorting import LogSort
from prefect.settings import get_current_settings
from prefect.types import DateTime

from pgflow_prefect.models import TaskKey
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.ids import find_task_run_id

_PAGE = 200
"""The largest answer of Prefect's API by default."""


@dataclass(frozen=True)
class LogLine:
    """A line of a run's log.

    Attributes:
        time: when it was written.
        level: its name, such as INFO.
        step: the step whose handler wrote it; None for lines of the flow run, and of tasks in a handler.
        message: any text of the handler's.
    """

    time: datetime
    level: str
    step: str | None
    message: str


def find_log_delay() -> timedelta:
    """Return how much later than it was written a line may reach Prefect: processes send lines together."""
    return timedelta(seconds=2 * get_current_settings().logging.to_api.batch_interval + 1)


class RunLogs:
    """The log lines of a run, each yielded once.

    Memory is bounded: lines of the last seconds are remembered, because later ones may have earlier times.
    """

    def __init__(self, client: PrefectClient, steps: Sequence[str], only: str | None = None) -> None:
        """Begin before the first line.

        Args:
            client: of Prefect's API.
            steps: the slugs of the run's steps.
            only: the step whose lines are wanted; None for all lines of the run.
        """
        self._client = client
        self._steps = steps
        self._only = only
        self._delay = find_log_delay()
        self._since: datetime | None = None
        self._seen: dict[UUID, datetime] = {}
        self._tasks: dict[UUID, str] = {}
        self._known: set[UUID] = set()

    async def read_new(self, flow_run_ids: Sequence[UUID], task_run_ids: Mapping[str, UUID]) -> AsyncIterator[LogLine]:
        """Yield the lines of these flow runs that were not yielded before, in the order of their times.

        Args:
            flow_run_ids: all flow runs that have taken the run.
            task_run_ids: the latest task run of each step. A task runner gives them ids of its own, and a run that was
                shown later has those of before.

        Raises:
            PrefectUnavailableError: Prefect's API does not answer in time.
            PrefectRefusedError: Prefect refuses the request.
        """
        if not flow_run_ids:
            return
        for flow_run_id in {*flow_run_ids} - self._known:
            self._known.add(flow_run_id)
            self._tasks |= {find_task_run_id(flow_run_id, TaskKey(slug)): slug for slug in self._steps}
        self._tasks |= {task_run_id: slug for slug, task_run_id in task_run_ids.items()}
        wanted = self._make_filter(flow_run_ids)
        page: list[Log] = []
        offset = 0
        while offset == 0 or len(page) == _PAGE:
            with ask_prefect("a look at logs"):
                page = await self._client.read_logs(wanted, limit=_PAGE, offset=offset, sort=LogSort.TIMESTAMP_ASC)
            offset += _PAGE
            for log in page:
                if self._note(log):
                    step = self._tasks.get(log.task_run_id) if log.task_run_id else None
                    yield LogLine(log.timestamp, getLevelName(log.level), step, log.message)
        self._forget()

    def _make_filter(self, flow_run_ids: Sequence[UUID]) -> LogFilter:
        tasks = [task_run_id for task_run_id, slug in self._tasks.items() if slug == self._only]
        since = cast("DateTime", self._since)  # it is one; Prefect's types don't say so
        return LogFilter(
            flow_run_id=LogFilterFlowRunId(any_=[*flow_run_ids]),
            task_run_id=LogFilterTaskRunId(any_=tasks) if self._only is not None else None,
            timestamp=LogFilterTimestamp(after_=since) if since is not None else None,
        )

    def _note(self, log: Log) -> bool:
        """Note a line; tell whether it is new."""
        if log.id in self._seen:
            return False
        self._seen[log.id] = log.timestamp
        return True

    def _forget(self) -> None:
        """Forget the lines that are too old for others to arrive before them."""
        if self._seen:
            self._since = max(self._seen.values()) - self._delay
            self._seen = {each: time for each, time in self._seen.items() if time >= self._since}
