"""The workflows of the storm: random from its seed, and each result predictable from nothing but the definition.

Workflows with rules have steps that fail, skip and branch, and maps whose items do, each where it was planned. What
becomes of the other steps does not depend on the order of ends: the model of `tests.property.rules_model` predicts it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from tests.property.rules_model import INTOLERANT, TOLERANT, End, Item, Model, StepOptions

WORKFLOWS, EXECUTIONS = "FAULTS_WORKFLOWS", "FAULTS_EXECUTIONS"
"""Environment variables: the file that says what there is to do, and the one that every execution is noted in."""

BEGAN, RETURNED, FAILED, STOPPED = "began", "returned", "failed", "stopped"
"""What is noted of an execution. It fails where that was planned; whatever else ends it, it is stopped."""

RESULT, FAIL, SKIP, CASCADE, BRANCH = "result", "fail", "skip", "skip-cascade", "branch"
"""How a handler is planned to end."""

_ARRAYS: Mapping[str, Sequence[int]] = {"none": (), "few": range(3), "many": range(25)}
"""Those in each payload, for maps."""


@dataclass(frozen=True)
class MapPlan:
    """What a step does that is a map.

    Attributes:
        over: the key of an array in the payload, or the map whose results it maps over.
        endings: how the first items end; those after them begin with the first one again.
        when_item_fails: as in `pgflow.steps`; so are the next ones.
        when_empty: what becomes of it where there are no items.
        max_items: where there are more, it fails.
    """

    over: str
    endings: tuple[str, ...]
    when_item_fails: str
    when_empty: str
    max_items: int

    @property
    def path(self) -> tuple[str, ...]:
        """Where the array is in what it maps over."""
        return (self.over,) if self.over in _ARRAYS else ()

    @property
    def source(self) -> str:
        """What it maps over."""
        return "payload" if self.path else self.over

    def get_ending(self, index: int) -> str:
        return self.endings[index % len(self.endings)]


@dataclass(frozen=True)
class StepPlan:
    """What one step of a workflow does.

    Attributes:
        upstream: the steps that it waits for.
        is_async: whether its handler is an async function, with an async connection.
        writes: whether it writes a row through `context.connection`; else its completion takes the other path, a
            statement on the pool.
        is_flaky: whether its first attempt raises, after having written; of a map, that of every third item.
        seconds: for which it works.
        ending: how its handler ends; where it branches, with the steps that it takes.
        taken: those.
        rule: of the step, as in `pgflow.steps`; so are the next ones.
        is_for_odd: whether it runs only in runs with an odd number.
        when_exhausted: what becomes of it where its handler fails.
        fails_run: whether its failure fails the run.
        map: what it is beside that; None where it is no map. What is said of the handler is said of each item's then.
    """

    upstream: tuple[str, ...]
    is_async: bool
    writes: bool
    is_flaky: bool
    seconds: float
    ending: str = RESULT
    taken: tuple[str, ...] = ()
    rule: str | None = None
    is_for_odd: bool = False
    when_exhausted: str = "fail"
    fails_run: bool = True
    map: MapPlan | None = None

    def raises(self, attempt: int, index: int | None) -> bool:
        """Tell whether an attempt fails though a later one does not."""
        return self.is_flaky and attempt == 1 and not (index or 0) % 3

    @property
    def pattern(self) -> dict[str, object] | None:
        """What the step's input has to contain."""
        wanted: dict[str, object] = {"is_odd": True}
        if not self.is_for_odd:
            return None
        return {"payload": wanted} if self.upstream else wanted


Steps = Mapping[str, StepPlan]
"""In an order in which they can be executed."""


def draw_workflows(
    random: Random,
    count: int,
    longest: float,
    prefix: str = "storm",
    *,
    with_rules: bool = False,
    some_plain: bool = False,
) -> dict[str, Steps]:
    """Return so many workflows of 2 to 8 steps, none of which works longer than so many seconds.

    On one Prefect server, the workflows of several databases need a prefix each.

    Args:
        random: decides what they are.
        count: how many.
        longest: seconds that a step works at most.
        prefix: of their slugs.
        with_rules: their steps have rules, and some are maps.
        some_plain: every other workflow has none of that.
    """
    drawn = {f"{prefix}_{number}": _draw_steps(random, longest) for number in range(count)}
    return {
        slug: _draw_rules(random, steps) if with_rules and not (some_plain and number % 2) else steps
        for number, (slug, steps) in enumerate(drawn.items())
    }


def _draw_steps(random: Random, longest: float) -> Steps:
    steps: dict[str, StepPlan] = {}
    for number in range(random.randint(2, 8)):
        upstream = random.sample([*steps], min(len(steps), random.choice([0, 1, 1, 2, 3])))
        steps[f"step_{number}"] = StepPlan(
            upstream=tuple(sorted(upstream)),
            is_async=random.random() < 0.5,
            writes=random.random() < 0.75,
            is_flaky=random.random() < 0.15,
            seconds=random.uniform(longest / 10, longest),
        )
    return steps


def _draw_rules(random: Random, steps: Steps) -> Steps:
    drawn: dict[str, StepPlan] = {}
    for slug, plan in steps.items():
        below = [each for each, other in steps.items() if slug in other.upstream]
        # A step that waits for others, too, may be decided by them before the branch is taken.
        may_branch = bool(below) and all(steps[each].upstream == (slug,) for each in below)
        ending = random.choice([RESULT] * 5 + [FAIL, SKIP, CASCADE] + [BRANCH] * 3 * may_branch)
        map_plan = _draw_map(random, plan, drawn) if ending == RESULT and random.random() < 0.4 else None
        drawn[slug] = replace(
            plan,
            map=map_plan,
            ending=ending,
            taken=tuple(random.sample(below, random.randint(0, len(below)))) if ending == BRANCH else (),
            rule=random.choice([None, None, *INTOLERANT, *TOLERANT]),
            is_for_odd=random.random() < 0.15,
            when_exhausted=random.choice(["fail", "fail", "skip", "skip-cascade"]),
            fails_run=random.random() < 0.7,
        )
    return drawn


