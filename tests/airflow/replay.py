"""A database like Airflow's, in which runs happen again that a real Airflow has executed, look by look.

`recorded/*/schema.sql` has the tables as Airflow's migrations make them. `observed.json` has what happened in them
while Airflow executed the DAG of `observed/observed.py`: first a run that fails, and then a clear of the task `broken`.
"""

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import cache
from typing import Any
from uuid import UUID, uuid5

import psycopg
from psycopg import sql

from pgflow_prefect.definitions.airflow.dag import AirflowDag, read_dag
from pgflow_prefect.definitions.airflow.document import open_file
from tests.airflow.recorded import RECORDED

DAG_ID = "observed"
COLUMNS = """
    SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
INDEXES = "SELECT count(*) FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid WHERE c.relname = 'task_instance'"
KEYS = {
    "dag_run": ("id",),
    "task_instance": ("task_id", "map_index"),
    "task_instance_history": ("task_id", "map_index", "try_number"),
    "xcom": ("task_id", "map_index", "key"),
}


@cache
def read_recorded(version: str) -> dict[str, Any]:
    """Return what was recorded of a version."""
    found: dict[str, Any] = json.loads((RECORDED / version / "observed.json").read_text("utf-8"))
    return found


def read_observed_dag(version: str) -> AirflowDag:
    """Return the DAG, as that version has serialized it."""
    text = json.dumps(read_recorded(version)["dag"]).encode()
    return read_dag(open_file(text, "observed.json").read(DAG_ID))


class Airflow:
    """Airflow's database, and what was recorded of one run.

    Attributes:
        dsn: the database.
        version: of Airflow.
        db: a connection to it.
        indexes: how many the table `task_instance` has.
    """

    def __init__(self, dsn: str, version: str) -> None:
        self.dsn = dsn
        self.version = version
        self.db = psycopg.connect(dsn, autocommit=True)
        self.db.execute((RECORDED / version / "schema.sql").read_bytes())
        [[self.indexes]] = self.db.execute(INDEXES).fetchall()

    def close(self) -> None:
        """Close the connection."""
        self.db.close()

    def replay(self, during: str, *, run: int = 1) -> Iterator[dict[str, Any]]:
        """Let the next thing happen at each step of the iteration, and yield what it was.

        Args:
            during: `run`, or `clear`, which comes after it.
            run: its number: several runs may happen beside one another.
        """
        for look in read_recorded(self.version)["looks"]:
            if look["during"] == during:
                with self.db.transaction():
                    self._apply(look, run)
                yield look

    def play(self, during: str, *, run: int = 1) -> None:
        """Let all of it happen."""
        for _ in self.replay(during, run=run):
            pass

    def _apply(self, look: dict[str, Any], run: int) -> None:
        for table, keys in look.get("gone", {}).items():
            for key in keys:
                self._delete(table, key, run)
        for table in KEYS:
            for row in look["changed"].get(table, []):
                self.write(table, _place(table, row, run))

    def write(self, table: str, row: dict[str, Any]) -> None:
        """Insert a row, or replace it. A column that it does not name becomes NULL."""
        keys = [*KEYS[table], *(["run_id"] if table != "dag_run" else [])]
        names = [str(name) for [name] in self.db.execute(COLUMNS, [table])]
        made = sql.SQL("SELECT * FROM json_populate_record(NULL::{}, {})").format(
            sql.Identifier(table), sql.Literal(json.dumps(row))
        )
        update = sql.SQL("UPDATE {} t SET ({}) = ({}) WHERE {}").format(
            sql.Identifier(table),
            sql.SQL(", ").join(map(sql.Identifier, names)),
            made,
            sql.SQL(" AND ").join(
                sql.SQL("t.{} = {}").format(sql.Identifier(each), sql.Literal(row[each])) for each in keys
            ),
        )
        if self.db.execute(update).rowcount == 0:
            self.db.execute(sql.SQL("INSERT INTO {} {}").format(sql.Identifier(table), made))

    def _delete(self, table: str, key: list[Any], run: int) -> None:
        conditions = [sql.SQL("{} = %s").format(sql.Identifier(each)) for each in KEYS[table]]
        self.db.execute(
            sql.SQL("DELETE FROM {} WHERE run_id = %s AND {}").format(
                sql.Identifier(table), sql.SQL(" AND ").join(conditions)
            ),
            [f"run {run}", *key],
        )


def _place(table: str, row: dict[str, Any], run: int) -> dict[str, Any]:
    """Return a row as one of another run."""
    placed = {**row, "run_id": f"run {run}"}
    if table == "dag_run":
        placed["id"] = run
        if "execution_date" in row:  # one of each
            placed["execution_date"] = (datetime.fromisoformat(row["execution_date"]) + timedelta(days=run)).isoformat()
    elif table == "xcom":
        placed["dag_run_id"] = run
    elif table == "task_instance" and "id" in row:
        placed["id"] = str(uuid5(UUID(row["id"]), str(run)))
    elif "task_instance_id" in row:
        placed["task_instance_id"] = str(uuid5(UUID(row["task_instance_id"]), str(run)))
    elif table == "task_instance_history":
        placed["id"] = 1_000 * run + int(row["id"])
    return placed
