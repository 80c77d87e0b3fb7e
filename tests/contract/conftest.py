"""The databases of the contract's tests."""

from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.conftest import Connection


@pytest.fixture(scope="module")
def shared_db(make_database: Callable[[str | None], str], template: str) -> Iterator[Connection]:
    """A connection to a database that the tests of a module share: to look at, not to write."""
    with psycopg.connect(make_database(template), autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = on")
        yield connection
