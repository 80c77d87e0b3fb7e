"""Airflow's own database: read only, and by column names, which differ between its versions."""
