"""The DAG of the story: a branch, a group, a template and a trigger rule. Its task `transform` moves."""

from datetime import datetime, timedelta
from typing import Any

try:
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.providers.standard.operators.empty import EmptyOperator
    from airflow.providers.standard.operators.python import PythonOperator
    from airflow.sdk import DAG, TaskGroup, task
except ImportError:
    from airflow import DAG
    from airflow.decorators import task
    from airflow.operators.bash import BashOperator
    from airflow.operators.empty import EmptyOperator
    from airflow.operators.python import PythonOperator
    from airflow.utils.task_group import TaskGroup

from executions import note


def extract(run_id: str | None = None, **_: Any) -> dict[str, Any]:
    """Return what the next task adds up."""
    note("story", run_id, "extract")
    return {"rows": [3, 1, 2]}


with DAG(
    "story",
    schedule=None,
    start_date=datetime(2026, 1, 1),
    catchup=False,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=1)},
):
    get = PythonOperator(task_id="extract", python_callable=extract)
    stamp = BashOperator(task_id="stamp", bash_command="echo stamped {{ run_id }}")

    @task
    def transform(rows: dict[str, Any], run_id: str | None = None) -> int:
        """Add up."""
        note("story", run_id, "transform")
        return sum(rows["rows"])

    @task.branch
    def choose(total: int) -> str:
        """Take a branch by what was added up: Airflow's own total is small."""
        return "load.big" if total > 100 else "load.small"

    total = transform(get.output)
    with TaskGroup("load") as load:
        big = EmptyOperator(task_id="big")
        small = BashOperator(task_id="small", bash_command="echo small {{ ti.xcom_pull(task_ids='transform') }}")
    done = EmptyOperator(task_id="done", trigger_rule="none_failed_min_one_success")
    get >> stamp
    choose(total) >> load >> done
    stamp >> done
