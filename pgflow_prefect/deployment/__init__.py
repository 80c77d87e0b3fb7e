"""What lies around a run: files of handlers, made and found, and a Prefect server of our own."""
