"""A real Airflow makes the documents that are recorded here: `python -m pytest tests/airflow/test_real.py --airflow`.

It installs Airflow in an environment of its own, with the versions of `constraints-*.txt`. That takes minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pgflow_prefect.definitions.airflow.dag import read_dag
from pgflow_prefect.definitions.airflow.document import open_file
from tests.airflow.recorded import DAG_IDS, HERE, RECORDED, VERSIONS, load

RUNS = 8
PROVIDERS = ["apache-airflow-providers-docker", "apache-airflow-providers-common-sql"]

pytestmark = pytest.mark.skipif("not config.getoption('--airflow')", reason="--airflow installs a real Airflow")


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def python(version: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with that Airflow."""
    place = tmp_path_factory.mktemp("airflow")
    constraints = HERE / f"constraints-{version}.txt"
    [pinned] = [line for line in constraints.read_text("utf-8").splitlines() if line.startswith("apache-airflow==")]
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    subprocess.run([place / "bin/pip", "install", "-q", "-c", constraints, pinned, *PROVIDERS], check=True)
    return place / "bin/python"


def run(python: Path, home: Path, *arguments: object) -> None:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("AIRFLOW")}
    subprocess.run([python, *map(str, arguments)], check=True, env={**environment, "AIRFLOW_HOME": str(home)})


def test_airflow_makes_the_recorded_documents(version: str, python: Path, tmp_path: Path) -> None:
    run(python, tmp_path / "home", HERE / "record.py", tmp_path)

    made = open_file((tmp_path / "dags.json").read_bytes(), "dags.json")
    assert sorted(made.documents) == DAG_IDS
    for dag_id in DAG_IDS:
        assert read_dag(made.read(dag_id)) == load(version, dag_id)
    recorded = json.loads((RECORDED / version / "upstream.json").read_text("utf-8"))
    assert json.loads((tmp_path / "upstream.json").read_text("utf-8")) == recorded


def test_airflow_executes_random_dags_as_recorded(version: str, python: Path, tmp_path: Path) -> None:
    if not (RECORDED / version / "runs.json").exists():
        pytest.skip(f"no runs of Airflow {version} are recorded")
    home = tmp_path / "home"
    run(python, home, "-m", "airflow", "db", "migrate")
    run(python, home, HERE / "random_runs.py", tmp_path / "runs.json", RUNS)

    made, recorded = (
        [(each["tasks"], each["ends"], each["run"]) for each in read_runs(path)[:RUNS]]
        for path in (tmp_path / "runs.json", RECORDED / version / "runs.json")
    )
    assert made == recorded


def read_runs(path: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["runs"]
    return runs
