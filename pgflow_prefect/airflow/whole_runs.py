"""Reads whole runs of Airflow at once: to import past ones, and to compare or repair those that are mirrored."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from pgflow_prefect.airflow.mirrored import FollowedRun, Found, ResultKey, find_mirrored_run_id
from pgflow_prefect.airflow.results import MOST_TOGETHER, NOT_READ, TOO_MUCH
from pgflow_prefect.database.airflow.reader import AirflowDatabase
from pgflow_prefect.database.airflow.runs import ReturnValue, SourceRun
from pgflow_prefect.database.mirror_statements import Written
from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.origin import LedgerLine
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError
from pgflow_prefect.wording import write_code

_PAGE = 50  # runs that are read in one snapshot
_RESULTS = 500  # return values that are read in one statement


@dataclass
class PastTask:
    """A task of past runs that the present DAG does not have.

    Attributes:
        runs: how many runs had it.
        latest: when the latest of them ended.
    """

    runs: int = 0
    latest: datetime | None = None


@dataclass
class History:
    """What an import of past runs has found.

    Attributes:
        dag_id: the DAG.
        runs: how many past runs there are.
        written: how many of them have new rows, or changed ones.
        gone: tasks that the present DAG does not have, by id.
        failures: why runs could not be written, by their ids in Airflow.
    """

    dag_id: str
    runs: int = 0
    written: int = 0
    gone: dict[str, PastTask] = field(default_factory=lambda: defaultdict(PastTask))
    failures: dict[str, str] = field(default_factory=dict)

    def make_lines(self) -> list[LedgerLine]:
        """Return the ledger's lines on tasks that the present DAG does not have."""
        return [
            LedgerLine(
                None,
                "past task",
                f"{write_code(task_id)} is in past runs, and not in the present DAG. Those runs are here without it.",
                is_done=False,
            )
            for task_id in sorted(self.gone)
        ]


async def import_history(
    store: Store, airflow: AirflowDatabase, dag_id: str, since: datetime, *, with_results: bool = True
) -> History:
    """Write the runs of a DAG that have ended since then, the newest first. Those that are here already stay.

    Args:
        store: the database.
        airflow: Airflow's.
        dag_id: the DAG.
        since: a time.
        with_results: copy return values.

    Raises:
        DatabaseUnavailableError: one of the databases does not answer; the same import again goes on from there.
    """
    history = History(dag_id)
    installation = await store.read_installation()
    before = 2**62
    while True:
        async with airflow.snapshot():
            ids = await airflow.list_ended_runs(dag_id, since=since, before=before, limit=_PAGE)
            runs = await airflow.read_runs(ids)
            known = await find_run_ids(store, runs, installation)
            for run in runs:  # one after the other: the results of one are in memory
                found = await read_whole(airflow, run, known[run.id], imported=True, with_results=with_results)
                await _write_past(store, history, run, found)
        if len(ids) < _PAGE:
            return history
        before = min(ids)


async def _write_past(store: Store, history: History, run: SourceRun, found: Found) -> None:
    history.runs += 1
    try:
        written = await write_whole(store, found)
    except DatabaseUnavailableError:
        raise
    except PgflowPrefectError as error:
        history.failures[run.run_id] = str(error)
        return
    history.written += written.changed
    for task_id in written.left_out or ():
        task = history.gone[task_id]
        task.runs += 1
        task.latest = max(each for each in (task.latest, run.end_date) if each is not None)


async def find_run_ids(store: Store, runs: Sequence[SourceRun], installation: UUID) -> dict[int, UUID]:
    """Return the ids that runs of Airflow have here, or will have, by Airflow's ids."""
    asked = {(run.dag_id, run.run_id): run.id for run in runs}
    found = {run.id: find_mirrored_run_id(installation, run.dag_id, run.run_id) for run in runs}
    if asked:
        there = await store.find_mirrored(asked)
        found |= {asked[each.workflow_slug, each.source_run_id]: each.run_id for each in there}
    return found


async def read_whole(
    airflow: AirflowDatabase, run: SourceRun, run_id: UUID, *, imported: bool = False, with_results: bool = True
) -> Found:
    """Return all that is to be written of a run. Call it within a `snapshot`.

    Args:
        airflow: its database.
        run: the run.
        run_id: its id here.
        imported: it had ended before it was written.
        with_results: also read what its tasks have returned, up to `MOST_TOGETHER` bytes. The others are named.
    """
    followed = FollowedRun(run_id, run.dag_id, run.run_id, is_new=True)
    instances = (await airflow.read_instances([run]))[run.id]
    wanted = followed.list_wanted(instances or [])
    results: dict[ResultKey, ReturnValue | None] = {}
    if with_results:
        results = await read_results_within(airflow, run.id, wanted)
    else:
        results = dict.fromkeys(wanted, NOT_READ)
    [run] = await airflow.read_confs([run])
    return followed.describe(run, instances, results, imported=imported)


async def read_results_within(
    airflow: AirflowDatabase, source_id: int, wanted: Sequence[ResultKey]
) -> dict[ResultKey, ReturnValue | None]:
    """Return return values of a run of Airflow. Once they are `MOST_TOGETHER` bytes, the others are `TOO_MUCH`."""
    results: dict[ResultKey, ReturnValue | None] = {}
    size = 0
    while size < MOST_TOGETHER and (some := [key for key in wanted if key not in results][:_RESULTS]):
        found = await airflow.read_results([(source_id, task_id, index) for task_id, index, _ in some])
        results |= {key: found[source_id, key[0], key[1]] for key in some if (source_id, key[0], key[1]) in found}
        size += count_bytes(found.values())
    return {key: results.get(key, TOO_MUCH) for key in wanted}


def count_bytes(found: Iterable[ReturnValue | None]) -> int:
    """Return about how many bytes these return values keep in memory."""
    return sum(len(each.text) for each in found if each is not None and each.text is not None)


async def write_whole(store: Store, found: Found) -> Written:
    """Write a whole run: without its results, if the database refuses one of them.

    Raises:
        PgflowPrefectError: it can't be written.
    """
    try:
        return await store.mirror_run(None, found.document, found.results)
    except DatabaseUnavailableError:
        raise
    except PgflowPrefectError as error:
        if not found.results:
            raise
        return await store.mirror_run(None, found.without_results(str(error)).document, [])
