"""Executes random DAGs in Airflow, and records how each task ended. It runs in an environment with Airflow.

    python tests/airflow/random_runs.py tests/airflow/recorded/3.3/runs.json 60

`tests/airflow/test_outcomes.py` executes the same DAGs here, and compares the outcome of each task.
"""

import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

RULES = [
    "all_success", "all_success", "all_success", "all_failed", "all_done", "all_done_min_one_success", "all_skipped",
    "always", "none_failed", "none_failed_min_one_success", "none_skipped", "one_done", "one_failed", "one_success",
]  # fmt: skip


def draw(number: int) -> list[dict[str, Any]]:
    """Draw a DAG: tasks with what they wait for, their rules, and what each does."""
    chance = random.Random(number)  # noqa: S311  no secret
    tasks: list[dict[str, Any]] = []
    for place in range(chance.randint(3, 8)):
        above = [task["id"] for task in tasks if chance.random() < 0.45]
        does = chance.choices(["ok", "fail", "skip", "branch"], [5, 2, 2, 2])[0]
        tasks.append({"id": f"t{place}", "upstream": above, "rule": chance.choice(RULES), "does": does, "takes": []})
    for task in tasks:
        below = [each["id"] for each in tasks if task["id"] in each["upstream"]]
        if task["does"] == "branch":
            task["takes"] = [each for each in below if chance.random() < 0.5]
            if not below:
                task["does"] = "ok"
    return tasks


def make(number: int) -> Any:
    """Return a DAG."""
    from both import BEGIN, DAG, BranchPythonOperator, PythonOperator

    with DAG(f"random_{number}", schedule=None, start_date=BEGIN, catchup=False) as dag:
        made = {}
        for task in draw(number):
            kind = BranchPythonOperator if task["does"] == "branch" else PythonOperator
            made[task["id"]] = kind(
                task_id=task["id"],
                python_callable=act,
                op_args=[task["does"], task["takes"]],
                trigger_rule=task["rule"],
            )
            for above in task["upstream"]:
                made[above] >> made[task["id"]]
    return dag


def act(does: str, takes: list[str]) -> Any:
    """Do what a task was drawn to do."""
    if does == "fail":
        raise ValueError("failed on purpose")
    if does == "skip":
        from airflow.exceptions import AirflowSkipException

        raise AirflowSkipException("skipped on purpose")
    return takes if does == "branch" else does


def execute(number: int, dag: Any, serialize: Any) -> dict[str, Any]:
    """Execute a DAG, and return its document and how its tasks ended."""
    run = dag.test()
    instances = run.get_task_instances()
    ends = {each.task_id: str(each.state) for each in instances}
    begun = [each for each in instances if each.start_date is not None and ends[each.task_id] != "upstream_failed"]
    return {
        "tasks": draw(number),
        "document": shorten(serialize(dag)),
        "ends": ends,
        "order": [each.task_id for each in sorted(begun, key=lambda each: each.start_date)],
        "run": str(run.state),
    }


def shorten(document: dict[str, Any]) -> dict[str, Any]:
    """Leave out what decides nothing."""
    for task in document["dag"]["tasks"]:
        for name in ("ui_color", "template_fields", "template_fields_renderers", "op_kwargs", "_needs_expansion"):
            task["__var"].pop(name, None)
    for name in ("task_group", "edge_info", "fileloc", "relative_fileloc", "_processor_dags_folder"):
        document["dag"].pop(name, None)
    return document


def main(target: Path, runs: int, folder: Path) -> None:
    """Execute so many DAGs, whose file stands in a folder of its own: Airflow asks for one."""
    import dump_script

    lines = ["from random_runs import make", *(f"dag{number} = make({number})" for number in range(runs))]
    (folder / "random_dags.py").write_text("\n".join(lines), encoding="utf-8")
    dags = dump_script.parse_files(str(folder))
    done = [execute(number, dags[f"random_{number}"], dump_script.serialize) for number in range(runs)]
    text = json.dumps({"airflow": dump_script.find_version(), "runs": done}, sort_keys=True)
    target.write_text(text.replace(str(folder), "/opt/airflow/dags") + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "AIRFLOW_HOME" not in os.environ:
        os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="pgflow-airflow-")
    os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
    os.environ["AIRFLOW__CORE__DAG_DISCOVERY_SAFE_MODE"] = "False"
    with tempfile.TemporaryDirectory() as made:
        os.environ["AIRFLOW__CORE__DAGS_FOLDER"] = made
        here = Path(__file__).parent
        places = [here, here / "dags", here.parents[1] / "pgflow_prefect" / "airflow"]
        sys.path[:0] = [str(place) for place in places]
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, places))
        main(Path(sys.argv[1]), int(sys.argv[2]), Path(made))
