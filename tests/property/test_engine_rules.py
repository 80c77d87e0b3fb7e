"""Random workflows with rules, in random interleavings: the engine does what a naive model does."""

import pytest

from tests.conftest import Connection
from tests.property.random_rules import play

_RUNS = 500
"""In each part; `python -m tests.property.random_rules` plays any number."""


@pytest.mark.parametrize("part", range(4))
def test_the_engine_does_what_the_model_does(part: int, db: Connection) -> None:
    db.execute("SET synchronous_commit = off")
    events = sum(play(db, number) for number in range(part * _RUNS, (part + 1) * _RUNS))
    assert events > _RUNS  # the runs were played
