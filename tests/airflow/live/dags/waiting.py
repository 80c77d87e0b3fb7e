"""DAGs of a task that moves to and fro."""

from datetime import datetime, timedelta

try:
    from airflow.sdk import DAG, task
except ImportError:
    from airflow import DAG
    from airflow.decorators import task

from executions import note

for dag_id in ("waiting", "flipped"):
    with DAG(
        dag_id,
        schedule=None,
        start_date=datetime(2026, 1, 1),
        catchup=False,
        max_active_runs=16,
        default_args={"retries": 5, "retry_delay": timedelta(seconds=1)},
    ):

        @task
        def first(dag_id: str, run_id: str | None = None) -> list[str]:
            """Return who has done it."""
            note(dag_id, run_id, "first")
            return ["airflow"]

        @task
        def second(dag_id: str, first: list[str], run_id: str | None = None) -> list[str]:
            """Add who has done it."""
            note(dag_id, run_id, "second")
            return [*first, "airflow"]

        @task
        def third(dag_id: str, second: list[str], run_id: str | None = None) -> list[str]:
            """Add who has done it."""
            note(dag_id, run_id, "third")
            return [*second, "airflow"]

        third(dag_id, second(dag_id, first(dag_id)))
