"""Runs of Airflow, as its metadata database has them. Every look is bounded, and each statement uses an index there."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from pgflow_prefect.database.connection import Row

MOST_INSTANCES = 10_000
"""The most task instances of a run that are read. Of a run with more, only the run itself is mirrored."""

MOST_BYTES = 1024 * 1024
"""The most bytes of a return value, or of a run's `conf`, that are read."""

_MOST_TOGETHER = 16 * MOST_BYTES
"""The most bytes of return values, or of `conf`, that are read in one statement, and one more value."""

_CONF = ("conf_is_json", "conf_size", "conf")


class SourceRun(BaseModel):
    """A row of `dag_run`.

    Attributes:
        id: its primary key.
        dag_id: the DAG.
        run_id: the run's id within the DAG.
        state: queued, running, success or failed.
        queued_at: when it was created, or cleared last.
        start_date: when it began, or began again.
        end_date: when it ended.
        data_interval_start: the beginning of its data interval.
        data_interval_end: the end of it.
        clear_number: how often it was cleared.
        updated_at: when the row was changed last.
        logical_date: what it is about, in Airflow 3.
        execution_date: the same, in Airflow 2.
        conf_is_json: its `conf` is jsonb. That of Airflow 2 is pickled, and is never read.
        conf_size: bytes of its text; None if it was not looked at.
        conf: its text, unless that is too long, or was not read.
    """

    model_config = ConfigDict(frozen=True)

    id: int
    dag_id: str
    run_id: str
    state: str | None
    queued_at: datetime | None
    start_date: datetime | None
    end_date: datetime | None
    data_interval_start: datetime | None
    data_interval_end: datetime | None
    clear_number: int
    updated_at: datetime | None
    logical_date: datetime | None
    execution_date: datetime | None
    conf_is_json: bool = True
    conf_size: int | None = None
    conf: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether Airflow is done with it."""
        return self.state in {"success", "failed"}

    @property
    def mark(self) -> str:
        """A text that is another one after each change of the row."""
        return f"{self.state} {self.clear_number} {self.updated_at}"


@dataclass(frozen=True)
class Instance:
    """A row of `task_instance`.

    Attributes:
        task_id: the task.
        map_index: the place in its map; -1 for a plain task, and for a mapped one before it is expanded.
        state: Airflow's state; None before it was ever scheduled, and after a clear.
        tries: how often it was begun.
        most_retries: how often it may be tried again.
        started_at: when the latest try began; of a task that was skipped, when that was decided.
        ended_at: when it ended.
        queued_at: when it was queued last.
        operator: the name of the task's class; None if Airflow has not noted it.
    """

    task_id: str
    map_index: int
    state: str | None
    tries: int
    most_retries: int
    started_at: datetime | None
    ended_at: datetime | None
    queued_at: datetime | None
    operator: str | None = None


@dataclass(frozen=True)
class ReturnValue:
    """The return value of a task instance, as the table `xcom` has it.

    Attributes:
        is_json: the column is jsonb; otherwise it is bytes, which are JSON unless Airflow 2 pickles.
        size: bytes of its text.
        text: JSON, or bytes as hexadecimal digits behind `\\x`; None if it is too long.
    """

    is_json: bool
    size: int
    text: str | None


@dataclass(frozen=True)
class NewRuns:
    """Runs behind an id.

    Attributes:
        ids: of the DAGs that were asked for.
        read_to: the greatest id of any DAG that was looked at; None if there was none.
        is_all: there is none behind it.
    """

    ids: list[int] = field(default_factory=list)
    read_to: int | None = None
    is_all: bool = True


class RunStatements(ABC):
    """The statements on runs. Call them within a `snapshot`."""

    @abstractmethod
    async def _fetch_run_rows(self, query: str, **parameters: object) -> list[Row]: ...

    async def read_newest_run(self) -> int:
        """Return the greatest id of a run, of any DAG; 0 if there is none."""
        [row] = await self._fetch_run_rows("read_newest_run")
        return int(str(row["id"]))

    async def list_new_runs(self, dag_ids: Collection[str], *, after: int, limit: int) -> NewRuns:
        """Return the runs of these DAGs among the next `limit` runs of any DAG behind an id."""
        rows = await self._fetch_run_rows("list_new_runs", after=after, limit=limit)
        ids = [int(str(row["id"])) for row in rows]
        wanted = [each for each, row in zip(ids, rows, strict=True) if row["dag_id"] in dag_ids]
        return NewRuns(wanted, max(ids, default=None), len(ids) < limit)

    async def list_active_runs(self, dag_ids: Collection[str], *, limit: int) -> list[int]:
        """Return the runs of these DAGs that are running, and those that are queued, at most `limit` of each."""
        rows = await self._fetch_run_rows("list_active_runs", dag_ids=[*dag_ids], limit=limit)
        return [int(str(row["id"])) for row in rows]

    async def list_ended_runs(self, dag_id: str, *, since: datetime, before: int, limit: int) -> list[int]:
        """Return the newest runs of a DAG below an id that have ended since then, at most `limit`."""
        rows = await self._fetch_run_rows("list_ended_runs", dag_id=dag_id, since=since, before=before, limit=limit)
        return [int(str(row["id"])) for row in rows]

    async def find_runs(self, runs: Collection[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """Return the primary keys of these runs, each given by its DAG and its id there."""
        if not runs:
            return {}
        dag_ids, run_ids = (list(each) for each in zip(*runs, strict=True))
        rows = await self._fetch_run_rows("find_runs", dag_ids=dag_ids, run_ids=run_ids)
        return {(str(row["dag_id"]), str(row["run_id"])): int(str(row["id"])) for row in rows}

    async def read_runs(self, ids: Collection[int]) -> list[SourceRun]:
        """Return these runs, by id, without those that Airflow has deleted."""
        rows = await self._fetch_run_rows("read_runs", ids=[*ids]) if ids else []
        return [SourceRun.model_validate(row) for row in rows]

    async def read_confs(self, runs: Sequence[SourceRun]) -> list[SourceRun]:
        """Return these runs with their `conf`. It leaves out those that would be too much together: ask again."""
        if not runs:
            return []
        rows = await self._fetch_run_rows(
            "read_confs", ids=[run.id for run in runs], most_bytes=MOST_BYTES, most_together=_MOST_TOGETHER
        )
        there = {run.id: run for run in runs}
        return [
            there[int(str(row["id"]))].model_copy(update={name: row[name] for name in _CONF})
            for row in rows
            if row["fits"]
        ]

    async def read_instances(self, runs: Sequence[SourceRun]) -> dict[int, list[Instance] | None]:
        """Return the task instances of these runs, by the run's id; None for a run that has too many."""
        found: dict[int, list[Instance] | None] = {run.id: [] for run in runs}
        rows = await self._fetch_run_rows(
            "read_instances",
            ids=[run.id for run in runs],
            dag_ids=[run.dag_id for run in runs],
            run_ids=[run.run_id for run in runs],
            limit=MOST_INSTANCES,
        )
        for row in rows:
            instances = found[int(str(row["id"]))]
            if instances is not None:
                instances.append(_read_instance(row))
        return {each: None if of is not None and len(of) > MOST_INSTANCES else of for each, of in found.items()}

    async def read_results(
        self, asked: Sequence[tuple[int, str, int]]
    ) -> dict[tuple[int, str, int], ReturnValue | None]:
        """Return the return values of task instances, each given by run, task and map index; None for one without.

        It leaves out those that would be too much together: ask for them again.
        """
        if not asked:
            return {}
        ids, task_ids, map_indexes = (list(each) for each in zip(*asked, strict=True))
        rows = await self._fetch_run_rows(
            "read_results",
            ids=ids,
            task_ids=task_ids,
            map_indexes=map_indexes,
            most_bytes=2 * MOST_BYTES + 2,  # bytes are read as hexadecimal digits
            most_together=_MOST_TOGETHER,
        )
        found: dict[tuple[int, str, int], ReturnValue | None] = dict.fromkeys(asked)
        for row in rows:
            key = int(str(row["id"])), str(row["task_id"]), int(str(row["map_index"]))
            if row["fits"]:
                text = None if row["value"] is None else str(row["value"])
                found[key] = ReturnValue(bool(row["is_json"]), int(str(row["size"] or 0)), text)
            else:
                del found[key]
        return found


def _read_instance(row: Row) -> Instance:
    return Instance(
        task_id=str(row["task_id"]),
        map_index=int(str(row["map_index"])),
        state=None if row["state"] is None else str(row["state"]),
        tries=int(str(row["try_number"] or 0)),
        most_retries=max(int(str(row["max_tries"] or 0)), 0),
        started_at=_read_time(row["start_date"]),
        ended_at=_read_time(row["end_date"]),
        queued_at=_read_time(row["queued_dttm"]),
        operator=None if row["operator"] is None else str(row["operator"]),
    )


def _read_time(value: object) -> datetime | None:
    assert value is None or isinstance(value, datetime)
    return value
