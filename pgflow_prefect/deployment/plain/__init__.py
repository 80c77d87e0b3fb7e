"""Writes a workflow as one plain file that runs without this package: for Airflow, or for Prefect alone."""
