"""Random workflows whose steps are runs of other ones, random events in all of these runs, and the nested model beside.

`python -m tests.property.random_children --dsn DSN 500` makes that many runs, as `random_rules` does.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from uuid import UUID

from tests.conftest import Connection
from tests.engine import value
from tests.property.children_model import ChildOptions, Family
from tests.property.random_rules import Drawn, Play, define_drawn, draw, play_by_command

_MOST_EVENTS = 80


def draw_children(
    rng: random.Random, db: Connection, workflow: str, drawn: Drawn, depth: int
) -> dict[str, ChildOptions]:
    """Make some steps of a drawn workflow runs of others, which are defined first; return what is said of them."""
    children = {}
    for step, ups in drawn.graph.items():
        if rng.random() < 0.35:
            children[step] = _draw_child(
                rng, db, f"{workflow} {step}", [*ups], depth, is_map=drawn.options[step].is_map
            )
    define_drawn(db, workflow, drawn)
    for step, said in children.items():
        db.execute(
            "UPDATE pgflow.steps SET child_workflow = %s, child_payload = %s, child_retries = %s, max_children = %s "
            "WHERE workflow_slug = %s AND slug = %s",
            [
                said.workflow,
                None if said.path is None else [*said.path],
                said.retries,
                said.max_children if drawn.options[step].is_map else None,
                workflow,
                step,
            ],
        )
    return children


def _draw_child(
    rng: random.Random, db: Connection, workflow: str, ups: list[str], depth: int, *, is_map: bool
) -> ChildOptions:
    drawn = draw(rng, continues=rng.random() < 0.5, most=4)
    if depth > 0:
        below = draw_children(rng, db, workflow, drawn, depth - 1)
    else:
        below = {}
        define_drawn(db, workflow, drawn)
    places = ["payload", *ups, *(["item"] if is_map else [])]
    return ChildOptions(
        workflow,
        drawn.graph,
        drawn.options,
        drawn.when_failed,
        drawn.failed_by,
        below,
        retries=rng.choice([0, 0, 1, 2]),
        path=rng.choice([None, (rng.choice(places),)]),
        max_children=rng.randint(1, 3),
    )


@dataclass
class FamilyPlay(Play):
    """A run with its model, and the runs nested in it with theirs."""

    model: Family

    def play(self) -> int:
        """Let things happen in the run and in those nested in it; return how many did."""
        self.check_all()
        for _ in range(_MOST_EVENTS):
            living = [each for each in self.list_all() if each.is_alive]
            if not living or not self.rng.choice(living).do_something():
                break
            self.check_all()
            if self.rng.random() < 0.15:
                for each in self.list_all():
                    if each.model.status == "pending":
                        each.repair()
                self.check_all()
        return len(self.events)

    @property
    def is_alive(self) -> bool:
        """Whether something can happen to it. Only the outermost run is reopened by hand."""
        return bool(self.model.status == "pending" or self.model.pending or self._may_be_reopened)

    @property
    def _may_be_reopened(self) -> bool:
        return self.model.parent is None and self.model.status == "failed"

    def list_all(self) -> "list[FamilyPlay]":
        """Return it and all runs nested in it that ever began, each after its parent."""
        return [self, *(below for child in self._list_children() for below in child.list_all())]

    def _list_children(self) -> "Iterator[FamilyPlay]":
        found: dict[tuple[str, int | None], list[UUID]] = {}
        for step, item, run_id in self.db.execute(
            "SELECT parent_step_slug, parent_item, id FROM pgflow.runs WHERE parent_run_id = %s "
            "ORDER BY parent_attempt",
            [self.run_id],
        ):
            found.setdefault((str(step), item), []).append(run_id)  # type: ignore[arg-type]
        expected: dict[tuple[str, int | None], list[Family]] = {}
        for key, child in self.model.born:
            expected.setdefault(key, []).append(child)
        counts = {key: len(ids) for key, ids in found.items()}
        assert counts == {key: len(models) for key, models in expected.items()}, (self.drawn, self.events)
        for key, models in expected.items():
            for run_id, model in zip(found[key], models, strict=True):
                yield FamilyPlay(self.db, self.rng, run_id, model, self.drawn, self.events)

    def check_all(self) -> None:
        """Compare all rows with the models.

        Raises:
            AssertionError: they differ.
        """
        for each in self.list_all():
            each.check()
            [[payload, ended_as]] = self.db.execute(
                "SELECT payload, ended_as FROM pgflow.runs WHERE id = %s", [each.run_id]
            ).fetchall()
            assert payload == each.model.payload, (self.drawn, self.events)
            assert (ended_as == "cancelled") == each.model.was_cancelled, (self.drawn, self.events)
        assert value(self.db, "SELECT count(*) FROM pgflow.child_requests") == 0  # no other session holds a child

    def _call(self, function: str, *arguments: object) -> None:
        super()._call(function, *arguments)
        self.events[-1] = (self._name, self.events[-1])

    @property
    def _name(self) -> str:
        """Which run it is: the steps and items that lead to it."""
        parent = self.model.parent
        if parent is None:
            return "the run"
        step, item = parent[1]
        return f"child of {step}" if item is None else f"child of {step}[{item}]"

    def repair(self) -> None:
        """Count again, which finds nothing to do."""
        self._call("repair_run")

    def do_something(self) -> bool:
        """Let one thing happen to it; return whether its life goes on."""
        if self.model.parent is None:
            return self._do_something()
        if self.model.status == "pending" and self.rng.random() < 0.05:
            self._call("cancel_run", "enough of this one")
            self.model.cancel()
        elif self.model.pending:
            self._do_to_a_step()
        return True

    def _do_to_a_step(self) -> None:
        step = self.rng.choice(sorted(self.model.pending))
        if step in self.model.open_maps and step not in self.model.children:
            self._end_items(step)
        else:
            self._end_step(step)

    def _end_items(self, step: str) -> None:
        if step not in self.model.children:  # no worker reports on items that are runs
            super()._end_items(step)

    def _end_step(self, step: str) -> None:
        if step not in self.model.children:
            super()._end_step(step)
        elif self.rng.random() < 0.15:
            self._end_by_hand(step)


def play(db: Connection, number: int) -> int:
    """Play the run of this number and those nested in it, and return how many events they had.

    Raises:
        AssertionError: the engine and the model differ.
    """
    rng = random.Random(number)  # noqa: S311  the same runs each time
    drawn = draw(rng, continues=number % 2 == 1, most=6)
    workflow = f"family {number}"
    children: Mapping[str, ChildOptions] = draw_children(rng, db, workflow, drawn, depth=1)
    run_id = value(db, "SELECT (pgflow.run_workflow(%s, %s)).id", workflow, json.dumps(drawn.payload))
    assert isinstance(run_id, UUID)
    model = Family(drawn.graph, drawn.options, drawn.payload, drawn.when_failed, drawn.failed_by, children=children)
    return FamilyPlay(db, rng, run_id, model, drawn).play()


if __name__ == "__main__":
    play_by_command(play, __doc__)
