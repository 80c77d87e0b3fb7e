"""The serialized DAGs that Airflow has made of the DAG files here, and what is expected of their ledgers."""

import ast
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from pgflow_prefect.airflow.ledger import make_ledger
from pgflow_prefect.definitions.airflow.dag import AirflowDag, read_dag
from pgflow_prefect.definitions.airflow.document import open_file

HERE = Path(__file__).parent
RECORDED = HERE / "recorded"
VERSIONS = ("2.11", "3.3")
DAG_IDS = sorted(path.stem for path in (HERE / "dags").glob("*.py") if path.stem != "both")
_LINE = re.compile(r"^(?P<done>[-x]) (?:(?P<task>[^:]+): )?(?P<topic>[^:]+)$")


def read_file(version: str) -> bytes:
    """Return the file that the script of `airflow dump` would write for all DAGs."""
    return (RECORDED / version / "dags.json").read_bytes()


@cache
def load(version: str, dag_id: str) -> AirflowDag:
    """Return a DAG, as that version of Airflow has serialized it."""
    return read_dag(open_file(read_file(version), "dags.json").read(dag_id))


def load_document(version: str, dag_id: str) -> dict[str, Any]:
    """Return the document of a DAG."""
    document: dict[str, Any] = json.loads(read_file(version))["dags"][dag_id]
    return document


def load_upstream(version: str, dag_id: str) -> dict[str, list[str]]:
    """Return what the DAG object said in Airflow's own process: the upstream tasks of each task."""
    upstream: dict[str, list[str]] = json.loads((RECORDED / version / "upstream.json").read_text("utf-8"))[dag_id]
    return upstream


def expect_lines(dag_id: str) -> list[str]:
    """Return the ledger's lines that the docstring of a DAG's file expects, sorted: `x load: retries`."""
    text = ast.get_docstring(ast.parse((HERE / "dags" / f"{dag_id}.py").read_text("utf-8")))
    assert text is not None
    return sorted(line for line in text.partition("Ledger:")[2].splitlines() if _LINE.match(line))


def write_lines(dag: AirflowDag) -> list[str]:
    """Return the lines of a DAG's ledger in the form of those docstrings, sorted."""
    return sorted(
        f"{'x' if line.is_done else '-'} {'' if line.about is None else f'{line.about}: '}{line.topic}"
        for line in make_ledger(dag).lines
    )
