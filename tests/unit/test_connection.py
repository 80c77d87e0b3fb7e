"""Which database is meant, and connecting to it: what is said when that fails, and what is never said."""

import tempfile
import traceback
from pathlib import Path

import anyio
import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from pgflow_prefect.database.connection import connect, create_database, find_dsn, open_pool, to_sqlalchemy_url
from pgflow_prefect.database.embedded import default_directory, start_embedded, stop_embedded
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError, UsageError
from pgflow_prefect.settings import Settings
from tests.conftest import Connection

SECRET = "hunter2"  # noqa: S105  not a real one
REFUSED = f"postgresql://me:{SECRET}@127.0.0.1:1/app"


def show(error: PgflowPrefectError) -> str:
    """Return everything that a program prints of an error."""
    return f"{error} {error!r} {error.args} {''.join(traceback.format_exception(error))}"


def test_the_setting_comes_before_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "elsewhere")
    monkeypatch.setenv("PGFLOW_DSN", "host=from-environment")
    assert find_dsn(Settings()) == "host=from-environment"
    assert find_dsn(Settings(dsn=SecretStr("host=given"))) == "host=given"


@pytest.mark.parametrize("name", ["PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE"])
def test_without_the_setting_libpq_reads_its_own_variables(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "x")
    assert find_dsn(Settings()) == ""


def test_an_empty_setting_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGFLOW_DSN", "")
    monkeypatch.setenv("PGHOST", "x")
    assert find_dsn(Settings()) == ""


def test_by_default_the_embedded_server_keeps_the_user_s_data(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="pgflow-") as directory:  # a short path, as in conftest
        monkeypatch.setenv("XDG_DATA_HOME", directory)
        try:
            with psycopg.connect(find_dsn(Settings())) as connection:
                assert connection.execute("SHOW data_directory").fetchone() == (str(default_directory()),)
            assert Path(directory) in default_directory().parents
        finally:
            stop_embedded(start_embedded(default_directory()))


@pytest.mark.parametrize(
    "dsn",
    [
        f"me:{SECRET}",
        f"host=db password={SECRET} nonsense",
        f"host=db pasword={SECRET}",
        f"postgresql://me:{SECRET}%zz@db/app",
        f"postgresql://me:{SECRET}@[db/app",
        f"postgresql://me:a@{SECRET}@db/app",
        f"postgresql://me:{SECRET}/a@db/app",
        f"postgresql://me:a:{SECRET}/b@db/app",
        f"mysql://me:{SECRET}@db/app",
    ],
)
def test_a_dsn_that_is_none_is_refused_without_showing_it(dsn: str) -> None:
    with pytest.raises(UsageError, match="the DSN") as refused:
        find_dsn(Settings(dsn=SecretStr(dsn)))
    assert SECRET not in show(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://me:{SECRET}@db:5433/app?sslmode=require",
        "postgresql:///app",
        "host=/var/run/postgresql dbname=app",
        "postgresql://me@one:1,two:2/app",
        "postgresql://me:p%40%2Fss@db/app",
        "postgresql://me:p?ss:word@db/app",
        "service=app",
    ],
)
def test_a_valid_dsn_is_taken_as_it_is(dsn: str) -> None:
    assert find_dsn(Settings(dsn=SecretStr(dsn))) == dsn


def test_settings_do_not_show_the_password() -> None:
    settings = Settings(dsn=SecretStr(REFUSED))
    assert SECRET not in f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"


@pytest.mark.anyio
@pytest.mark.parametrize("dsn", [REFUSED, f"host=nowhere.invalid user=me password={SECRET}"])
async def test_a_server_that_can_t_be_reached_is_named_and_the_password_is_not(dsn: str) -> None:
    with pytest.raises(DatabaseUnavailableError, match=r"127\.0\.0\.1|nowhere\.invalid") as refused:
        await connect(dsn, timeout=5)
    assert "PGFLOW_DSN" in str(refused.value)
    assert SECRET not in show(refused.value)
    with pytest.raises(DatabaseUnavailableError) as refused:
        async with open_pool(dsn, size=1, timeout=5):
            pass
    assert SECRET not in show(refused.value)


@pytest.mark.anyio
async def test_a_database_that_does_not_exist_is_named(server_dsn: str) -> None:
    with pytest.raises(DatabaseUnavailableError, match='database "no_such_database" does not exist'):
        await connect(make_conninfo(server_dsn, dbname="no_such_database", password=SECRET), timeout=5)


@pytest.mark.thorough
@pytest.mark.anyio
async def test_a_server_that_does_not_answer_is_given_up() -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, lambda stream: anyio.sleep_forever())
        port = listener.extra(anyio.abc.SocketAttribute.local_port)  # noqa: S610  this is no Django
        with anyio.fail_after(180), pytest.raises(DatabaseUnavailableError, match="timeout"):
            await connect(f"host=127.0.0.1 port={port}", timeout=0.1)
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_our_connections_are_known_by_name_and_hold_no_transaction(server_dsn: str) -> None:
    async with open_pool(server_dsn, size=2, timeout=10) as pool, pool.connection() as connection:
        assert connection.autocommit
        assert connection.prepare_threshold is None
        cursor = await connection.execute("SHOW application_name")
        assert await cursor.fetchone() == {"application_name": "pgflow-prefect"}


@pytest.mark.anyio
async def test_what_a_dsn_sets_itself_stays(server_dsn: str) -> None:
    connection = await connect(make_conninfo(server_dsn, application_name="mine", connect_timeout=7), timeout=10)
    async with connection:
        parameters = connection.info.get_parameters()
    assert (parameters["application_name"], parameters["connect_timeout"]) == ("mine", "7")


@pytest.mark.anyio
async def test_a_pool_has_no_more_connections_than_it_may(dsn: str, db: Connection) -> None:
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'pgfl%'"
    async with open_pool(dsn, size=2, timeout=10) as pool, anyio.create_task_group() as group:
        both = anyio.Event()
        taken = 0

        async def take() -> None:
            nonlocal taken
            async with pool.connection() as connection:
                await connection.execute("SELECT 1")
                taken += 1
                if taken == 2:
                    both.set()
                await both.wait()

        for _ in range(5):
            group.start_soon(take)
        await both.wait()
        row = db.execute(count).fetchone()
        assert row is not None
        assert row[0] == 2


@pytest.mark.parametrize(
    ("dsn", "password", "query"),
    [
        ("postgresql://me:p%40ss%2F@db:5433/app", "p@ss/", {"host": "db", "port": "5433"}),
        ("host=/run/pg dbname=app user=me", None, {"host": "/run/pg"}),
    ],
)
def test_a_dsn_as_sqlalchemy_takes_it(dsn: str, password: str | None, query: dict[str, str]) -> None:
    url = make_url(to_sqlalchemy_url(dsn))
    assert (url.drivername, url.username, url.database) == ("postgresql+asyncpg", "me", "app")
    assert (url.password, dict(url.query)) == (password, query)


def test_a_database_is_created_beside_the_one_that_is_named(server_dsn: str) -> None:
    made = create_database(server_dsn, 'odd "name"')
    with psycopg.connect(made) as connection:
        assert connection.info.dbname == 'odd "name"'
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        connection.execute('DROP DATABASE "odd ""name"""')
