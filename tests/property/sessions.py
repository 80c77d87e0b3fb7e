"""Sessions that call functions of the engine at random, and note each call in the transaction of the call."""

import json
import random
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from psycopg import sql

from tests.conftest import Connection
from tests.engine import value
from tests.property.random_rules import RESULTS, Drawn

_CALLS = 30  # of a session in the runs that it is given

_SCHEMA = """
CREATE SCHEMA IF NOT EXISTS race;
CREATE TABLE IF NOT EXISTS race.calls (
    place bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, run_id uuid, call jsonb, answer jsonb, seen jsonb);
CREATE INDEX IF NOT EXISTS calls_run ON race.calls (run_id, place);

CREATE OR REPLACE FUNCTION race.look(run uuid) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT jsonb_build_object(
        'place', (SELECT coalesce(max(c.place), 0) FROM race.calls c WHERE c.run_id = run),
        'status', r.status, 'remaining', r.remaining, 'epoch', r.epoch, 'has_message', r.error_message IS NOT NULL,
        'rows', (SELECT coalesce(jsonb_object_agg(s.step_slug,
                                                  jsonb_build_array(s.status, s.skip_reason, s.skip_cascades)), '{}')
                 FROM pgflow.step_states s WHERE s.run_id = run),
        'attempts', (SELECT coalesce(jsonb_object_agg(s.step_slug, s.attempts), '{}')
                     FROM pgflow.step_states s WHERE s.run_id = run),
        'results', (SELECT coalesce(jsonb_object_agg(s.step_slug, s.step_result), '{}') FROM pgflow.step_states s
                    WHERE s.run_id = run AND s.status = 'completed' AND s.skip_reason IS NULL),
        'waiting', (SELECT coalesce(jsonb_object_agg(w.step_slug, w.unmet), '{}')
                    FROM pgflow.waiting_steps w WHERE w.run_id = run),
        'items', (SELECT coalesce(jsonb_object_agg(m.step_slug, m.items), '{}') FROM (
                      SELECT i.step_slug, jsonb_agg(
                          jsonb_build_array(i.status, i.item_result, i.skip_reason IS NOT NULL) ORDER BY i.item_index
                      ) AS items
                      FROM pgflow.step_items i WHERE i.run_id = run GROUP BY i.step_slug) m),
        'counts', (SELECT coalesce(jsonb_object_agg(m.step_slug, jsonb_build_array(m.remaining, m.failed)), '{}')
                   FROM pgflow.step_maps m WHERE m.run_id = run))
    FROM pgflow.runs r WHERE r.id = run
$$;

CREATE OR REPLACE FUNCTION race.call(run uuid, statement text, call jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    answer jsonb;
BEGIN
    EXECUTE format('SELECT jsonb_agg(a) FROM (%s) a', statement) INTO answer;
    -- The run is locked now, until this commits: the next place is behind those of all calls that came before.
    INSERT INTO race.calls (run_id, call, answer, seen) VALUES (run, call, coalesce(answer, '[]'), race.look(run));
    RETURN coalesce(answer, '[]');
END
$$;
"""

_STATEMENTS = {
    "claim_step": "SELECT status, attempt FROM pgflow.claim_step({run}, {step})",
    "complete_step": "SELECT status FROM pgflow.complete_step({run}, {step}, {result}, {epoch}, {attempt})",
    "fail_step": "SELECT status FROM pgflow.fail_step({run}, {step}, 'broken', {epoch}, {attempt})",
    "skip_step": "SELECT status FROM pgflow.skip_step({run}, {step}, NULL, {cascade}, {epoch}, {attempt})",
    "take_branches": "SELECT status FROM pgflow.take_branches({run}, {step}, {taken}, 'null', {whole}, {epoch}, "
    "{attempt})",
    "claim_items": "SELECT item_index, attempt FROM pgflow.claim_items({run}, {step}, {wanted}, NULL, {lease})",
    "complete_items": "SELECT pgflow.complete_items({run}, {step}, {indexes}, {results}, NULL, {attempts}) AS accepted",
    "fail_items": "SELECT pgflow.fail_items({run}, {step}, {indexes}, {messages}, NULL, NULL, {attempts}) AS accepted",
    "retry_items": "SELECT pgflow.fail_items({run}, {step}, {indexes}, {messages}, '0 s', NULL, {attempts}) "
    "AS accepted",
    "skip_items": "SELECT pgflow.skip_items({run}, {step}, {indexes}, NULL, NULL, {attempts}) AS accepted",
    "cancel_run": "SELECT status FROM pgflow.cancel_run({run})",
    "reopen_run": "SELECT status FROM pgflow.reopen_run({run})",
    "repair_run": "SELECT status FROM pgflow.repair_run({run})",
    "take_run": "SELECT pgflow.take_run({run}) AS epoch",
}

Call = Mapping[str, Any]
"""A function, its arguments by their names in `_STATEMENTS`, and (by) the number of the session."""


class Refusal(NamedTuple):
    """A call that the engine has refused.

    Attributes:
        run_id: of which run.
        call: it.
        first: the last call before it that the session knew of.
        last: the last one that it may have come after.
    """

    run_id: UUID
    call: Call
    first: int
    last: int