def _draw_map(random: Random, plan: StepPlan, before: Steps) -> MapPlan:
    arrays = ["few", "few", "many", "many", "none"]
    # A map that waits for others, too, may begin without the results of this one.
    if len(plan.upstream) == 1 and before[plan.upstream[0]].map is not None:
        arrays += [*plan.upstream] * 5
    return MapPlan(
        over=random.choice(arrays),
        endings=tuple(random.choice([RESULT] * 8 + [SKIP, FAIL]) for _ in range(random.randint(1, 7))),
        when_item_fails=random.choice(["stop", "continue", "skip"]),
        when_empty=random.choice(["complete", "skip", "skip-cascade"]),
        max_items=random.choice([1, 100, 100, 100, 100]),
    )


def make_payload(number: int) -> dict[str, object]:
    """Return the payload of a run."""
    return {"number": number, "is_odd": number % 2 == 1, **{name: [*items] for name, items in _ARRAYS.items()}}


def write_workflows(workflows: Mapping[str, Steps], file: Path) -> None:
    """Write them down for the processes that have the handlers."""
    plain = {slug: {step: asdict(plan) for step, plan in steps.items()} for slug, steps in workflows.items()}
    file.write_text(json.dumps(plain), encoding="utf-8")


def read_workflows(file: Path) -> dict[str, Steps]:
    plain = json.loads(file.read_text(encoding="utf-8"))
    return {slug: {step: _read_plan(plan) for step, plan in steps.items()} for slug, steps in plain.items()}


def _read_plan(plain: dict[str, Any]) -> StepPlan:
    said = plain["map"]
    map_plan = None if said is None else MapPlan(**{**said, "endings": tuple(said["endings"])})
    lists = {name: tuple(plain[name]) for name in ("upstream", "taken")}
    return StepPlan(**{**plain, **lists, "map": map_plan})


def compute_result(number: int, step_slug: str, upstream: Mapping[str, object]) -> str:
    """Return a step's result: it differs with the run's number, the step and every result that it was given."""
    told: Sequence[object] = [number, step_slug, sorted(upstream.items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def compute_item_result(number: int, step_slug: str, index: int, item: object) -> str:
    """Return the result of an item of a map: it differs with its place and with what the item is."""
    return compute_result(number, f"{step_slug}[{index}]", {"item": item})


def have_rules(steps: Steps) -> bool:
    """Tell whether a workflow has rules, so that a step may run without the results of others."""
    return any(
        plan.rule or plan.ending != RESULT or plan.is_for_odd or not plan.fails_run or plan.map is not None
        for plan in steps.values()
    )


@dataclass(frozen=True)
class Expected:
    """What a run has to become.

    Attributes:
        status: of the run.
        ends: how each of its steps has to end.
        results: of the steps that are executed and do not fail or skip.
        items: of each map that has some, how they have to end.
    """

    status: str
    ends: Mapping[str, End]
    results: Mapping[str, object]
    items: Mapping[str, Sequence[Item]]


def expect(number: int, steps: Steps) -> Expected:
    """Return what a run has to become."""
    model = Model(
        graph={slug: plan.upstream for slug, plan in steps.items()},
        options={slug: _make_options(plan) for slug, plan in steps.items()},
        payload=make_payload(number),
        when_failed="continue" if have_rules(steps) else None,
        failed_by="steps",
    )
    while model.pending:
        _end_step(model, number, steps, min(model.pending))
    return Expected(model.status, model.ends, model.results, model.items)


def _make_options(plan: StepPlan) -> StepOptions:
    options = StepOptions(
        rule=plan.rule, required=plan.pattern, when_exhausted=plan.when_exhausted, fails_run=plan.fails_run
    )
    if plan.map is not None:
        options.is_map, options.over, options.path = True, plan.map.source, plan.map.path
        options.max_items, options.when_empty = plan.map.max_items, plan.map.when_empty
        options.when_item_fails = plan.map.when_item_fails
    return options


def _end_step(model: Model, number: int, steps: Steps, slug: str) -> None:
    plan = steps[slug]
    upstream = {} if have_rules(steps) else {each: model.results[each] for each in plan.upstream}
    result = compute_result(number, slug, upstream)
    if plan.map is not None:
        model.end_items(slug, dict(enumerate(_expect_items(number, slug, plan.map, model.find_array(slug)))))
    elif plan.ending == FAIL:
        model.fail(slug)
    elif plan.ending in (SKIP, CASCADE):
        model.skip(slug, cascade=plan.ending == CASCADE)
    elif plan.ending == BRANCH:
        model.branch(slug, plan.taken, whole=False)
        model.results[slug] = result
    else:
        model.complete(slug, result)


def _expect_items(number: int, slug: str, plan: MapPlan, array: Sequence[object]) -> Iterator[Item]:
    for index, item in enumerate(array):
        match plan.get_ending(index):
            case "fail":
                yield Item("failed")
            case "skip":
                yield Item("completed", is_left_out=True)
            case _:
                yield Item("completed", compute_item_result(number, slug, index, item))
