"""Several sessions at the same time on the same runs with rules and maps, and the model behind them.

Every transition of a run locks its row until it commits, so the engine puts the calls on one run into an order. Each
call is noted in its own transaction, after it: with its place in that order, and with all that the run has become. The
model replays the notes, and has to come to the same each time. A call that the engine has refused is not in that order;
it must be one that the model refuses, too, in one of the states that the run had meanwhile.

`python -m tests.property.concurrent_rules --dsn DSN 50000` plays that many runs in a database of yours that has
`pgflow.sql`. The same number draws the same workflow and the same wishes; how they meet differs each time.
"""

import argparse
import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple
from uuid import UUID

import psycopg

from tests.conftest import Connection
from tests.engine import value
from tests.property.random_rules import Drawn, define_drawn, draw
from tests.property.replay import Replay
from tests.property.rules_model import Model
from tests.property.sessions import Refusal, Session, install

SESSIONS = 4
AT_ONCE = 3
"""Runs that the sessions share at a time."""


class Tally(NamedTuple):
    """How much has happened.

    Attributes:
        calls: that were not refused.
        turns: how many of them came after one of another session on the same run.
        late: reports that came after another one.
        refused: calls that were.
    """

    calls: int = 0
    turns: int = 0
    late: int = 0
    refused: int = 0

    def plus(self, other: "Tally") -> "Tally":
        return Tally(*(one + another for one, another in zip(self, other, strict=True)))


def play(sessions: Sequence[Connection], numbers: Sequence[int]) -> Tally:
    """Let the runs of these numbers be played by all sessions at the same time, and replay them.

    Raises:
        AssertionError: the engine and the model differ.
    """
    db = sessions[0]
    runs: dict[UUID, Drawn] = {}
    for number in numbers:
        drawn = draw(random.Random(number), continues=number % 2 == 1)  # noqa: S311  the same workflow each time
        define_drawn(db, f"race {number}", drawn)
        run_id = value(db, "SELECT (pgflow.run_workflow(%s, %s)).id", f"race {number}", json.dumps(drawn.payload))
        assert isinstance(run_id, UUID)
        runs[run_id] = drawn
    players = [
        Session(place, each, random.Random(f"{numbers} {place}"), runs)  # noqa: S311
        for place, each in enumerate(sessions)
    ]
    with ThreadPoolExecutor(len(players)) as pool:
        for played in [pool.submit(player.play) for player in players]:
            played.result()
    refusals = [refusal for player in players for refusal in player.refusals]
    tally = Tally()
    for run_id, drawn in runs.items():
        tally = tally.plus(_judge(db, run_id, drawn, [each for each in refusals if each.run_id == run_id]))
    db.execute("TRUNCATE race.calls")  # of thousands of runs they are gigabytes
    return tally


def _judge(db: Connection, run_id: UUID, drawn: Drawn, refusals: Sequence[Refusal]) -> Tally:
    replay = Replay(Model(drawn.graph, drawn.options, drawn.payload, drawn.when_failed, drawn.failed_by))
    calls = db.execute("SELECT place, call, answer, seen FROM race.calls WHERE run_id = %s ORDER BY place", [run_id])
    justified = {number for number, each in enumerate(refusals) if each.first == 0 and replay.refuses(each.call)}
    noted: list[Any] = calls.fetchall()
    places = [place for place, *_ in noted]
    for (place, call, answer, seen), until in zip(noted, [*places[1:], inf], strict=False):
        try:
            replay.apply(call, answer)
            replay.check(seen)
        except AssertionError as error:
            history = [each[:3] for each in noted if each[0] <= place]
            raise AssertionError(f"run {run_id} differs: {error}", drawn, history, seen, replay.model) from error
        justified |= {
            number
            for number, each in enumerate(refusals)
            if each.first < until and place <= each.last and replay.refuses(each.call)
        }
    for number, each in enumerate(refusals):
        assert number in justified, ("was refused for no reason", each, drawn, noted)
    [[now]] = db.execute("SELECT race.look(%s)", [run_id]).fetchall()
    assert isinstance(now, dict)
    if noted:
        assert {**now, "place": 0} == {**noted[-1][3], "place": 0}, "it has changed without a call"
    turns = sum(one[1]["by"] != other[1]["by"] for one, other in pairwise(noted))
    return Tally(len(noted), turns, replay.late, len(refusals))


def main() -> None:
    """Play as many runs as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int)
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--sessions", type=int, default=SESSIONS)
    chosen = parser.parse_args()
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(psycopg.connect(chosen.dsn, autocommit=True, options="-c synchronous_commit=off"))
            for _ in range(chosen.sessions)
        ]
        install(sessions[0])
        tally = Tally()
        for first in range(chosen.first, chosen.first + chosen.runs, AT_ONCE):
            numbers = [*range(first, min(first + AT_ONCE, chosen.first + chosen.runs))]
            tally = tally.plus(play(sessions, numbers))
        print(
            f"{chosen.runs:,} runs by {chosen.sessions} sessions, {tally.calls:,} calls, {tally.turns:,} of them after "
            f"another session's, {tally.late:,} reports too late, {tally.refused:,} calls refused: no difference"
        )


if __name__ == "__main__":
    main()
