"""Runs that have ended: what PostgreSQL and Prefect disagree about, and what is no disagreement."""

from datetime import timedelta

import pytest
from prefect.client.schemas.objects import StateType

from pgflow_prefect.database.unsettled import UnsettledRun, UnsettledStep
from pgflow_prefect.deployment.reconciliation.comparison import (
    compare,
    is_settled,
    list_dead,
)
from pgflow_prefect.deployment.reconciliation.disagreements import (
    CreateTaskRun,
    Kind,
)
from pgflow_prefect.models import Ending, Held, Status, TaskKey
from pgflow_prefect.prefect_api.ids import find_task_run_id
from tests.unit.views import (
    FORMER,
    GRACE,
    HOUR,
    LAG,
    LATEST,
    a_flow_run,
    a_run,
    a_step,
    a_task_run,
    flow_run_targets,
    only,
    task_run_targets,
    view,
)

# cancelled_in_postgres


@pytest.mark.parametrize("held", [Held.QUEUED, Held.EXPIRED, Held.RELEASED])
@pytest.mark.parametrize("type_", [StateType.SCHEDULED, StateType.RUNNING, StateType.CANCELLING])
@pytest.mark.parametrize("reason", ["cancelled by ann", "changed my mind"])
def test_a_run_that_was_cancelled_takes_its_flow_run_along(held: Held, type_: StateType, reason: str) -> None:
    run = a_run(Status.FAILED, held, error_message=reason, ended_as=Ending.CANCELLED)
    shown = a_flow_run(type_, deployed=True), a_task_run(StateType.RUNNING)
    steps = [a_step(Status.FAILED, error=reason, ended_as=Ending.CANCELLED)]

    found = only(compare(view(run, *shown, steps=steps)))

    assert found.kind is Kind.CANCELLED_IN_POSTGRES
    assert flow_run_targets(found) == {LATEST: StateType.CANCELLED}
    assert [*task_run_targets(found).values()] == [StateType.CANCELLED]


@pytest.mark.parametrize("type_", [StateType.FAILED, StateType.CRASHED, StateType.COMPLETED])
def test_a_run_that_was_cancelled_shows_no_other_end(type_: StateType) -> None:
    run = a_run(Status.FAILED, error_message="changed my mind", ended_as=Ending.CANCELLED)
    steps = [a_step(Status.FAILED, error="changed my mind", ended_as=Ending.CANCELLED)]

    found = only(compare(view(run, a_flow_run(type_), a_task_run(StateType.FAILED), steps=steps)))

    assert found.kind is Kind.CANCELLED_IN_POSTGRES
    assert flow_run_targets(found) == {LATEST: StateType.CANCELLED}
    assert [*task_run_targets(found).values()] == [StateType.CANCELLED]
    assert compare(view(run, a_flow_run(StateType.CANCELLED), a_task_run(StateType.CANCELLED), steps=steps)) == []


def test_a_run_whose_reason_only_reads_like_a_cancellation_has_failed() -> None:
    run = a_run(Status.FAILED, error_message="cancelled by the carrier")
    shown = a_flow_run(StateType.RUNNING, deployed=True), a_task_run(StateType.RUNNING)

    found = only(compare(view(run, *shown, steps=[a_step(Status.FAILED, error="cancelled by the carrier")])))

    assert found.kind is Kind.LAGGING
    assert flow_run_targets(found) == {LATEST: StateType.FAILED}
    assert [*task_run_targets(found).values()] == [StateType.FAILED]


# crashed_then_completed


@pytest.mark.parametrize("type_", [StateType.FAILED, StateType.CRASHED, StateType.CANCELLED])
def test_a_completed_run_has_no_failed_flow_run(type_: StateType) -> None:
    found = only(compare(view(a_run(Status.COMPLETED), a_flow_run(type_))))

    assert found.kind is Kind.CRASHED_THEN_COMPLETED
    assert flow_run_targets(found) == {LATEST: StateType.COMPLETED}


