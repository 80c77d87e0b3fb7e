"""DAGs whose policies have a broken database, a wrong role, and a DAG that is not known."""

from datetime import datetime, timedelta

try:
    from airflow.sdk import DAG, task
except ImportError:
    from airflow import DAG
    from airflow.decorators import task

from executions import note

RETRIES = {"retries": 3, "retry_delay": timedelta(seconds=1)}

for dag_id in ("unlucky", "unlucky_moved", "unlucky_role", "unlucky_name", "untouched"):
    with DAG(dag_id, schedule=None, start_date=datetime(2026, 1, 1), catchup=False, default_args=RETRIES):
        # A task reports its end for two minutes, but only until its time-out is near.
        @task(execution_timeout=timedelta(minutes=1) if dag_id == "unlucky" else None)
        def stay(dag_id: str, run_id: str | None = None) -> str:
            """Stay with Airflow."""
            note(dag_id, run_id, "stay")
            return "airflow"

        stay(dag_id)
