"""The parties: logins that hold one role each, an application's end user, and the services that they meet."""

from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgflow_prefect import Workflow
from tests.acceptance.conftest import chain, cli, forker, outside, prefect, services
from tests.conftest import Connection
from tests.engine import CHAIN, define
from tests.http_server import HttpServer, http_server
from tests.integration.conftest import client, insert_workflow, make_slug, pgflow_dsn, store
from tests.integration.supabase import ALICE, AUTH, FAILED, RUN, become, borrowed_roles, create_role, run_script

__all__ = ["chain", "cli", "client", "forker", "outside", "pgflow_dsn", "prefect", "services", "store"]  # fixtures

Party = Callable[[str], Connection]
"""Opens a connection of a login that is a member of this role and of no other: `define`, `run`, `work`, `observe`."""

PartyDsn = Callable[[str], str]
"""Returns the connection string of such a login, for a command or a worker."""

EndUser = Callable[..., Connection]
"""Opens a connection as `authenticated` for a user of the application, as PostgREST does it."""


@pytest.fixture
def roles(server_dsn: str, dsn: str) -> Iterator[None]:
    """Supabase's roles and the kit's, for this test alone: roles belong to the whole server."""
    with borrowed_roles(server_dsn, dsn):
        yield


@pytest.fixture
def kit(roles: None, db: Connection) -> Connection:
    """The owner's connection to a database with the four roles, the workflow `chain`, a pending and a failed run."""
    run_script(db, "api")
    run_script(db, "roles")
    define(db, "chain", CHAIN)
    for run_id in (RUN, FAILED):
        db.execute("SELECT pgflow.run_workflow('chain', '{}', %s)", [run_id])
    db.execute("SELECT pgflow.fail_step(%s, 'a', 'broken')", [FAILED])
    return db


@pytest.fixture
def policies(kit: Connection) -> Connection:
    """The same with row-level security; the pending run is Alice's."""
    kit.execute(AUTH.encode())
    run_script(kit, "row_level_security")
    kit.execute("UPDATE pgflow.runs SET owner_id = %s WHERE id = %s", [ALICE, RUN])
    return kit


@pytest.fixture
def party_dsn(kit: Connection, dsn: str) -> PartyDsn:
    """How a login of one role of the kit connects. It becomes the role as the kit advises, and RESET ROLE keeps it."""

    @cache
    def find(role: str) -> str:
        login = create_role(kit, f"LOGIN PASSWORD 'secret' IN ROLE pgflow_{role}")
        kit.execute(f"ALTER ROLE {login} SET role = 'pgflow_{role}'".encode())
        return make_conninfo(dsn, user=login, password="secret")  # noqa: S106

    return find


@pytest.fixture
def party(party_dsn: PartyDsn) -> Iterator[Party]:
    """A function that opens a connection of a login with one role of the kit."""
    opened: list[Connection] = []

    def connect_as(role: str) -> Connection:
        opened.append(psycopg.connect(party_dsn(role), autocommit=True))
        return opened[-1]

    yield connect_as
    for connection in opened:
        connection.close()


@pytest.fixture
def end_user(policies: Connection, dsn: str) -> Iterator[EndUser]:
    """A function that opens a connection of an application's end user, who sees the database through PostgREST."""
    opened: list[Connection] = []

    def connect_as(user: UUID = ALICE, role: str = "authenticated") -> Connection:
        opened.append(psycopg.connect(dsn, autocommit=True))
        return become(opened[-1], role, user)

    yield connect_as
    for connection in opened:
        connection.close()


@pytest.fixture
async def endpoint() -> AsyncIterator[HttpServer]:
    """A service of the worker's own machine, with which the author of a row listens; it answers with a number."""
    async with http_server() as server:
        server.respond(200, b"1")
        yield server


@pytest.fixture
def workflow(kit: Connection) -> Workflow:
    """A workflow whose only step `ask` is to be bound by a row; the database has no run."""
    kit.execute("DELETE FROM pgflow.step_states; DELETE FROM pgflow.runs")
    made = Workflow(make_slug())
    insert_workflow(kit, made.slug, ["ask"])
    return made


@pytest.fixture
def connect_to() -> Iterator[Callable[[str], Connection]]:
    """A function that opens an autocommit connection to any database."""
    opened: list[Connection] = []

    def connect(dsn: str) -> Connection:
        opened.append(psycopg.connect(dsn, autocommit=True))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()
