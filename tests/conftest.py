"""What every test may ask for: a database of its own on a real PostgreSQL."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import certifi
import psycopg
import pytest
from hypothesis import HealthCheck, settings
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgflow_prefect.database.embedded import start_embedded, stop_embedded
from pgflow_prefect.database.schema import SCRIPTS
from pgflow_prefect.deployment.prefect_server import prefect_server
from pgflow_prefect.shipped import shipped_path
from tests.brokers import rabbitmq_url, redis_url
from tests.collecting import pytest_runtestloop
from tests.databases import Databases, choose_place
from tests.sharing import choose_directory, share
from tests.suites import pytest_addoption, pytest_cmdline_main, pytest_itemcollected, pytest_report_header
from tests.termination import (
    TERMINATION,
    pytest_configure,
    pytest_keyboard_interrupt,
    pytest_sessionfinish,
    tell_that_all_is_clean,
)

__all__ = ["pytest_addoption", "pytest_cmdline_main", "pytest_itemcollected", "pytest_report_header"]  # hooks
__all__ += ["pytest_configure", "pytest_keyboard_interrupt", "pytest_runtestloop", "pytest_sessionfinish"]
__all__ += ["rabbitmq_url", "redis_url"]  # fixtures

Connection = psycopg.Connection[tuple[object, ...]]
Connect = Callable[[], Connection]

# Prefect looks at these once, when it is imported: nothing of the user's own, and nothing outside this directory.
PREFECT_HOME = tempfile.mkdtemp(prefix="pgflow-prefect-")


def _remove_home(owner: int) -> None:
    """Remove the directory where no pytest has, as in `python -m tests.faults`; not in a process that was forked."""
    if os.getpid() == owner:
        shutil.rmtree(PREFECT_HOME, ignore_errors=True)


atexit.register(_remove_home, os.getpid())
choose_directory(PREFECT_HOME)
for name in [*os.environ]:
    if name.startswith("PREFECT_"):
        del os.environ[name]
os.environ |= {
    "PREFECT_HOME": PREFECT_HOME,
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    "DO_NOT_TRACK": "1",
    "HYPOTHESIS_STORAGE_DIRECTORY": f"{PREFECT_HOME}/hypothesis",
    "PREFECT_API_SSL_CERT_FILE": f"{PREFECT_HOME}/authority.pem",
}
# Each of Prefect's clients reads all authorities, which takes 20 ms of CPU. The Prefect server of the tests needs none.
_AUTHORITY = Path(certifi.where()).read_text(encoding="utf-8").partition("-----END CERTIFICATE-----")
Path(os.environ["PREFECT_API_SSL_CERT_FILE"]).write_text("".join(_AUTHORITY[:2]), encoding="utf-8")

# What the person who runs the tests has set for the real thing is none of the tests' business.
for name in [*os.environ]:
    if name.startswith("PG") and not name.startswith("PGFLOW_TEST_"):
        del os.environ[name]


# No example has to be quick: on a busy machine, any may take long. What passed once passes again: for other examples
# each time, add `--hypothesis-profile=explore`.
_ANY_MACHINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", _ANY_MACHINE)
settings.register_profile("any machine", _ANY_MACHINE, derandomize=True, database=None)
settings.load_profile("any machine")

# A shell that starts this in the background has it ignore Ctrl-C, and so would all commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    shutil.rmtree(PREFECT_HOME, ignore_errors=True)
    tell_that_all_is_clean()


@pytest.fixture(scope="session")
def server_dsn() -> Iterator[str]:
    """The PostgreSQL server of this session: the one that PGFLOW_TEST_DSN names, or an embedded one."""
    if dsn := os.environ.get("PGFLOW_TEST_DSN"):
        yield dsn
        return
    # A short path: the socket's name has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="pgflow-", dir=choose_place()) as directory, ExitStack() as running:
        with TERMINATION.delayed():
            server = start_embedded(Path(directory) / "data")
            running.callback(stop_embedded, server)
        # Its power does not fail: hundreds of databases are created on it, and need not be on disk.
        execute(server.get_uri(), sql.SQL("ALTER SYSTEM SET fsync = off"))
        execute(server.get_uri(), sql.SQL("SELECT pg_reload_conf()"))
        yield server.get_uri()


def route(dsn: str) -> str:
    """Return how the product is to reach a database: through the pooler that PGFLOW_TEST_POOLER names, if it does.

    The variable has what differs, such as `host=/run/pooler port=6432`. The tests themselves go past the pooler.
    """
    pooler = conninfo_to_dict(os.environ.get("PGFLOW_TEST_POOLER", ""))
    return make_conninfo(dsn, **{name: str(text) for name, text in pooler.items()})


def execute(dsn: str, statement: sql.SQL | sql.Composed) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statement)


@pytest.fixture(scope="session")
def databases(server_dsn: str) -> Iterator[Databases]:
    """The databases of this session on its server."""
    is_ours = "PGFLOW_TEST_DSN" not in os.environ
    found = Databases(server_dsn, is_ours=is_ours)
    yield found
    found.close()
    if not is_ours:  # one of our own goes as a whole
        found.drop_all()


@pytest.fixture(scope="session")
def make_database(databases: Databases) -> Callable[[str | None], str]:
    """A function that creates a database, empty or as a copy of another one, and returns its connection string."""
    return databases.make


@pytest.fixture(scope="session")
def template(make_database: Callable[[str | None], str]) -> str:
    """The name of a database with both schemas installed, to be copied."""
    dsn = make_database(None)
    with psycopg.connect(dsn, autocommit=True, options="-c jit=off") as connection:
        for script in SCRIPTS:
            connection.execute(shipped_path("sql", script).read_bytes())
        return connection.info.dbname


@pytest.fixture
def empty_dsn(databases: Databases) -> Iterator[str]:
    """A database of this test's own, with nothing in it."""
    made = databases.make(None)
    yield made
    databases.discard(made)


