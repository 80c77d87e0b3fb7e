"""The workflows of the storm: random from its seed, and each result predictable from nothing but the definition."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

WORKFLOWS, EXECUTIONS = "FAULTS_WORKFLOWS", "FAULTS_EXECUTIONS"
"""Environment variables: the file that says what there is to do, and the one that every execution is noted in."""

BEGAN, RETURNED, FAILED, STOPPED = "began", "returned", "failed", "stopped"
"""What is noted of an execution. It fails where that was planned; whatever else ends it, it is stopped."""


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
    """

    upstream: tuple[str, ...]
    is_async: bool
    writes: bool
    is_flaky: bool
    seconds: float


Steps = Mapping[str, StepPlan]
"""In an order in which they can be executed."""


def draw_workflows(random: Random, count: int, longest: float, prefix: str = "storm") -> dict[str, Steps]:
    """Return so many workflows of 2 to 8 steps, none of which works longer than so many seconds.

    On one Prefect server, the workflows of several databases need a prefix each.
    """
    return {f"{prefix}_{number}": _draw_steps(random, longest) for number in range(count)}


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


def write_workflows(workflows: Mapping[str, Steps], file: Path) -> None:
    """Write them down for the processes that have the handlers."""
    plain = {slug: {step: asdict(plan) for step, plan in steps.items()} for slug, steps in workflows.items()}
    file.write_text(json.dumps(plain), encoding="utf-8")


def read_workflows(file: Path) -> dict[str, Steps]:
    plain = json.loads(file.read_text(encoding="utf-8"))
    return {
        slug: {step: StepPlan(**{**plan, "upstream": tuple(plan["upstream"])}) for step, plan in steps.items()}
        for slug, steps in plain.items()
    }


def compute_result(number: int, step_slug: str, upstream: Mapping[str, str]) -> str:
    """Return a step's result: it differs with the run's number, the step and every result that it was given."""
    told: Sequence[object] = [number, step_slug, sorted(upstream.items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def expect_results(number: int, steps: Steps) -> dict[str, str]:
    """Return what the steps of a run have to result in."""
    results: dict[str, str] = {}
    for slug, plan in steps.items():
        results[slug] = compute_result(number, slug, {each: results[each] for each in plan.upstream})
    return results
