"""What Prefect shows of a run: task runs, events, artifacts."""
