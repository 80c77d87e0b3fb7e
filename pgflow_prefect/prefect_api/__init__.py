"""What this package asks of Prefect's API, and what it calls things there."""
