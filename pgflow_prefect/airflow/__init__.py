"""What becomes of Airflow's DAGs: their stubs, and the ledger of what differs."""
