"""Skips, branches, conditions and rules, as a person sees them in the rows."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations_with_replacement, permutations
from time import monotonic
from uuid import UUID

import pytest

from tests.conftest import Connection
from tests.engine import (
    INVALID,
    NOT_READY,
    UNKNOWN,
    cancel,
    claim,
    complete,
    define,
    fail,
    get_run,
    get_state,
    refused,
    reopen,
    repair,
    run_workflow,
    start_step,
    statuses,
    value,
)
from tests.growth import is_linear
from tests.property.rules_model import INTOLERANT, TOLERANT, Tally, decide

DIAMOND: dict[str, Sequence[str]] = {"look": [], "full": ["look"], "delta": ["look"], "publish": ["full", "delta"]}

OUTCOMES = ("success", "skip", "skip-cascade", "failed", "not_run")

AIRFLOW = {
    "all_success": "run skip skip fail fail fail fail fail fail",
    "none_failed": "run run run fail fail fail fail fail fail",
    "none_failed_min_one_success": "run run skip fail fail fail fail fail fail",
    "one_success": "run run skip run fail fail run fail fail",
    "one_failed": "skip skip skip run run run run run run",
    "one_done": "run run skip run run run run skip skip",
    "all_failed": "skip skip skip skip skip run skip skip run",
    "all_skipped": "skip skip run skip skip skip skip skip skip",
    "none_skipped": "run skip skip run skip run run skip run",
    "all_done": "run run run run run run run run run",
    "always": "run run run run run run run run run",
    "all_done_min_one_success": "run skip skip run skip fail run skip fail",
}
"""What Airflow 3.3 decides for two upstream steps, where it does not depend on the order in which they ended."""

PAIRS = (
    ("success", "success"),
    ("success", "skip-cascade"),
    ("skip-cascade", "skip-cascade"),
    ("success", "failed"),
    ("skip-cascade", "failed"),
    ("failed", "failed"),
    ("success", "not_run"),
    ("skip-cascade", "not_run"),
    ("not_run", "not_run"),
)


def say(db: Connection, workflow: str, step: str, **columns: object) -> None:
    """Say something of a step."""
    for name, said in columns.items():
        db.execute(
            f"UPDATE pgflow.steps SET {name} = %s WHERE workflow_slug = %s AND slug = %s".encode(),  # noqa: S608  ours
            [said, workflow, step],
        )


def start(db: Connection, steps: Mapping[str, Sequence[str]], payload: object = None, **rules: str) -> UUID:
    """Define a workflow whose steps have these rules, and start a run of it."""
    define(db, "rules", steps)
    for step, rule in rules.items():
        say(db, "rules", step, rule=rule)
    return run_workflow(db, "rules", payload).id


def skip(db: Connection, run_id: UUID, step: str, *, cascade: bool = True) -> None:
    db.execute("SELECT pgflow.skip_step(%s, %s, 'for once', %s)", [run_id, step, cascade])


def branch(db: Connection, run_id: UUID, step: str, taken: Sequence[str], *, whole: bool = False) -> None:
    db.execute("SELECT pgflow.take_branches(%s, %s, %s, '1', %s)", [run_id, step, [*taken], whole])


def reasons(db: Connection, run_id: UUID) -> dict[str, object]:
    """Return the skip_reason of each step that has a row."""
    found = db.execute("SELECT step_slug, skip_reason FROM pgflow.step_states WHERE run_id = %s", [run_id])
    return {str(step): reason for step, reason in found}


def count(outcomes: Sequence[str | None]) -> Tally:
    return Tally(
        ups=len(outcomes),
        ended=sum(each is not None for each in outcomes),
        ok=outcomes.count("success"),
        skips=outcomes.count("skip") + outcomes.count("skip-cascade"),
        hard_skips=outcomes.count("skip-cascade"),
        failures=outcomes.count("failed"),
        not_run=outcomes.count("not_run"),
        setups=[],
    )


def ask(db: Connection, rule: str | None, tally: Tally) -> object:
    return value(
        db,
        "SELECT pgflow.decide_step(%s, %s, %s, %s, %s, %s, %s, 0, 0, 0)",
        rule,
        tally.ups,
        tally.ups - tally.ended,
        tally.skips - tally.hard_skips,
        tally.hard_skips,
        tally.failures,
        tally.not_run,
    )


@pytest.mark.parametrize("rule", AIRFLOW)
def test_a_rule_decides_as_in_airflow(rule: str, db: Connection) -> None:
    assert [ask(db, rule, count(pair)) for pair in PAIRS] == AIRFLOW[rule].split()


@pytest.mark.parametrize("rule", [None, *INTOLERANT, *TOLERANT])
def test_a_rule_decides_as_the_model_and_in_any_order_alike(rule: str | None, db: Connection) -> None:
    for ended in combinations_with_replacement(OUTCOMES, 3):
        final = ask(db, rule, count(ended))
        assert final == decide(rule, count(ended))
        assert final is not None
        for order in set(permutations(ended)):
            for known in range(3):
                early = ask(db, rule, count([*order[:known], *[None] * (3 - known)]))
                assert early in (None, final), (rule, order, known)


def test_a_skipped_step_counts_as_completed_and_takes_what_is_below_it_along(db: Connection) -> None:
    run_id = start(db, {"a": [], "b": ["a"], "c": ["b"], "d": []})
    skip(db, run_id, "a")
    assert reasons(db, run_id) == {"a": "requested", "b": "dependency_skipped", "c": "dependency_skipped", "d": None}
    assert statuses(db, run_id) == {"a": "completed", "b": "completed", "c": "completed", "d": "pending"}
    assert get_state(db, run_id, "b").attempts == 0
    complete(db, run_id, "d")
    assert get_run(db, run_id).status == "completed"


def test_a_soft_skip_lets_the_steps_below_go_on_without_its_result(db: Connection) -> None:
    run_id = start(db, {"a": [], "b": [], "c": ["a", "b"]})
    complete(db, run_id, "b", 2)
    skip(db, run_id, "a", cascade=False)
    assert claim(db, run_id, "c").upstream_results == {"b": 2}


def test_a_step_is_skipped_before_it_starts(db: Connection) -> None:
    run_id = start(db, {"a": [], "b": ["a"], "c": ["b"]})
    skip(db, run_id, "c")
    complete(db, run_id, "a")
    complete(db, run_id, "b")
    assert get_run(db, run_id).status == "completed"
    assert reasons(db, run_id)["c"] == "requested"


def test_the_first_report_wins_over_a_skip(db: Connection) -> None:
    run_id = start(db, {"a": [], "b": ["a"]})
    complete(db, run_id, "a", 1)
    skip(db, run_id, "a")
    assert reasons(db, run_id) == {"a": None, "b": None}
    with refused(UNKNOWN):
        skip(db, run_id, "nothing")


def test_a_branch_skips_what_it_does_not_take(db: Connection) -> None:
    run_id = start(db, DIAMOND, publish="none_failed_min_one_success")
    branch(db, run_id, "look", ["full"])
    assert reasons(db, run_id) == {"look": None, "full": None, "delta": "branch_not_taken"}
    assert get_state(db, run_id, "delta").skipped_by == "look"
    complete(db, run_id, "full", 1)
    assert claim(db, run_id, "publish").upstream_results == {"full": 1}


def test_a_branch_that_no_step_waits_on_is_refused_and_nothing_is_written(db: Connection) -> None:
    run_id = start(db, DIAMOND)
    with refused(INVALID, "publish"):
        branch(db, run_id, "look", ["publish"])
    assert statuses(db, run_id) == {"look": "pending"}


def test_a_trigger_that_drops_the_row_of_a_branch_is_named_and_nothing_is_written(db: Connection) -> None:
    db.execute("""
        CREATE FUNCTION drop_row() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER drops BEFORE INSERT ON pgflow.step_states
            FOR EACH ROW WHEN (NEW.step_slug = 'delta') EXECUTE FUNCTION drop_row();
    """)
    run_id = start(db, DIAMOND)
    with refused("09000", 'the row of step "delta" of run .* a trigger or rule on pgflow.step_states skipped it'):
        branch(db, run_id, "look", ["full"])
    assert statuses(db, run_id) == {"look": "pending"}


def test_a_whole_branch_skips_whatever_the_rules_below_say(db: Connection) -> None:
    run_id = start(db, DIAMOND | {"report": ["publish"]}, publish="all_done", report="always")
    branch(db, run_id, "look", [], whole=True)
    assert {reasons(db, run_id)[step] for step in ("full", "delta", "publish")} == {"branch_not_taken"}
    assert statuses(db, run_id)["report"] == "pending"  # it began with the run


def test_a_condition_is_asked_of_the_payload_or_of_the_results(db: Connection) -> None:
    define(db, "rules", {"first": [], "other": [], "next": ["first"], "last": ["next"]})
    say(db, "rules", "first", required_input_pattern='{"wanted": true}')
    say(db, "rules", "other", forbidden_input_pattern='{"wanted": true}', when_unmet="skip-cascade")
    say(db, "rules", "next", required_input_pattern='{"first": {"rows": 1}}', when_unmet="skip")
    run_id = run_workflow(db, "rules", {"wanted": True}).id
    assert reasons(db, run_id) == {"first": None, "other": "condition_unmet"}
    complete(db, run_id, "first", {"rows": 2})
    assert reasons(db, run_id)["next"] == "condition_unmet"
    assert claim(db, run_id, "last").upstream_results == {}


def test_a_condition_that_must_be_met_fails_the_run(db: Connection) -> None:
    define(db, "rules", {"a": []})
    say(db, "rules", "a", required_input_pattern='{"wanted": true}', when_unmet="fail")
    run = run_workflow(db, "rules", {})
    assert run.status == "failed"
    assert run.error_message == 'step "a" failed: Condition not met'


def test_a_plain_run_ends_at_its_first_failure_and_one_with_a_rule_goes_on(db: Connection) -> None:
    run_id = start(db, {"a": [], "b": [], "c": ["a"], "d": ["c"]}, d="all_done")
    fail(db, run_id, "a")
    assert get_run(db, run_id).status == "pending"
    assert reasons(db, run_id) == {"a": None, "b": None, "c": "dependency_failed", "d": None}
    assert statuses(db, run_id)["c"] == "failed"
    complete(db, run_id, "d")
    complete(db, run_id, "b")
    run = get_run(db, run_id)
    assert (run.status, run.error_message) == ("failed", 'step "a" failed: broken')


def test_a_failure_that_is_not_to_fail_the_run_does_not(db: Connection) -> None:
    define(db, "rules", {"a": [], "b": []})
    say(db, "rules", "a", fails_run=False)
    run_id = run_workflow(db, "rules").id
    fail(db, run_id, "a")
    complete(db, run_id, "b")
    assert get_run(db, run_id).status == "completed"


def test_only_leaves_fail_a_run_of_airflows_kind(db: Connection) -> None:
    define(db, "rules", {"a": [], "b": ["a"]})
    db.execute("UPDATE pgflow.workflows SET failed_by = 'leaves'")
    say(db, "rules", "b", rule="all_done")
    run_id = run_workflow(db, "rules").id
    fail(db, run_id, "a")
    complete(db, run_id, "b")
    assert get_run(db, run_id).status == "completed"


def test_a_step_whose_attempts_are_exhausted_is_skipped_and_keeps_its_error(db: Connection) -> None:
    define(db, "rules", {"a": [], "b": ["a"]})
    say(db, "rules", "a", when_exhausted="skip")
    run_id = run_workflow(db, "rules").id
    state = fail(db, run_id, "a", "no answer")
    assert (state.status, state.skip_reason, state.error_message) == ("completed", "handler_failed", "no answer")
    assert statuses(db, run_id)["b"] == "pending"


def test_a_workflow_that_stops_and_has_a_rule_for_failures_is_refused_at_its_next_run(db: Connection) -> None:
    define(db, "rules", {"a": [], "b": ["a"]})
    say(db, "rules", "b", rule="all_done")
    db.execute("UPDATE pgflow.workflows SET when_failed = 'stop'")
    with refused(INVALID, "all_done"):
        run_workflow(db, "rules")


def test_an_edit_of_a_rule_counts_from_the_next_run_on(db: Connection) -> None:
    run_id = start(db, {"a": [], "b": ["a"]})
    say(db, "rules", "b", rule="all_failed")
    db.execute("UPDATE pgflow.workflows SET failed_by = 'leaves'")
    complete(db, run_id, "a")
    assert statuses(db, run_id)["b"] == "pending"
    later = run_workflow(db, "rules").id
    complete(db, later, "a")
    assert reasons(db, later)["b"] == "rule_unmet"


def test_a_reopened_run_takes_back_what_followed_from_the_failure_and_numbers_go_on(db: Connection) -> None:
    run_id = start(db, {"a": [], "b": ["a"], "clean": ["b"]}, clean="all_done")
    fail(db, run_id, "a")
    claim(db, run_id, "clean")
    complete(db, run_id, "clean", attempt=1)
    assert get_run(db, run_id).status == "failed"
    reopen(db, run_id)
    assert statuses(db, run_id) == {"a": "pending"}
    for step in ("a", "b"):
        complete(db, run_id, step)
    assert complete(db, run_id, "clean", attempt=1).status == "pending"  # a late report of the former attempt
    assert claim(db, run_id, "clean").attempt == 2
    complete(db, run_id, "clean", attempt=2)
    assert get_run(db, run_id).status == "completed"


def test_a_cancelled_run_with_rules_starts_nothing_and_is_reopened(db: Connection) -> None:
    run_id = start(db, {"a": [], "clean": ["a"]}, clean="all_done")
    cancel(db, run_id)
    assert statuses(db, run_id) == {"a": "failed"}
    reopen(db, run_id)
    assert statuses(db, run_id) == {"a": "pending"}


def test_a_repair_decides_what_is_due(db: Connection) -> None:
    run_id = start(db, {"a": [], "b": ["a"], "c": ["a"]}, b="all_failed")
    db.execute("UPDATE pgflow.step_states SET status = 'completed' WHERE run_id = %s", [run_id])  # by hand
    repair(db, run_id)
    assert reasons(db, run_id) == {"a": None, "b": "rule_unmet", "c": None}


def test_a_step_is_started_by_hand_when_its_rule_says_so(db: Connection) -> None:
    run_id = start(db, {"a": [], "b": ["a"]}, b="all_done")
    with refused(NOT_READY, "its rule waits"):
        start_step(db, run_id, "b")
    db.execute("UPDATE pgflow.step_states SET status = 'failed' WHERE run_id = %s", [run_id])
    assert value(db, "SELECT pgflow.has_unmet_deps(%s, 'b')", run_id) is False
    assert start_step(db, run_id, "b").status == "pending"


def test_an_early_step_sees_the_results_that_there_are(db: Connection) -> None:
    run_id = start(db, {"a": [], "b": [], "c": ["a", "b"]}, c="one_success")
    complete(db, run_id, "a", 1)
    assert claim(db, run_id, "c").upstream_results == {"a": 1}
    complete(db, run_id, "b", 2)
    complete(db, run_id, "c")
    assert get_run(db, run_id).status == "completed"


def test_a_plain_workflow_uses_no_rules(db: Connection) -> None:
    define(db, "plain", DIAMOND)
    run = run_workflow(db, "plain")
    assert (run.uses_rules, run.continues) == (False, False)


def chain_of(size: int) -> dict[str, Sequence[str]]:
    return {"s0": []} | {f"s{i}": [f"s{i - 1}"] for i in range(1, size)}


def fan_of(size: int) -> dict[str, Sequence[str]]:
    leaves = [f"s{i}" for i in range(1, size)]
    return {"s0": []} | dict.fromkeys(leaves, ("s0",)) | {"join": leaves}


@pytest.mark.thorough
@pytest.mark.parametrize("make", [chain_of, fan_of])
@pytest.mark.parametrize("analyzed", [False, True])
def test_a_cascade_costs_as_much_as_it_has_steps(
    make: Callable[[int], dict[str, Sequence[str]]], analyzed: bool, db: Connection
) -> None:
    sizes = (200, 2000)
    for size in sizes:
        define(db, f"of {size}", make(size))
    if analyzed:
        run_workflow(db, f"of {sizes[0]}")
        db.execute("ANALYZE")

    def skip_all(size: int) -> None:
        run_id = run_workflow(db, f"of {size}").id
        skip(db, run_id, "s0")
        assert get_run(db, run_id).status == "completed"

    assert is_linear(skip_all, sizes[0], sizes[1] // sizes[0], clock=monotonic)
