"""Writes serialized DAGs of Airflow as JSON, for `pgflow-prefect import --from airflow DAG --json FILE`.

It runs where Airflow runs, with the Python of Airflow. It needs nothing else. It reads the table serialized_dag of
Airflow's database and executes no DAG file. Only with --parse FOLDER it executes the DAG files of a folder instead.

    python dump.py etl > etl.json
    python dump.py --all --output dags.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from typing import Any

MOST_BYTES = 64 * 1024 * 1024
SETTINGS = {
    "retries": ("core", "default_task_retries"),
    "retry_delay": ("core", "default_task_retry_delay"),
    "execution_timeout": ("core", "default_task_execution_timeout"),
    "catchup": ("scheduler", "catchup_by_default"),
    "max_map_length": ("core", "max_map_length"),
}
"""Airflow's settings that say what a task or a DAG does not say. Older documents leave that out."""


def main() -> int:
    """Write the DAGs that the command line names."""
    parser = argparse.ArgumentParser(description="Write serialized DAGs of Airflow as JSON.")
    parser.add_argument("dags", nargs="*", metavar="DAG", help="ids of DAGs")
    parser.add_argument("--all", action="store_true", help="all DAGs")
    parser.add_argument("--output", metavar="FILE", help="write into this file instead of standard output")
    parser.add_argument("--parse", metavar="FOLDER", help="execute the DAG files of a folder, and ask no database")
    given = parser.parse_args()
    if not given.dags and not given.all:
        parser.error("which DAG? name it, or say --all")
    with contextlib.redirect_stdout(sys.stderr):  # whatever Airflow and its plugins print
        found = serialize_all(given.parse) if given.parse else read_database(given.dags, every=given.all)
        written = {dag_id: each for dag_id, each in found.items() if given.all or dag_id in given.dags}
        missing = [each for each in given.dags if each not in written]
        if missing:
            sys.stderr.write(f"Airflow has no DAG {missing[0]!r}: it has {', '.join(sorted(found)) or 'none'}\n")
            return 1
        text = json.dumps({"airflow": find_version(), "settings": read_settings(), "dags": written}, sort_keys=True)
    if len(text) > MOST_BYTES:
        sys.stderr.write(f"the DAGs have {len(text):,} bytes, and an import reads {MOST_BYTES:,}: name fewer\n")
        return 1
    if given.output:
        with open(given.output, "w", encoding="utf-8") as file:  # noqa: PTH123  as short as that
            file.write(text)
    else:
        sys.stdout.write(text + "\n")
    return 0


def read_database(dag_ids: list[str], *, every: bool) -> dict[str, Any]:
    """Return the newest document of each DAG in Airflow's database; of one that is not asked for, nothing."""
    from airflow.models.serialized_dag import SerializedDagModel  # noqa: PLC0415  after the arguments are read
    from airflow.utils.session import create_session  # noqa: PLC0415

    with create_session() as session:
        known = sorted({dag_id for (dag_id,) in session.query(SerializedDagModel.dag_id)})
        wanted = known if every else [dag_id for dag_id in known if dag_id in dag_ids]
        found: dict[str, Any] = dict.fromkeys(known)
        for dag_id in wanted:
            row = SerializedDagModel.get(dag_id, session=session)
            found[dag_id] = row.data if row is not None else None
    return found


def parse_files(folder: str) -> dict[str, Any]:
    """Return the DAGs of a folder. This executes its files."""
    os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
    try:
        from airflow.dag_processing.dagbag import DagBag  # noqa: PLC0415  of Airflow 3
    except ImportError:
        from airflow.models.dagbag import DagBag  # noqa: PLC0415
    bag = DagBag(folder)
    for file, error in bag.import_errors.items():
        sys.stderr.write(f"{file}: {error}\n")
    return dict(bag.dags)


def serialize_all(folder: str) -> dict[str, Any]:
    """Return the documents of the DAGs of a folder."""
    return {dag_id: serialize(dag) for dag_id, dag in parse_files(folder).items()}


def serialize(dag: Any) -> Any:  # noqa: ANN401  a DAG
    """Return the document of a DAG, as Airflow stores it."""
    from airflow.serialization import serialized_objects  # noqa: PLC0415

    serializer = getattr(serialized_objects, "DagSerialization", None) or serialized_objects.SerializedDAG
    return serializer.to_dict(dag)


def read_settings() -> dict[str, float | None]:
    """Return the settings that decide what a task does not say."""
    from airflow.configuration import conf  # noqa: PLC0415

    found: dict[str, float | None] = {}
    for name, place in SETTINGS.items():
        text = {"true": "1", "false": "0"}.get(said := str(conf.get(*place, fallback="") or "").strip().lower(), said)
        with contextlib.suppress(ValueError):
            found[name] = float(text) if text else None
    return found


def find_version() -> str:
    """Return the version of Airflow."""
    import airflow  # noqa: PLC0415

    return str(airflow.__version__)


if __name__ == "__main__":
    sys.exit(main())
