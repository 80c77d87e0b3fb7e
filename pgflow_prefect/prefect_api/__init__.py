"""Requests to Prefect's API, and this package's names and ids there."""
