"""The databases of the contract's tests."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import anyio
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr

from pgflow_prefect.database.connection import connect as open_connection
from pgflow_prefect.database.implementations import CLASSIC, Implementation
from pgflow_prefect.database.schema import install_schema
from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.contract.worlds import ClassicWorld, ReleasedWorld, World
from tests.databases import Databases
from tests.released_lab import install_released, list_sources, open_flows

MakeDatabase = Callable[[str | None], str]

IMPLEMENTATIONS = ("classic", *(f"released: {source}" for source in list_sources()))


@pytest.fixture(scope="module")
def shared_db(make_database: MakeDatabase, template: str) -> Iterator[Connection]:
    """A connection to a database that the tests of a module share: to look at, not to write."""
    with psycopg.connect(make_database(template), autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = on")
        yield connection


def install(dsn: str) -> Implementation:
    """Install what fits a database, as `init` does."""

    async def run() -> Implementation:
        async with await open_connection(dsn, timeout=10) as connection:
            return await install_schema(connection)

    return anyio.run(run)


@pytest.fixture(scope="session")
def released_templates() -> dict[str, tuple[str, Implementation]]:
    """The databases of the released pgflow with our schema, by their source, as far as a test has asked for them."""
    return {}


@contextmanager
def open_released(
    source: str, databases: Databases, templates: dict[str, tuple[str, Implementation]]
) -> Iterator[ReleasedWorld]:
    """Copy a database of the released pgflow."""
    if source not in templates:
        made = databases.make(None)
        install_released(made, source)
        templates[source] = str(conninfo_to_dict(made)["dbname"]), install(made)
    name, implementation = templates[source]
    dsn = databases.make(name)
    with open_flows(dsn) as flows:
        # A copy of a database that was never used with Prefect gets an id of its own, as its owner's `init` gives it.
        flows.db.execute("SELECT pgflow_prefect.claim_installation()")
        yield ReleasedWorld(dsn, flows, implementation)
    databases.discard(dsn)


@pytest.fixture(params=IMPLEMENTATIONS)
def world(
    request: pytest.FixtureRequest,
    databases: Databases,
    released_templates: dict[str, tuple[str, Implementation]],
) -> Iterator[World]:
    """A database of this test's own, with each of the implementations."""
    name, _, source = str(request.param).partition(": ")
    if name == CLASSIC.name:
        dsn = request.getfixturevalue("dsn")
        with psycopg.connect(dsn, autocommit=True) as db:
            yield ClassicWorld(dsn, db, CLASSIC)
        return
    with open_released(source, databases, released_templates) as released:
        yield released


@pytest.fixture(params=list_sources())
def released(
    request: pytest.FixtureRequest,
    databases: Databases,
    released_templates: dict[str, tuple[str, Implementation]],
) -> Iterator[ReleasedWorld]:
    """A database of this test's own, with each version of the released pgflow that is at hand."""
    with open_released(str(request.param), databases, released_templates) as world:
        yield world


@pytest.fixture
async def store(world: World) -> AsyncIterator[Store]:
    """The store on the world's database."""
    async with open_store(Settings(dsn=SecretStr(world.dsn)), size=1, only_reads=True) as opened:
        yield opened
