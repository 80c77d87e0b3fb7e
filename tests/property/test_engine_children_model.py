"""Random runs with child workflows, in random interleavings: the engine does what the nested model does."""

from collections.abc import Iterable

import psycopg
import pytest

from tests.conftest import Connection
from tests.property.random_children import play

_PARTS = 4
_RUNS = 15
"""In each part; `python -m tests.property.random_children` plays any number."""


def play_all(db: Connection, numbers: Iterable[int]) -> int:
    """Play these runs, and return how many events they had."""
    return sum(play(db, number) for number in numbers)


@pytest.mark.parametrize("part", range(_PARTS))
def test_the_engine_does_to_children_what_the_model_does(part: int, db: Connection) -> None:
    db.execute("SET synchronous_commit = off")
    events = play_all(db, range(part * _RUNS, (part + 1) * _RUNS))
    assert events > _RUNS  # the runs were played


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [
        ("may_try_again", "<= step.child_retries", "< step.child_retries"),
        ("judge_child", "state.skip_reason IS NOT NULL", "false"),
    ],
)
def test_an_engine_that_treats_children_wrong_is_found(function: str, right: str, wrong: str, db: Connection) -> None:
    db.execute("SET synchronous_commit = off")
    [[body]] = db.execute("SELECT pg_get_functiondef(oid) FROM pg_proc WHERE proname = %s", [function]).fetchall()
    assert right in str(body)
    db.execute(str(body).replace(right, wrong).encode())
    with pytest.raises((AssertionError, psycopg.Error)):  # the model differs, or the engine notices it itself
        play_all(db, range(_PARTS * _RUNS))
