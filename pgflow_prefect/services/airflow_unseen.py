"""Reports tasks of Airflow that a policy does not see, in runs whose other tasks report themselves.

The scheduler ends some tasks without executing them, mapped tasks have no method to replace, and a process may be
killed. Airflow's tables have the ends of all of these.
"""

import logging
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from uuid import UUID

from pgflow_prefect.airflow.mirrored import ResultKey, find_mirrored_run_id
from pgflow_prefect.airflow.results import MOST_TOGETHER, NOT_READ
from pgflow_prefect.airflow.unseen import UnseenEnd, find_end, make_result
from pgflow_prefect.airflow.whole_runs import count_bytes, read_results_within
from pgflow_prefect.database.airflow.reader import AirflowDatabase
from pgflow_prefect.database.airflow.runs import Instance, ReturnValue
from pgflow_prefect.database.airflow_task_statements import AskingRun
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError, ResultInvalidError

MOST_RUNS = 10
"""The most runs that a look reads; the next look reads the next ones."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnseenTask:
    """A task that has ended and has not reported itself.

    Attributes:
        run_id: its run here.
        end: how it has ended.
        result: JSON text.
    """

    run_id: UUID
    end: UnseenEnd
    result: str | None


@dataclass
class UnseenTasks:
    """Finds and reports them, some runs at a look.

    Attributes:
        store: the database.
        copies_results: whether return values are copied.
    """

    store: Store
    copies_results: bool
    _after: UUID | None = field(default=None, init=False)
    _told: set[tuple[UUID, str]] = field(default_factory=set, init=False)

    async def read(self, airflow: AirflowDatabase, dag_ids: Collection[str], installation: UUID) -> list[UnseenTask]:
        """Return tasks of these DAGs that have ended and do not report themselves. Call it within a `snapshot`.

        Raises:
            DatabaseUnavailableError: one of the databases does not answer.
        """
        asking = await self._list_asking(dag_ids, installation)
        ids = await airflow.find_runs([(each.workflow_slug, each.source_run_id) for each in asking])
        runs = {run.id: run for run in await airflow.read_runs([*ids.values()])}
        instances = await airflow.read_instances([*runs.values()]) if runs else {}
        ends: list[tuple[int, AskingRun, UnseenEnd]] = []
        for each in asking:
            source_id = ids.get((each.workflow_slug, each.source_run_id))
            if source_id in runs and source_id is not None:
                ends += [(source_id, each, end) for end in _find_ends(each, instances[source_id] or [])]
        found = await self._read_results(airflow, [(source_id, end) for source_id, _, end in ends])
        return [
            UnseenTask(each.run_id, end, self._make_result(each, end, found[source_id]))
            for source_id, each, end in ends
            if all(key in found[source_id] for key in end.wanted)  # otherwise at a later look
        ]

    async def _list_asking(self, dag_ids: Collection[str], installation: UUID) -> list[AskingRun]:
        if not dag_ids:
            return []
        page = await self.store.list_asking_runs(dag_ids, after=self._after, limit=MOST_RUNS)
        self._after = page[-1].run_id if len(page) == MOST_RUNS else None
        return [
            each
            for each in page
            # A payload of a run that Airflow does not execute may say anything.
            if each.run_id == find_mirrored_run_id(installation, each.workflow_slug, each.source_run_id)
        ]

    async def _read_results(
        self, airflow: AirflowDatabase, ends: Sequence[tuple[int, UnseenEnd]]
    ) -> dict[int, dict[ResultKey, ReturnValue | None]]:
        """Return return values of whole ends: those behind the most bytes of a look are read at a later one."""
        results: dict[int, dict[ResultKey, ReturnValue | None]] = defaultdict(dict)
        size = 0
        for source_id, end in ends:
            if not self.copies_results:
                results[source_id] |= dict.fromkeys(end.wanted, NOT_READ)
            elif size < MOST_TOGETHER:  # what is reported now is not asked for again
                found = await read_results_within(airflow, source_id, end.wanted)
                results[source_id] |= found
                size += count_bytes(found.values())
        return results

    def _make_result(self, run: AskingRun, end: UnseenEnd, found: dict[ResultKey, ReturnValue | None]) -> str | None:
        result, notes = make_result(end, found)
        if notes and (run.run_id, end.step_slug) not in self._told:
            self._told.add((run.run_id, end.step_slug))
            _logger.warning("run %s of %r, task %r: %s", run.run_id, run.workflow_slug, end.step_slug, notes[0])
        return result

    async def report(self, found: Sequence[UnseenTask]) -> None:
        """Report these ends. One that the database refuses keeps no other one waiting.

        Raises:
            DatabaseUnavailableError: the database does not answer.
        """
        for each in found:
            try:
                await self._report_within_limits(each)
            except DatabaseUnavailableError:
                raise
            except PgflowPrefectError as error:
                if (each.run_id, each.end.step_slug) not in self._told:
                    self._told.add((each.run_id, each.end.step_slug))
                    _logger.warning("run %s, task %r is not reported: %s", each.run_id, each.end.step_slug, error)

    async def _report_within_limits(self, task: UnseenTask) -> None:
        try:
            await self._report(task)
        except ResultInvalidError as error:  # the items of a map together may be beyond the limits
            _logger.warning("run %s, task %r: its result was not copied: %s", task.run_id, task.end.step_slug, error)
            await self._report(replace(task, result=None))

    async def _report(self, task: UnseenTask) -> None:
        end = task.end
        reported = await self.store.end_unseen_airflow_task(
            task.run_id, end.step_slug, end.try_number, end.outcome, result=task.result, message=end.message
        )
        if reported:
            _logger.info("run %s, task %r: %s in Airflow", task.run_id, end.step_slug, end.outcome)


def _find_ends(run: AskingRun, instances: Sequence[Instance]) -> list[UnseenEnd]:
    of_tasks: dict[str, list[Instance]] = defaultdict(list)
    for each in instances:
        of_tasks[each.task_id].append(each)
    now = datetime.now(UTC)
    found = [
        find_end(task_id, of_tasks[task_id], now, has_asked=has_asked)
        for task_id, has_asked in (run.steps or {}).items()
        if task_id in of_tasks
    ]
    # What was skipped first: then a branch that ends later starts none of it.
    return sorted((each for each in found if each is not None), key=lambda each: each.outcome != "skipped")
