"""The command line, `pgflow-prefect`."""

from pgflow_prefect.cli.app import main

__all__ = ["main"]
