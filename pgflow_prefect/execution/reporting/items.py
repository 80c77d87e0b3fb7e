"""Shows the items of a map in Prefect: a task run for each, if there are few."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

from prefect.client.schemas.objects import State
from prefect.states import AwaitingRetry, Completed, Retrying, Running

from pgflow_prefect.database.step_transaction import Logger
from pgflow_prefect.execution.reporting.failed_attempts import make_failed
from pgflow_prefect.execution.reporting.task_runs import StepTaskRun
from pgflow_prefect.models import ClaimedItem, Doing, ItemReport, MapState
from pgflow_prefect.prefect_api.states import handed_back, skipped
from pgflow_prefect.state_names import StateName

PrepareItem: TypeAlias = Callable[[int], StepTaskRun]
"""Returns the task run of an item, by its place in the array."""


class ShownItem:
    """One attempt of items, whose end Prefect hears of once PostgreSQL has it. This one is not shown.

    Attributes:
        logger: its messages show under the item's task run; None if the item has none.
    """

    logger: Logger | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be the current task run of the handler, if the item has a task run."""
        yield

    def end(self, report: ItemReport) -> None:
        """Note how the attempt has ended."""

    def retry(self, error: Exception, pause: float) -> None:
        """Note that the item is tried again after so many seconds."""

    def fail(self, error: Exception) -> None:
        """Note that the last attempt has failed."""

    def stop(self) -> None:
        """Show that the next owner of the run executes the item."""


HIDDEN = ShownItem()


class ItemTaskRun(ShownItem):
    """One attempt of an item that has a task run."""

    def __init__(self, item: ClaimedItem, task_run: StepTaskRun, ends: dict[int, Callable[[], None]]) -> None:
        self._item = item
        self._task_run = task_run
        self._ends = ends
        self.logger = task_run.logger

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be the current task run of the handler."""
        with self._task_run.entered():
            yield

    def end(self, report: ItemReport) -> None:
        """Note how the attempt has ended."""
        states: dict[Doing, Callable[[], State[Any]]] = {
            Doing.COMPLETE: Completed,
            Doing.SKIP: lambda: skipped(report.message),
            Doing.DEFER: lambda: Completed(
                name=StateName.DEFERRED, message="handed over: another program reports it, and the step shows its end"
            ),
        }
        self._note(states[report.doing])

    def retry(self, error: Exception, pause: float) -> None:
        """Note that the item is tried again after so many seconds."""
        at = datetime.now(UTC) + timedelta(seconds=pause)
        self._task_run.logger.info("the item is tried again in %g s: %r", pause, error)
        self._note(lambda: AwaitingRetry(scheduled_time=at))

    def fail(self, error: Exception) -> None:
        """Note that the last attempt has failed."""
        self._task_run.log_failure(error)
        self._note(lambda: make_failed(error))

    def stop(self) -> None:
        """Show that the next owner of the run executes the item."""
        self._task_run.show(handed_back("the item is left to the run's next owner"))

    def _note(self, make_state: Callable[[], State[Any]]) -> None:
        self._ends[self._item.index] = lambda: self._task_run.show(make_state())


@dataclass
class ShownItems:
    """The items of one map.

    Attributes:
        prepare: returns the task run of an item; None if items have none.
        at_most: the most items that have task runs.
        notice: called with what PostgreSQL says of the map.
    """

    prepare: PrepareItem | None = None
    at_most: int = 0
    notice: Callable[[MapState], None] = lambda state: None
    _total: int = field(default=0, init=False)
    _task_runs: dict[int, StepTaskRun] = field(default_factory=dict, init=False)
    _ends: dict[int, Callable[[], None]] = field(default_factory=dict, init=False)

    def tell(self, state: MapState) -> None:
        """Hear what PostgreSQL says of the map."""
        self._total = state.total or 0
        self.notice(state)

    def begin(self, items: Sequence[ClaimedItem]) -> ShownItem:
        """Show that items are executed."""
        if self.prepare is None or self._total > self.at_most or len(items) > 1:
            return HIDDEN
        [item] = items
        known = self._task_runs.get(item.index)
        task_run = known or self._task_runs.setdefault(item.index, self.prepare(item.index))
        task_run.show(Running() if known is None else Retrying())
        return ItemTaskRun(item, task_run, self._ends)

    def show_ends(self, indexes: Sequence[int]) -> None:
        """Show how the attempts of items have ended, which PostgreSQL knows now."""
        for index in indexes:
            if (show := self._ends.pop(index, None)) is not None:
                show()
