"""A DAG whose runs end before it is observed: its last task fails."""

from datetime import datetime
from typing import Any

try:
    from airflow.sdk import DAG, task
except ImportError:
    from airflow import DAG
    from airflow.decorators import task


with DAG("past", schedule=None, start_date=datetime(2026, 1, 1), catchup=False, tags=["live"]):

    @task
    def extract() -> dict[str, Any]:
        """Return what the next task can't load."""
        return {"rows": [3, 1, 2]}

    @task
    def load(rows: dict[str, Any]) -> int:
        """Fail."""
        raise ValueError(f"{len(rows)} tables are locked")

    load(extract())