def test_a_completed_runs_former_flow_runs_may_have_ended_anyhow() -> None:
    run = a_run(Status.COMPLETED, flow_run_ids=(FORMER, LATEST))
    former = a_flow_run(StateType.CANCELLED, "Superseded", id_=FORMER)
    agreed = view(run, former, a_flow_run(StateType.COMPLETED))

    assert compare(agreed) == []
    assert is_settled(agreed)


# lagging


@pytest.mark.parametrize(
    ("status", "target"), [(Status.COMPLETED, StateType.COMPLETED), (Status.FAILED, StateType.FAILED)]
)
def test_a_flow_run_ends_as_its_run_did(status: Status, target: StateType) -> None:
    found = only(compare(view(a_run(status, error_message="broken"), a_flow_run(StateType.RUNNING))))

    assert found.kind is Kind.LAGGING
    assert flow_run_targets(found) == {LATEST: target}


def test_a_failed_run_has_no_completed_flow_run() -> None:
    found = only(compare(view(a_run(Status.FAILED), a_flow_run(StateType.COMPLETED))))
    assert (found.kind, flow_run_targets(found)) == (Kind.LAGGING, {LATEST: StateType.FAILED})


@pytest.mark.parametrize("type_", [StateType.FAILED, StateType.CRASHED, StateType.CANCELLED])
def test_any_end_without_success_suits_a_failed_run(type_: StateType) -> None:
    agreed = view(a_run(Status.FAILED, error_message="given up"), a_flow_run(type_))

    assert compare(agreed) == []
    assert is_settled(agreed)


@pytest.mark.parametrize(
    ("status", "shown", "target"),
    [
        (Status.COMPLETED, StateType.RUNNING, StateType.COMPLETED),
        (Status.COMPLETED, StateType.CRASHED, StateType.COMPLETED),
        (Status.FAILED, StateType.SCHEDULED, StateType.FAILED),
        (Status.FAILED, StateType.COMPLETED, StateType.FAILED),
        (Status.PENDING, StateType.RUNNING, StateType.CRASHED),
    ],
)
def test_a_task_run_ends_as_its_step_did(status: Status, shown: StateType, target: StateType) -> None:
    run = a_run(Status.FAILED)
    differing = view(run, a_flow_run(StateType.FAILED), a_task_run(shown), steps=[a_step(status, error="broken")])

    found = only(compare(differing))

    assert found.kind is Kind.LAGGING
    assert task_run_targets(found) == {find_task_run_id(LATEST, TaskKey("step")): target}


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        (Status.COMPLETED, StateType.COMPLETED),
        (Status.FAILED, StateType.FAILED),
        (Status.FAILED, StateType.CRASHED),
        (Status.FAILED, StateType.CANCELLED),
        (Status.PENDING, StateType.CRASHED),
        (Status.PENDING, StateType.CANCELLED),
    ],
)
def test_a_task_run_that_shows_what_its_row_says_is_right(status: Status, shown: StateType) -> None:
    agreed = view(a_run(Status.FAILED), a_flow_run(StateType.FAILED), a_task_run(shown), steps=[a_step(status)])
    assert compare(agreed) == []
    assert is_settled(agreed)


def test_a_task_run_of_which_prefect_has_never_heard_is_created() -> None:
    steps = [a_step(Status.COMPLETED, "heard"), a_step(Status.COMPLETED, "lost")]
    run = a_run(Status.COMPLETED, flow_run_ids=(FORMER, LATEST))
    shown = a_flow_run(StateType.COMPLETED), a_task_run(StateType.COMPLETED, "heard")

    [action] = only(compare(view(run, *shown, steps=steps))).actions

    assert isinstance(action, CreateTaskRun)
    assert (action.task_run_id, action.flow_run_id) == (find_task_run_id(LATEST, TaskKey("lost")), LATEST)
    assert action.target.type is StateType.COMPLETED


