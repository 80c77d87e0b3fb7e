"""The judge of the storms: what it takes for a violation, and what not."""

from dataclasses import replace
from uuid import uuid4

import pytest

from tests.faults.check import Evidence, Execution, Slot, State, find_violations
from tests.faults.weathers import WEATHERS, Redone
from tests.faults.workflows import BEGAN, FAILED, RETURNED, STOPPED, MapPlan, StepPlan, expect

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
        states={PLACE: State("completed", expect(0, steps).results["a"], attempts, 100.0)},
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
    expected = expect(0, steps)
    assert expected.status == "failed"
    assert {slug: end.row[:2] for slug, end in expected.ends.items()} == {
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


A_MAP = replace(STEPS["a"], map=MapPlan("few", ("result", "result", "skip"), "continue", "complete", 100))


def judge_map(plan: StepPlan, *changes: tuple[int, State | list[int] | list[Execution]]) -> list[str]:
    """Return what is wrong with a run of one map, each of whose items was executed once, but for some changes."""
    expected = expect(0, {"a": plan})
    states = {PLACE: State("completed", expected.results.get("a"), 1, 100.0)}
    completions, written = {PLACE: [1]}, {}
    executions: dict[Slot, list[Execution]] = {}
    for index, item in enumerate(expected.items["a"]):
        slot = PLACE._replace(item_index=index)
        reason = "requested" if item.is_left_out else None
        states[slot] = State(item.status, item.result, 1, 50.0, reason)
        is_done = item.status == "completed"
        completions[slot], written[slot] = [1] * is_done, [1] * is_done
        executions[slot] = [Execution(1, 1.0, RETURNED if is_done else FAILED)]
    for index, change in changes:
        slot = PLACE._replace(item_index=index)
        if isinstance(change, State):
            states[slot] = change
        elif change and isinstance(change[0], int):
            completions[slot] = [each for each in change if isinstance(each, int)]
        else:
            executions[slot] = [each for each in change if isinstance(each, Execution)]
    if expected.ends["a"].outcome == "failed":
        states[PLACE], completions[PLACE] = State("failed", None, 1, 100.0), []
    runs = {RUN: ("w", 0, expected.status, None)}
    evidence = Evidence(runs, states, completions, written, executions, {})
    return [problem for _, problem in find_violations(evidence, {"w": {"a": plan}}, {RUN: 0}, Redone.NOTHING)]


def test_a_map_whose_items_were_executed_once_is_in_order() -> None:
    assert judge_map(A_MAP) == []


def test_an_item_that_was_completed_twice_is_a_violation() -> None:
    assert judge_map(A_MAP, (1, [1, 1])) == [
        "step a[1]: the item was completed at the attempts [1, 1], which should be once, at the last one, 1"
    ]


def test_an_item_that_was_executed_again_or_after_its_end_is_a_violation() -> None:
    again = judge_map(A_MAP, (1, [Execution(1, 1.0, RETURNED), Execution(1, 60.0, RETURNED)]))
    assert again == [
        "step a[1]: attempt 1 was executed 2 times",
        "step a[1]: attempt 1 was executed 10.000 s after the step was completed",
        "step a[1]: was executed again as attempt 1; attempt 1 returned",
    ]


def test_a_result_in_the_place_of_another_is_a_violation() -> None:
    results = [item.result for item in expect(0, {"a": A_MAP}).items["a"]]
    [problem] = judge_map(A_MAP, (0, State("completed", results[1], 1, 50.0)))
    assert problem.startswith("step a[0]: ")


def test_an_item_that_is_lost_is_a_violation() -> None:
    [problem] = judge_map(A_MAP, (1, State("pending", None, 1, 50.0)))
    assert problem.startswith("step a[1]: is ('pending', None)")


def test_only_a_map_that_stops_at_a_failure_may_leave_items_undone() -> None:
    is_left = (2, State("pending", None, 0, 50.0))
    for policy, problems in (("stop", 0), ("continue", 1)):
        plan = replace(A_MAP, map=MapPlan("few", ("fail", "result", "result"), policy, "complete", 100))
        assert len(judge_map(plan, is_left, (2, []))) == problems


def test_an_item_that_the_array_has_not_is_a_violation() -> None:
    assert "step a[3]: there is no such item" in judge_map(A_MAP, (3, State("completed", 1, 1, 50.0)))


@pytest.mark.parametrize("kind", WEATHERS)
def test_each_storm_has_a_fence_that_shows_when_it_is_broken(kind: str) -> None:
    assert WEATHERS[kind].twin.signs
