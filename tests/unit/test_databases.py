"""Databases of tests are dropped once nothing uses them."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests import databases as module
from tests.conftest import Connection
from tests.databases import Databases, choose_place
from tests.engine import wait_until_true


@pytest.fixture
def server(server_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        yield connection


def exists(server: Connection, dsn: str) -> bool:
    name = psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]
    return server.execute("SELECT FROM pg_database WHERE datname = %s", [name]).fetchone() is not None


def test_a_database_in_use_is_dropped_when_a_later_one_is_discarded(server_dsn: str, server: Connection) -> None:
    databases = Databases(server_dsn, is_ours=False)
    used, later = databases.make(None), databases.make(None)
    with psycopg.connect(used, autocommit=True) as connection:
        backend = connection.info.backend_pid
        databases.discard(used)
        assert exists(server, used)
        assert connection.execute("SELECT 1").fetchone() == (1,)
    wait_until_true(server, "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %s)", backend)

    databases.discard(later)

    assert not exists(server, used)
    assert not exists(server, later)


def test_in_the_end_all_are_dropped(server_dsn: str, server: Connection) -> None:
    databases = Databases(server_dsn, is_ours=False)
    made = [databases.make(None) for _ in range(2)]
    with psycopg.connect(made[0], autocommit=True):
        databases.drop_all()
    assert not [dsn for dsn in made if exists(server, dsn)]


def test_data_is_kept_on_the_disk_where_memory_has_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_MEMORY", tmp_path)
    monkeypatch.setattr(module, "_ROOM", 1)
    assert choose_place() == str(tmp_path)
    monkeypatch.setattr(module, "_ROOM", 2**80)
    assert choose_place() != str(tmp_path)
    monkeypatch.setattr(module, "_MEMORY", tmp_path / "missing")
    assert choose_place() != str(tmp_path)
