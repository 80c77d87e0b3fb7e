"""Several sessions at the same time on the same runs make of them what one session would have made."""

from collections.abc import Iterator
from contextlib import ExitStack

import psycopg
import pytest

from tests.conftest import Connection
from tests.property.concurrent_rules import AT_ONCE, SESSIONS, Tally, play
from tests.property.sessions import install

_ROUNDS = 8
"""`python -m tests.property.concurrent_rules` plays any number."""


@pytest.fixture
def sessions(dsn: str) -> Iterator[list[Connection]]:
    with ExitStack() as stack:
        options = "-c synchronous_commit=off"
        opened = [stack.enter_context(psycopg.connect(dsn, autocommit=True, options=options)) for _ in range(SESSIONS)]
        install(opened[0])
        yield opened


def play_rounds(sessions: list[Connection], count: int) -> Tally:
    tally = Tally()
    for number in range(count):
        tally = tally.plus(play(sessions, range(number * AT_ONCE, (number + 1) * AT_ONCE)))
    return tally


def test_sessions_at_the_same_time_do_what_the_model_does(sessions: list[Connection]) -> None:
    tally = play_rounds(sessions, _ROUNDS)
    assert tally.calls > _ROUNDS * AT_ONCE
    assert tally.turns  # they were at the same runs


def test_an_engine_whose_calls_do_not_wait_for_each_other_is_found(sessions: list[Connection]) -> None:
    db = sessions[0]
    [[body]] = db.execute("SELECT pg_get_functiondef('pgflow.lock_run'::regproc)").fetchall()
    lock = "FOR NO KEY UPDATE;"
    assert lock in str(body)
    # A call waits a moment, so that another one comes between on the fastest machine, too.
    db.execute(str(body).replace(lock, "; PERFORM pg_catalog.pg_sleep(0.002);").encode())
    with pytest.raises((AssertionError, psycopg.Error)):
        play_rounds(sessions, 20 * _ROUNDS)
