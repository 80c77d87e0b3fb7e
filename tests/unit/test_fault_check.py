"""The judge of the storms: what it takes for a violation, and what not."""

from dataclasses import replace
from uuid import uuid4

import pytest

from tests.faults.check import Evidence, Execution, Slot, State, find_violations
from tests.faults.weathers import WEATHERS, Redone
from tests.faults.workflows import BEGAN, FAILED, RETURNED, STOPPED, StepPlan, expect_ends, expect_results

RUN = uuid4()
PLACE = Slot(RUN, "a")
STEPS = {"a": StepPlan(upstream=(), is_async=False, writes=True, is_flaky=False, seconds=0)}
DRY_STEPS = {"a": StepPlan(upstream=(), is_async=False, writes=False, is_flaky=False, seconds=0)}


def judge(
    executions: list[Execution],
    redone: Redone,
    shown: list[str] | None = None,
    steps: dict[str, StepPlan] = STEPS,
) -> list[str]:
    """Return what is wrong with a run whose last execution has completed it."""
    attempts = executions[-1].attempt
    evidence = Evidence(
        runs={RUN: ("w", 0, "completed", None)},
        states={PLACE: State("completed", expect_results(0, steps)["a"], attempts, 100.0)},
        completions={PLACE: [attempts]},
        written={PLACE: [attempts] * steps["a"].writes},
        executions={PLACE: executions},
        shown={RUN: shown} if shown else {},
    )
    return [problem for _, problem in find_violations(evidence, {"w": steps}, {RUN: 0}, redone)]


def test_what_becomes_of_steps_with_rules_is_predicted() -> None:
    plan = StepPlan((), is_async=True, writes=False, is_flaky=False, seconds=0.0)
    steps = {
        "look": replace(plan, ending="branch", taken=("full",)),
        "full": replace(plan, upstream=("look",), ending="fail"),
        "delta": replace(plan, upstream=("look",)),
        "publish": replace(plan, upstream=("delta", "full")),
        "clean_up": replace(plan, upstream=("publish",), rule="all_done"),
        "odd": replace(plan, is_for_odd=True),
    }
    status, ends = expect_ends(0, steps)
    assert status == "failed"
    assert {slug: end.row[:2] for slug, end in ends.items()} == {
        "look": ("completed", None),
        "full": ("failed", None),
        "delta": ("completed", "branch_not_taken"),
        "publish": ("failed", "dependency_failed"),
        "clean_up": ("completed", None),
        "odd": ("completed", "condition_unmet"),
    }


def test_an_attempt_after_one_that_failed_is_in_order() -> None:
    assert judge([Execution(1, 1.0, FAILED), Execution(2, 2.0, RETURNED)], Redone.NOTHING) == []


@pytest.mark.parametrize("end", [BEGAN, RETURNED, STOPPED])
def test_an_attempt_after_one_that_did_not_fail_is_a_violation(end: str) -> None:
    executions = [Execution(1, 1.0, end), Execution(2, 2.0, RETURNED)]
    assert judge(executions, Redone.NOTHING) == [f"step a: was executed again as attempt 2; attempt 1 {end}"]
    assert judge(executions, Redone.ANYTHING) == []


def test_only_what_had_a_transaction_may_be_done_again_where_connections_break() -> None:
    executions = [Execution(1, 1.0, RETURNED), Execution(2, 2.0, RETURNED)]
    assert judge(executions, Redone.WRITTEN) == []
    assert len(judge(executions, Redone.WRITTEN, steps=DRY_STEPS)) == 1


def test_what_prefect_has_shown_of_a_completed_run_counts() -> None:
    executions = [Execution(1, 1.0, RETURNED)]
    assert judge(executions, Redone.NOTHING, ["Crashed"]) == [
        "Prefect has shown the flow run that completed it as Crashed"
    ]
    assert judge(executions, Redone.WRITTEN, ["Crashed"]) == []


@pytest.mark.parametrize("kind", WEATHERS)
def test_each_storm_has_a_fence_that_shows_when_it_is_broken(kind: str) -> None:
    assert WEATHERS[kind].twin.signs
