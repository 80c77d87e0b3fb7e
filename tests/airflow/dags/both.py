"""What the DAG files need, from Airflow 3 or from Airflow 2."""

try:
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.providers.standard.operators.empty import EmptyOperator
    from airflow.providers.standard.operators.latest_only import LatestOnlyOperator
    from airflow.providers.standard.operators.python import BranchPythonOperator, PythonOperator, ShortCircuitOperator
    from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
    from airflow.providers.standard.sensors.external_task import ExternalTaskSensor
    from airflow.providers.standard.sensors.time_delta import TimeDeltaSensor
    from airflow.sdk import DAG, BaseOperator, TaskGroup, setup, task, task_group, teardown
    from airflow.sdk import Asset
except ImportError:
    from airflow import DAG
    from airflow.datasets import Dataset as Asset
    from airflow.decorators import setup, task, task_group, teardown
    from airflow.models.baseoperator import BaseOperator
    from airflow.operators.bash import BashOperator
    from airflow.operators.empty import EmptyOperator
    from airflow.operators.latest_only import LatestOnlyOperator
    from airflow.operators.python import BranchPythonOperator, PythonOperator, ShortCircuitOperator
    from airflow.operators.trigger_dagrun import TriggerDagRunOperator
    from airflow.sensors.external_task import ExternalTaskSensor
    from airflow.sensors.time_delta import TimeDeltaSensor
    from airflow.utils.task_group import TaskGroup
from airflow.providers.common.sql.operators.sql import SQLExecuteQueryOperator
from airflow.providers.docker.operators.docker import DockerOperator

from datetime import datetime, timedelta

BEGIN = datetime(2026, 1, 1)

__all__ = [
    "BEGIN",
    "DAG",
    "Asset",
    "BaseOperator",
    "BashOperator",
    "BranchPythonOperator",
    "DockerOperator",
    "EmptyOperator",
    "ExternalTaskSensor",
    "LatestOnlyOperator",
    "PythonOperator",
    "SQLExecuteQueryOperator",
    "ShortCircuitOperator",
    "TaskGroup",
    "TimeDeltaSensor",
    "TriggerDagRunOperator",
    "datetime",
    "setup",
    "task",
    "task_group",
    "teardown",
    "timedelta",
]
