"""The command line of the acceptance tests, to be killed."""

from tests.acceptance.conftest import chain, cli, forker, outside, prefect

__all__ = ["chain", "cli", "forker", "outside", "prefect"]