@pytest.fixture
def copy_dsn(empty_dsn: str) -> str:
    """The database that becomes a copy of this test's own; see `tests.copying`."""
    return empty_dsn


@pytest.fixture
def dsn(databases: Databases, template: str) -> Iterator[str]:
    """A database of this test's own, with the engine's and the adapter's schema."""
    made = databases.make(template)
    # A copy of a database that was never used with Prefect gets an id of its own, or the first command would do it.
    execute(made, sql.SQL("SELECT pgflow_prefect.claim_installation()"))
    yield made
    databases.discard(made)


@pytest.fixture
def product_dsn(dsn: str) -> str:
    """This test's database, as the product is to reach it."""
    return route(dsn)


@pytest.fixture
def connect(dsn: str) -> Iterator[Connect]:
    """A function that opens an autocommit connection to this test's database."""
    opened: list[Connection] = []

    def open_connection() -> Connection:
        opened.append(psycopg.connect(dsn, autocommit=True))
        return opened[-1]

    yield open_connection
    for connection in opened:
        connection.close()


@pytest.fixture
def db(connect: Connect) -> Connection:
    """An autocommit connection to this test's database."""
    return connect()


@pytest.fixture(scope="session")
def prefect_api(make_database: Callable[[str | None], str]) -> Iterator[str]:
    """The URL of the Prefect server of all processes of this session; this process's own flows use it, too."""
    # Imported only where it is needed: it takes a second.
    from prefect.logging.handlers import APILogHandler  # noqa: PLC0415
    from prefect.settings import PREFECT_API_URL, temporary_settings  # noqa: PLC0415

    with (
        share("prefect", lambda: prefect_server(Path(PREFECT_HOME), make_database(None))) as url,
        temporary_settings({PREFECT_API_URL: url}),
    ):
        yield url
        # What this process has still to tell the server, while there is one.
        APILogHandler().flush()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
