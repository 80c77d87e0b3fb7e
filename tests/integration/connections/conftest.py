"""What the tests of `context.connection` share."""

import pytest

from pgflow_prefect import Workflow
from tests.conftest import Connection
from tests.integration.conftest import Define, make_slug


@pytest.fixture(autouse=True)
def written(db: Connection) -> None:
    """A table that the handlers write to."""
    db.execute("CREATE TABLE written (attempt int, pid int)")
    db.execute("CREATE TABLE counted (n int)")
    db.execute("INSERT INTO counted VALUES (0)")


@pytest.fixture
def workflow(define: Define) -> Workflow:
    """A workflow of one step, `write`, which has no handler yet."""
    made = Workflow(make_slug())
    define(made.slug, ["write"])
    return made
