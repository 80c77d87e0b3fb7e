"""Random workflows with rules, random events, and the engine beside the model after each of them.

`python -m tests.property.random_rules --dsn DSN 50000` makes that many runs in a database of yours that has
`pgflow.sql`; `--first` begins with another one. The same number makes the same run again.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psycopg

from tests.conftest import Connection
from tests.engine import define, value, waiting
from tests.property.rules_model import INTOLERANT, TOLERANT, Graph, Item, Model, StepOptions

_MOST_EVENTS = 60
RESULTS: tuple[Any, ...] = (1, 2, [1, 2], [], "x", None, [[1], 2])
_PAYLOADS: tuple[Any, ...] = ({"k": 1}, {"k": 2}, {}, [1, 2, 3], [])


@dataclass(frozen=True)
class Drawn:
    """A workflow and the payload of its run."""

    graph: Graph
    options: dict[str, StepOptions]
    when_failed: str | None
    failed_by: str
    payload: Any


def draw(rng: random.Random, *, continues: bool, most: int = 9) -> Drawn:
    """Draw a workflow of two to so many steps, each of which waits for some of those before it."""
    dense = rng.random()
    graph = {
        f"s{i}": [f"s{j}" for j in range(i) if rng.random() < 0.2 + 0.5 * dense / max(1, i / 2)]
        for i in range(rng.randint(2, most))
    }
    rules: list[str | None] = [None] * 5
    rules += [*INTOLERANT, *TOLERANT] if continues else INTOLERANT
    if rng.random() < 0.2:  # few rules, so that they meet
        rules = [rng.choice(rules), None, rng.choice(rules)]
    options = {step: _draw_options(rng, ups, rules, continues=continues) for step, ups in graph.items()}
    return Drawn(
        graph,
        options,
        "continue" if continues and rng.random() < 0.3 else None,
        "leaves" if rng.random() < 0.4 else "steps",
        rng.choice(_PAYLOADS),
    )


def _draw_options(
    rng: random.Random, ups: Sequence[str], rules: Sequence[str | None], *, continues: bool
) -> StepOptions:
    options = StepOptions()
    if rng.random() < 0.7:
        options.rule = rng.choice(rules)
    if rng.random() < 0.15:
        pattern = {rng.choice(ups) if ups else "k": rng.choice([1, 2])}
        if rng.random() < 0.5:
            options.required = pattern
        else:
            options.forbidden = pattern
        options.when_unmet = rng.choice(["fail", "skip", "skip", "skip-cascade", "skip-cascade"])
    if rng.random() < 0.2:
        options.when_exhausted = rng.choice(["fail", "skip", "skip-cascade"])
    if rng.random() < 0.25:
        options.is_map = True
        options.over = rng.choice([*ups, "payload"]) if len(ups) > 1 else None
        options.max_items = rng.choice([1, 100, 100, 100])
        options.when_empty = rng.choice(["complete", "complete", "skip", "skip-cascade"])
        options.when_item_fails = rng.choice(["stop", "continue", "skip"])
    options.fails_run = not continues or rng.random() > 0.15
    options.is_setup = rng.random() < 0.15
    return options


def define_drawn(db: Connection, workflow: str, drawn: Drawn) -> None:
    """Insert a drawn workflow."""
    define(db, workflow, {step: [*ups] for step, ups in drawn.graph.items()})
    db.execute(
        "UPDATE pgflow.workflows SET when_failed = %s, failed_by = %s WHERE slug = %s",
        [drawn.when_failed, drawn.failed_by, workflow],
    )
    for step, options in drawn.options.items():
        db.execute(
            "UPDATE pgflow.steps SET rule = %s, required_input_pattern = %s, forbidden_input_pattern = %s, "
            "when_unmet = %s, when_exhausted = %s, fails_run = %s, is_setup = %s, step_type = %s, map_over = %s, "
            "max_items = %s, when_empty = %s, when_item_fails = %s "
            "WHERE workflow_slug = %s AND slug = %s",
            [
                options.rule,
                None if options.required is None else json.dumps(options.required),
                None if options.forbidden is None else json.dumps(options.forbidden),
                options.when_unmet,
                options.when_exhausted,
                options.fails_run,
                options.is_setup,
                "map" if options.is_map else "single",
                options.over,
                options.max_items,
                options.when_empty,
                options.when_item_fails,
                workflow,
                step,
            ],
        )


@dataclass
class Play:
    """A run in the database, and its model.

    Attributes:
        db: a connection.
        rng: decides what happens.
        run_id: the run.
        model: of it.
        drawn: its workflow.
        events: what has happened to it.
    """

    db: Connection
    rng: random.Random
    run_id: UUID
    model: Model
    drawn: Drawn
    events: list[object] = field(default_factory=list)

    def play(self) -> int:
        """Let things happen until it is completed, or left alone; return how many did."""
        self.check()
        for _ in range(_MOST_EVENTS):
            if not self._do_something():
                break
            self.check()
            if self.model.status == "pending" and self.rng.random() < 0.15:
                self._call("repair_run")  # counts again, and finds nothing to do
                self.check()
        return len(self.events)

    def check(self) -> None:
        """Compare the rows with the model.

        Raises:
            AssertionError: they differ.
        """
        model, context = self.model, (self.drawn, self.events)
        rows = {
            str(step): (str(status), reason, cascades)
            for step, status, reason, cascades in self.db.execute(
                "SELECT step_slug, status, skip_reason, skip_cascades FROM pgflow.step_states WHERE run_id = %s",
                [self.run_id],
            )
        }
        [[status, remaining, message]] = self.db.execute(
            "SELECT status, remaining, error_message FROM pgflow.runs WHERE id = %s", [self.run_id]
        ).fetchall()
        assert rows == model.rows, context
        assert self._read_items() == self._list_items(), context
        results = {
            str(step): result
            for step, result in self.db.execute(
                "SELECT step_slug, step_result FROM pgflow.step_states "
                "WHERE run_id = %s AND status = 'completed' AND skip_reason IS NULL",
                [self.run_id],
            )
        }
        ended = {step for step, end in model.ends.items() if end.outcome == "success"}
        assert results == {step: model.results[step] for step in ended}, context
        assert status == model.status, context
        assert (message is not None) == (status == "failed"), context
        if status != "failed":
            assert remaining == model.remaining, context
        if status == "pending":
            assert model.pending, ("it is stuck", context)
            assert waiting(self.db, self.run_id) == model.unmet, context

    def _read_items(self) -> dict[tuple[str, int], tuple[str, Any, bool]]:
        """Return the items of all maps, after a look at what is counted of them."""
        found = self.db.execute(
            "SELECT step_slug, item_index, status, item_result, skip_reason FROM pgflow.step_items WHERE run_id = %s",
            [self.run_id],
        ).fetchall()
        items = {
            (str(step), int(str(index))): (str(status), result, reason is not None)
            for step, index, status, result, reason in found
        }
        for step, remaining, failed in self.db.execute(
            "SELECT step_slug, remaining, failed FROM pgflow.step_maps WHERE run_id = %s", [self.run_id]
        ):
            ends = [status for (each, _), (status, _, _) in items.items() if each == step]
            assert (remaining, failed) == (ends.count("pending"), ends.count("failed")), (self.drawn, self.events)
        return items

    def _list_items(self) -> dict[tuple[str, int], tuple[str, Any, bool]]:
        return {
            (step, index): (item.status, item.result, item.is_left_out)
            for step, items in self.model.items.items()
            for index, item in enumerate(items)
        }

    def _call(self, function: str, *arguments: object) -> None:
        self.events.append((function, *arguments))
        places = ", ".join(["%s"] * (len(arguments) + 1))
        self.db.execute(f"SELECT pgflow.{function}({places})", [self.run_id, *arguments])

    def _do_something(self) -> bool:
        rng, model = self.rng, self.model
        choices = ["end"] * 12 if model.pending else []
        choices += ["items"] * 12 if model.open_maps else []
        if model.status == "pending" and rng.random() < 0.2:
            choices += ["skip", "cancel"]
        if model.status == "failed":
            choices += ["reopen"] * 4 + ["stop"]
        if not choices or model.status == "completed":
            return False
        match rng.choice(choices):
            case "end":
                self._end_step(rng.choice(sorted(model.pending)))
            case "items":
                self._end_items(rng.choice(model.open_maps))
            case "skip" if model.untouched:
                self._skip(rng.choice(model.untouched))
            case "cancel":
                self._call("cancel_run", "enough")
                model.cancel()
            case "reopen":
                self._call("reopen_run")
                model.reopen()
            case "stop":
                return False
        return True

    def _skip(self, step: str) -> None:
        cascade = self.rng.random() < 0.5
        self._call("skip_step", step, "for once", cascade)
        self.model.skip(step, cascade=cascade)

    def _end_items(self, step: str) -> None:
        """Claim items of a map, or report on some: on any of them, also on those that were not claimed."""
        rng, items = self.rng, self.model.items[step]
        indexes = rng.sample(range(len(items)), rng.randint(1, len(items)))
        match rng.choice(["claim", "complete", "complete", "complete", "fail", "retry", "skip"]):
            case "claim":
                self._call("claim_items", step, rng.randint(0, 3), None, rng.choice([None, "1 hour"]))
            case "complete":
                results = [rng.choice(RESULTS) for _ in indexes]
                self._call("complete_items", step, indexes, json.dumps(results))
                ends = {index: Item("completed", each) for index, each in zip(indexes, results, strict=True)}
                self.model.end_items(step, ends)
            case "fail":
                self._call("fail_items", step, indexes, ["broken"] * len(indexes))
                self.model.end_items(step, {index: Item("failed") for index in indexes})
            case "retry":
                self._call("fail_items", step, indexes, ["broken"] * len(indexes), "0 s")
            case "skip":
                self._call("skip_items", step, indexes)
                self.model.end_items(step, {index: Item("completed", is_left_out=True) for index in indexes})

    def _end_step(self, step: str) -> None:
        if self.model.status == "pending" and self.rng.random() < 0.3:
            self._call("claim_step", step)
        self._end_by_hand(step)

    def _end_by_hand(self, step: str) -> None:
        rng, model = self.rng, self.model
        kind = rng.random()
        if kind < 0.55:
            result = rng.choice(RESULTS)
            self._call("complete_step", step, json.dumps(result))
            model.complete(step, result)
        elif kind < 0.8:
            self._call("fail_step", step, "broken")
            model.fail(step)
        elif kind < 0.88:
            self._skip(step)
        else:
            below = model.find_downstream(step)
            taken = rng.sample(below, rng.randint(0, len(below)))
            whole = rng.random() < 0.3
            self._call("take_branches", step, taken, "null", whole)
            model.branch(step, taken, whole=whole)


def play(db: Connection, number: int) -> int:
    """Play the run of this number, and return how many events it had.

    Raises:
        AssertionError: the engine and the model differ.
    """
    rng = random.Random(number)  # noqa: S311  the same runs each time
    drawn = draw(rng, continues=number % 2 == 1)
    define_drawn(db, f"random {number}", drawn)
    run_id = value(db, "SELECT (pgflow.run_workflow(%s, %s)).id", f"random {number}", json.dumps(drawn.payload))
    assert isinstance(run_id, UUID)
    model = Model(drawn.graph, drawn.options, drawn.payload, drawn.when_failed, drawn.failed_by)
    return Play(db, rng, run_id, model, drawn).play()


def play_by_command(play: Callable[[Connection, int], int], description: str | None) -> None:
    """Play as many runs as the command line says."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("runs", type=int)
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args()
    with psycopg.connect(chosen.dsn, autocommit=True) as db:
        db.execute("SET synchronous_commit = off")
        events = 0
        for number in range(chosen.first, chosen.first + chosen.runs):
            try:
                events += play(db, number)
            except (AssertionError, psycopg.Error):
                print(f"run {number} differs:")
                raise
        print(f"{chosen.runs:,} runs, {events:,} events: no difference")


if __name__ == "__main__":
    play_by_command(play, __doc__)
