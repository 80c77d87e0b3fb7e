"""Runs a handler in Python beside an external worker, to see whether the results are the same."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

from pgflow_prefect.database.step_transaction import Logger
from pgflow_prefect.database.store import Store
from pgflow_prefect.execution.step_writer import clean_message
from pgflow_prefect.handlers.base import Deferred
from pgflow_prefect.handlers.raised import describe
from pgflow_prefect.handlers.shadow import find_differences
from pgflow_prefect.models import TaskKey
from pgflow_prefect.raw_json import RawJson


@dataclass
class Shadow:
    """The result of a step's handler, to be compared with the step's result.

    Attributes:
        store: the database.
        run_id: the run.
        task: of the run.
        logger: shows in Prefect under the step's task run.
        result: JSON text; None if the handler failed.
    """

    store: Store
    run_id: UUID
    task: TaskKey
    logger: Logger
    result: str | Deferred | None = None
    _seconds: float = field(default=0, init=False)
    _error: str = field(default="", init=False)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measure how long the handler takes, and keep its error: the step goes on without it."""
        began = time.perf_counter()
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever it is: nothing depends on a shadow
            self._error = describe(error)
        finally:
            self._seconds = time.perf_counter() - began

    def refuse(self, reason: str) -> None:
        """Say why the handler is not executed: there is nothing to compare its result with."""
        self._error = reason

    async def compare(self, theirs: RawJson | None = None, *, note: str | None = None) -> str:
        """Compare with the step's result, store the comparison, and return it in words.

        Args:
            theirs: the step's result, if it was read with the handler's input.
            note: what is not the same in the input; it is reported unless the results are the same.
        """
        outcome, details = "failed", [self._error]
        try:
            if not self._error and isinstance(self.result, str):
                if theirs is None:
                    theirs = (await self.store.read_results(self.run_id, [self.task.step_slug]))[self.task.step_slug]
                details = find_differences(theirs, RawJson(self.result))
                outcome = "different" if details else "same"
            if note is not None and outcome != "same":
                details = [*details, note]
            details = [clean_message(each) for each in details]
            await self.store.report_shadow(
                self.run_id, self.task, outcome=outcome, details=details, seconds=self._seconds
            )
        except Exception as error:  # noqa: BLE001  nothing depends on it
            self.logger.warning("step %s: its shadow is not reported: %s", self.task, error)
        self.logger.info("step %s: its shadow: %s %s", self.task, outcome, "; ".join(details))
        return f"shadow: {outcome}"
