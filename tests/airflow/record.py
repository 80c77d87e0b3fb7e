"""Records what Airflow makes of the DAG files here. It runs in an environment with Airflow, not in that of the tests.

    python tests/airflow/record.py tests/airflow/recorded/3.3

It writes the serialized DAGs, as `pgflow-prefect airflow dump` writes them, and what the DAG objects say of each task's
upstream tasks. `python -m pytest tests/airflow --airflow` makes such environments, and compares.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
DAGS = HERE / "dags"
FOLDER = "/opt/airflow/dags"
"""What stands for the folder of DAG files in the documents."""


def record(target: Path) -> None:
    """Write `dags.json` and `upstream.json`."""
    sys.path.insert(0, str(HERE.parents[1] / "pgflow_prefect" / "airflow"))
    import dump_script

    dags = dump_script.parse_files(str(DAGS))
    assert sorted(dags) == sorted(path.stem for path in DAGS.glob("*.py") if path.stem != "both"), "a file is wrong"
    documents = {dag_id: dump_script.serialize(dag) for dag_id, dag in dags.items()}
    dumped = {"airflow": dump_script.find_version(), "settings": dump_script.read_settings(), "dags": documents}
    upstream = {
        dag_id: {task.task_id: sorted(task.upstream_task_ids) for task in dag.tasks} for dag_id, dag in dags.items()
    }
    target.mkdir(parents=True, exist_ok=True)
    write(target / "dags.json", dumped)
    write(target / "upstream.json", upstream)


def write(path: Path, value: object) -> None:
    """Write JSON, one DAG a line, without the place of this folder."""
    text = json.dumps(value, sort_keys=True, indent=1).replace(str(DAGS), FOLDER)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "AIRFLOW_HOME" not in os.environ:
        os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="pgflow-airflow-")
    os.environ["AIRFLOW__CORE__DAGS_FOLDER"] = str(DAGS)
    os.environ["AIRFLOW__CORE__DAG_DISCOVERY_SAFE_MODE"] = "False"  # the files name Airflow in `both.py` only
    sys.path.insert(0, str(DAGS))
    record(Path(sys.argv[1]))
