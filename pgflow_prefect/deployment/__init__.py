"""Files of handlers, deployments, diagnosis, reconciliation, and a Prefect server of our own."""