class Session:
    """One connection, which does what it likes with some runs."""

    def __init__(self, number: int, db: Connection, rng: random.Random, runs: Mapping[UUID, Drawn]) -> None:
        self.refusals: list[Refusal] = []
        self._number = number
        self._db = db
        self._rng = rng
        self._runs = runs
        self._attempts: dict[tuple[UUID, str], int] = {}  # its own claims
        self._item_attempts: dict[tuple[UUID, str], dict[int, int]] = defaultdict(dict)

    def play(self) -> None:
        """Call functions until it has called enough of them, or all runs are completed."""
        left = [*self._runs]
        for _ in range(_CALLS):
            if not left:
                return
            run_id = self._rng.choice(left)
            [[seen]] = self._db.execute("SELECT race.look(%s)", [run_id]).fetchall()
            assert isinstance(seen, dict)
            if seen["status"] == "completed":
                left.remove(run_id)
            elif (call := self._choose(run_id, seen)) is not None:
                self._make(run_id, {**call, "by": self._number}, seen["place"])

    def _make(self, run_id: UUID, call: Call, place: int) -> None:
        words = {name: sql.Literal(each) for name, each in call.items()}
        statement = sql.SQL(_STATEMENTS[call["do"]]).format(run=sql.Literal(run_id), **words).as_string(self._db)
        try:
            answer = value(self._db, "SELECT race.call(%s, %s, %s)", run_id, statement, json.dumps(call))
        except psycopg.errors.ObjectNotInPrerequisiteState:
            last = value(self._db, "SELECT coalesce(max(place), 0) FROM race.calls WHERE run_id = %s", run_id)
            self.refusals.append(Refusal(run_id, call, place, int(str(last))))
            return
        assert isinstance(answer, list)
        if call["do"] == "claim_step" and answer[0]["status"] == "pending":
            self._attempts[run_id, call["step"]] = answer[0]["attempt"]
        elif call["do"] == "claim_items":
            self._item_attempts[run_id, call["step"]] |= {each["item_index"]: each["attempt"] for each in answer}

    def _choose(self, run_id: UUID, seen: Mapping[str, Any]) -> Call | None:
        rng, graph = self._rng, self._runs[run_id].graph
        pending = [step for step, (status, _, _) in seen["rows"].items() if status == "pending"]
        maps = [step for step, items in seen["items"].items() if any(status == "pending" for status, _, _ in items)]
        choices = ["end"] * 12 * bool(pending) + ["items"] * 14 * bool(maps) + ["repair_run"]
        if seen["status"] == "failed":
            choices += ["reopen_run"] * 5
        else:
            choices += ["skip", "take_run"] + ["cancel_run"] * (rng.random() < 0.3)
        match rng.choice(choices):
            case "end":
                return self._end_step(run_id, rng.choice(pending), seen)
            case "items":
                step = rng.choice(maps)
                return self._end_items(run_id, step, len(seen["items"][step]))
            case "skip":
                return self._skip(rng.choice([*graph]), None, None)
            case function:
                return {"do": function}

    def _skip(self, step: str, epoch: int | None, attempt: int | None) -> Call:
        cascade = self._rng.random() < 0.5
        return {"do": "skip_step", "step": step, "cascade": cascade, "epoch": epoch, "attempt": attempt}

    def _end_step(self, run_id: UUID, step: str, seen: Mapping[str, Any]) -> Call:
        rng, graph = self._rng, self._runs[run_id].graph
        attempt = self._attempts.get((run_id, step)) if rng.random() < 0.5 else None
        epoch = seen["epoch"] if rng.random() < 0.2 else None
        report = {"step": step, "epoch": epoch, "attempt": attempt}
        kind = rng.random()
        if kind < 0.3:
            return {"do": "claim_step", "step": step}
        if kind < 0.65:
            return {"do": "complete_step", "result": json.dumps(rng.choice(RESULTS)), **report}
        if kind < 0.82:
            return {"do": "fail_step", **report}
        if kind < 0.9:
            return self._skip(step, epoch, attempt)
        below = [each for each, ups in graph.items() if step in ups]
        taken = rng.sample(below, rng.randint(0, len(below)))
        return {"do": "take_branches", "taken": taken, "whole": rng.random() < 0.3, **report}

    def _end_items(self, run_id: UUID, step: str, total: int) -> Call:
        rng, claimed = self._rng, self._item_attempts[run_id, step]
        if rng.random() < 0.35:
            lease = rng.choice([None, "1 hour"])
            return {"do": "claim_items", "step": step, "wanted": rng.randint(0, 3), "lease": lease}
        known = [*claimed] if rng.random() < 0.6 else []
        indexes = rng.sample(known or range(total), rng.randint(1, len(known or range(total))))
        report = {"step": step, "indexes": indexes, "attempts": [claimed[each] for each in indexes] if known else None}
        match rng.choice(["complete_items"] * 4 + ["fail_items", "retry_items", "skip_items"]):
            case "complete_items":
                return {
                    "do": "complete_items",
                    "results": json.dumps([rng.choice(RESULTS) for _ in indexes]),
                    **report,
                }
            case "skip_items":
                return {"do": "skip_items", **report}
            case function:
                return {"do": function, "messages": ["broken"] * len(indexes), **report}


def install(db: Connection) -> None:
    """Make what the sessions note their calls with."""
    db.execute(_SCHEMA)
