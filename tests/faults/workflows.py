"""The workflows of the storm: random from its seed, and each result predictable from nothing but the definition.

Workflows with rules have steps that fail, skip and branch, each where it was planned. What becomes of the other steps
does not depend on the order of ends, so the model of `tests.property.rules_model` predicts it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

from tests.property.rules_model import INTOLERANT, TOLERANT, End, Model, StepOptions

WORKFLOWS, EXECUTIONS = "FAULTS_WORKFLOWS", "FAULTS_EXECUTIONS"
"""Environment variables: the file that says what there is to do, and the one that every execution is noted in."""

BEGAN, RETURNED, FAILED, STOPPED = "began", "returned", "failed", "stopped"
"""What is noted of an execution. It fails where that was planned; whatever else ends it, it is stopped."""

RESULT, FAIL, SKIP, CASCADE, BRANCH = "result", "fail", "skip", "skip-cascade", "branch"
"""How a handler is planned to end."""


@dataclass(frozen=True)
class StepPlan:
    """What one step of a workflow does.

    Attributes:
        upstream: the steps that it waits for.
        is_async: whether its handler is an async function, with an async connection.
        writes: whether it writes a row through `context.connection`; else its completion takes the other path, a
            statement on the pool.
        is_flaky: whether its first attempt raises, after having written.
        seconds: for which it works.
        ending: how its handler ends; where it branches, with the steps that it takes.
        taken: those.
        rule: of the step, as in `pgflow.steps`; so are the next ones.
        is_for_odd: whether it runs only in runs with an odd number.
        when_exhausted: what becomes of it where its handler fails.
        fails_run: whether its failure fails the run.
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
    random: Random, count: int, longest: float, prefix: str = "storm", *, with_rules: bool = False
) -> dict[str, Steps]:
    """Return so many workflows of 2 to 8 steps, none of which works longer than so many seconds.

    On one Prefect server, the workflows of several databases need a prefix each.
    """
    drawn = {f"{prefix}_{number}": _draw_steps(random, longest) for number in range(count)}
    return {slug: _draw_rules(random, steps) for slug, steps in drawn.items()} if with_rules else drawn


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
        drawn[slug] = replace(
            plan,
            ending=ending,
            taken=tuple(random.sample(below, random.randint(0, len(below)))) if ending == BRANCH else (),
            rule=random.choice([None, None, *INTOLERANT, *TOLERANT]),
            is_for_odd=random.random() < 0.15,
            when_exhausted=random.choice(["fail", "fail", "skip", "skip-cascade"]),
            fails_run=random.random() < 0.7,
        )
    return drawn


def make_payload(number: int) -> dict[str, object]:
    """Return the payload of a run."""
    return {"number": number, "is_odd": number % 2 == 1}


def write_workflows(workflows: Mapping[str, Steps], file: Path) -> None:
    """Write them down for the processes that have the handlers."""
    plain = {slug: {step: asdict(plan) for step, plan in steps.items()} for slug, steps in workflows.items()}
    file.write_text(json.dumps(plain), encoding="utf-8")


def read_workflows(file: Path) -> dict[str, Steps]:
    plain = json.loads(file.read_text(encoding="utf-8"))
    return {
        slug: {
            step: StepPlan(**{**plan, "upstream": tuple(plan["upstream"]), "taken": tuple(plan["taken"])})
            for step, plan in steps.items()
        }
        for slug, steps in plain.items()
    }


def compute_result(number: int, step_slug: str, upstream: Mapping[str, str]) -> str:
    """Return a step's result: it differs with the run's number, the step and every result that it was given."""
    told: Sequence[object] = [number, step_slug, sorted(upstream.items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def have_rules(steps: Steps) -> bool:
    """Tell whether a workflow has rules, so that a step may run without the results of others."""
    return any(plan.rule or plan.ending != RESULT or plan.is_for_odd or not plan.fails_run for plan in steps.values())


def expect_results(number: int, steps: Steps) -> dict[str, str]:
    """Return what the steps of a run have to result in, those that are executed and do not fail or skip."""
    if have_rules(steps):
        return {slug: compute_result(number, slug, {}) for slug in steps}
    results: dict[str, str] = {}
    for slug, plan in steps.items():
        results[slug] = compute_result(number, slug, {each: results[each] for each in plan.upstream})
    return results


def expect_ends(number: int, steps: Steps) -> tuple[str, dict[str, End]]:
    """Return how a run has to end, and how each of its steps."""
    model = Model(
        graph={slug: plan.upstream for slug, plan in steps.items()},
        options={
            slug: StepOptions(
                rule=plan.rule, required=plan.pattern, when_exhausted=plan.when_exhausted, fails_run=plan.fails_run
            )
            for slug, plan in steps.items()
        },
        payload=make_payload(number),
        when_failed="continue" if have_rules(steps) else None,
        failed_by="steps",
    )
    while model.pending:
        slug = min(model.pending)
        plan = steps[slug]
        if plan.ending == FAIL:
            model.fail(slug)
        elif plan.ending in (SKIP, CASCADE):
            model.skip(slug, cascade=plan.ending == CASCADE)
        elif plan.ending == BRANCH:
            model.branch(slug, plan.taken, whole=False)
        else:
            model.complete(slug, None)
    return model.status, model.ends
