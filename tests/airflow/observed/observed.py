"""A DAG that is observed: a retry, a branch, maps, a failure. It works with Airflow 2.11 and with 3.3."""

from datetime import datetime, timedelta
from typing import Any

try:
    from airflow.providers.standard.operators.python import BranchPythonOperator, PythonOperator
    from airflow.sdk import DAG, get_current_context, task
except ImportError:
    from airflow import DAG
    from airflow.decorators import task
    from airflow.operators.python import BranchPythonOperator, PythonOperator, get_current_context


def give(value: Any) -> Any:
    """Return what a task was made with."""
    return value


def fail_once(value: Any) -> Any:
    """Fail at the first try."""
    if get_current_context()["ti"].try_number == 1:
        raise ValueError("failed on purpose")
    return value


with DAG("observed", schedule=None, start_date=datetime(2026, 1, 1), catchup=False):
    extract = PythonOperator(task_id="extract", python_callable=give, op_args=[{"rows": [1, 2, 3], "price": 1.5}])
    flaky = PythonOperator(
        task_id="flaky",
        python_callable=fail_once,
        op_args=["at last"],
        retries=1,
        retry_delay=timedelta(seconds=2),
    )
    choose = BranchPythonOperator(task_id="choose", python_callable=give, op_args=[["left"]])
    left = PythonOperator(task_id="left", python_callable=give, op_args=["left"])
    right = PythonOperator(task_id="right", python_callable=give, op_args=["right"])
    join = PythonOperator(
        task_id="join",
        python_callable=give,
        op_args=[("a", "pair")],
        trigger_rule="none_failed_min_one_success",
    )

    @task
    def numbers() -> list[int]:
        """Return the items of the map."""
        return [1, 2, 3]

    @task
    def double(number: int) -> int:
        """Double an item."""
        return 2 * number

    @task
    def total(doubled: list[int]) -> int:
        """Add up what the map has returned."""
        return sum(doubled)

    total(double.expand(number=numbers()))

    # It succeeds once it is cleared.
    broken = PythonOperator(task_id="broken", python_callable=fail_once, op_args=["repaired"])
    after_broken = PythonOperator(task_id="after_broken", python_callable=give, op_args=[None])

    extract >> [flaky, choose]
    choose >> [left, right] >> join
    extract >> broken >> after_broken