def test_a_task_run_of_an_earlier_flow_run_is_not_missing_from_the_last_one() -> None:
    run = a_run(Status.COMPLETED, flow_run_ids=(FORMER, LATEST))
    flow_runs = a_flow_run(StateType.CRASHED, id_=FORMER), a_flow_run(StateType.COMPLETED)
    task = a_task_run(StateType.COMPLETED, flow_run_id=FORMER)

    assert compare(view(run, *flow_runs, task, steps=[a_step(Status.COMPLETED, flow_run_id=FORMER)])) == []


def test_each_task_run_of_an_ended_run_is_repaired_once() -> None:
    run = a_run(Status.COMPLETED, flow_run_ids=(FORMER, LATEST))
    flow_runs = a_flow_run(StateType.RUNNING, id_=FORMER), a_flow_run(StateType.RUNNING)
    tasks = a_task_run(StateType.RUNNING, flow_run_id=FORMER), a_task_run(StateType.RUNNING, "other")

    found = compare(view(run, *flow_runs, *tasks, steps=[a_step(Status.COMPLETED, flow_run_id=FORMER)]))

    assert [each.kind for each in found] == [Kind.LAGGING, Kind.ZOMBIE]
    assert [task_run_targets(each) for each in found] == [
        {
            find_task_run_id(FORMER, TaskKey("step")): StateType.COMPLETED,
            find_task_run_id(LATEST, TaskKey("other")): StateType.CRASHED,
        },
        {},
    ]


@pytest.mark.parametrize("steps", [[], [a_step(Status.COMPLETED)]])
def test_what_was_deleted_in_prefect_is_not_missed(steps: list[UnsettledStep]) -> None:
    gone = view(a_run(Status.COMPLETED), steps=steps)
    assert compare(gone) == []
    assert is_settled(gone)


@pytest.mark.parametrize(
    "run", [a_run(Status.COMPLETED, ended=GRACE / 2), a_run(Status.FAILED, Held.LEASED)], ids=["recent", "held"]
)
def test_a_run_that_ended_a_moment_ago_is_neither_reported_nor_settled(run: UnsettledRun) -> None:
    behind = view(run, a_flow_run(StateType.RUNNING), steps=[a_step(Status.COMPLETED)])

    assert compare(behind) == []
    assert not is_settled(behind)
    assert list_dead(run, GRACE) == []


def test_task_runs_may_be_behind_for_longer_than_their_flow_run() -> None:
    run = a_run(Status.COMPLETED, ended=LAG / 2)
    steps = [a_step(Status.COMPLETED)]
    behind = view(run, a_flow_run(StateType.COMPLETED), a_task_run(StateType.RUNNING), steps=steps)

    assert compare(behind) == []
    assert not is_settled(behind)
    found = only(compare(view(run, a_flow_run(StateType.RUNNING), a_task_run(StateType.RUNNING), steps=steps)))
    assert flow_run_targets(found) == {LATEST: StateType.COMPLETED}
    assert task_run_targets(found) == {}


def test_task_runs_of_a_run_that_was_handed_back_may_be_behind() -> None:
    handed_back = a_flow_run(StateType.CANCELLED, "HandedBack", age=LAG / 2)
    assert compare(view(a_run(held=Held.RELEASED), handed_back, a_task_run(StateType.RUNNING))) == []


@pytest.mark.parametrize("ended_as", [None, Ending.CANCELLED])
@pytest.mark.parametrize(
    ("type_", "age"),
    [(StateType.SCHEDULED, HOUR / 2), (StateType.PENDING, 3 * GRACE), (StateType.RUNNING, GRACE / 2)],
)
def test_a_retry_of_a_failed_run_that_has_yet_to_begin_is_a_wish(
    type_: StateType, age: timedelta, ended_as: Ending | None
) -> None:
    wished = view(a_run(Status.FAILED, ended_as=ended_as), a_flow_run(type_, age=age, deployed=True))

    assert compare(wished) == []
    assert not is_settled(wished)


def test_a_retry_whose_process_died_before_it_reopened_the_run_has_failed() -> None:
    found = only(compare(view(a_run(Status.FAILED), a_flow_run(StateType.RUNNING, age=HOUR / 2))))
    assert flow_run_targets(found) == {LATEST: StateType.FAILED}
