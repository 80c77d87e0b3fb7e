"""One Airflow for all tests here, beside the command line of the acceptance tests."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.acceptance.conftest import CommandLine, forker, outside, prefect, services
from tests.airflow.live.policies import Policies
from tests.airflow.live.roles import ASKER, READER, make_login
from tests.airflow.live.server import Airflow, find_python, load, start
from tests.sharing import share

__all__ = ["forker", "outside", "prefect", "services"]


@pytest.fixture(scope="session")
def airflow(make_database: Callable[[str | None], str]) -> Iterator[Airflow]:
    """A running Airflow. All processes of this session share it, so each test has runs or DAGs of its own."""
    python = find_python()
    with share("airflow", lambda: start(python, make_database(None))) as address:
        yield load(address)


@pytest.fixture
def cli(airflow: Airflow, outside: CommandLine, product_dsn: str, prefect_api: str) -> Iterator[CommandLine]:
    """The command with this test's database, a Prefect server, and a login that only reads Airflow's tables."""
    with make_login(airflow.dsn, READER) as reader:
        configured = {
            "PGFLOW_DSN": product_dsn,
            "PREFECT_API_URL": prefect_api,
            "PGFLOW_AIRFLOW_DSN": reader,
            "PGFLOW_AIRFLOW_POLL_INTERVAL": "0.5",
        }
        yield replace(outside, environment={**outside.environment, **configured})


@pytest.fixture
def policies(airflow: Airflow, cli: CommandLine, dsn: str) -> Iterator[Policies]:
    """Lets DAGs ask this test's database, by a login that may call three functions."""
    with make_login(dsn, ASKER) as address:
        yield Policies(airflow, cli, address)
