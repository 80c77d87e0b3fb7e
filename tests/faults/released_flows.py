"""The flows of the storm on the released pgflow. What a task returns follows from its run's number alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field

CHAIN, ALBUM, GIFTS = "faults_chain", "faults_album", "faults_gifts"
SECONDS = "FAULTS_SECONDS"
"""The environment variable that says how long a task of ours takes."""

FREEZE = "FAULTS_FREEZE"
"""The environment variable that names a file: while it is there, the next handler of the chain stops its process."""

ITEMS = 20
"""The tasks of the map in a run of `ALBUM`, where the payload says nothing else."""


@dataclass(frozen=True)
class FlowPlan:
    """One of the flows.

    Attributes:
        steps: each with those that it waits for.
        maps: those that are maps.
        options: further arguments of `pgflow.add_step`, as SQL.
    """

    steps: Mapping[str, list[str]]
    maps: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)


FLOWS = {
    CHAIN: FlowPlan({"one": [], "two": ["one"], "three": ["two"], "four": ["three"], "five": ["four"]}),
    ALBUM: FlowPlan({"list": [], "resize": ["list"], "report": ["resize"]}, maps=("resize",)),
    GIFTS: FlowPlan(
        {"choose": [], "wrap": ["choose"], "ask": [], "send": ["ask"]},
        options={
            "choose": """required_input_pattern => '{"is_odd": true}', when_unmet => 'skip-cascade'""",
            "ask": "max_attempts => 2, when_exhausted => 'skip'",
        },
    ),
}

ALWAYS_FAILS = "ask"
"""The step whose handler always raises: it is skipped after its last attempt."""


class PlannedError(Exception):
    """What it raises."""


def do_task(step: str, index: int, number: int, items: int = ITEMS) -> object:
    """Return what a task returns.

    Raises:
        PlannedError: it is the one that always fails.
    """
    if step == ALWAYS_FAILS:
        raise PlannedError("the phone rings in vain")
    if step == "list":
        return [{"number": number, "index": item} for item in range(items)]
    return f"{number}/{step}/{index}"


def make_payload(number: int, items: int = ITEMS) -> dict[str, object]:
    """Return the payload of a run."""
    return {"number": number, "is_odd": number % 2 == 1, "items": items}


def expect_tasks(flow: str, number: int, items: int = ITEMS) -> dict[tuple[str, int], object]:
    """Return the tasks that a run completes, each with its output."""
    steps = [*FLOWS[flow].steps]
    if flow == GIFTS:
        steps = [step for step in steps if step != ALWAYS_FAILS and (number % 2 or step not in ("choose", "wrap"))]
    counts = {step: items if step in FLOWS[flow].maps else 1 for step in steps}
    return {
        (step, index): do_task(step, index, number, items) for step, count in counts.items() for index in range(count)
    }
