"""Reads Airflow's serialized DAGs: the documents by which Airflow itself schedules. It executes no DAG file."""
