"""Pending runs: what PostgreSQL and Prefect disagree about, and what is no disagreement."""

import pytest
from prefect.client.schemas.objects import StateType

from pgflow_prefect.database.unsettled import UnsettledRun
from pgflow_prefect.deployment.reconciliation.comparison import (
    compare,
    compare_without_prefect,
    list_dead,
)
from pgflow_prefect.deployment.reconciliation.disagreements import (
    CancelRun,
    Kind,
    ReleaseRun,
    ShownFlowRun,
)
from pgflow_prefect.models import Held, Status, TaskKey
from pgflow_prefect.prefect_api.ids import find_task_run_id
from tests.unit.views import (
    FORMER,
    GRACE,
    LATEST,
    RUN,
    a_flow_run,
    a_run,
    a_step,
    a_task_run,
    flow_run_targets,
    only,
    task_run_targets,
    view,
)

# zombie


@pytest.mark.parametrize("type_", [StateType.RUNNING, StateType.PENDING, StateType.PAUSED, StateType.SCHEDULED])
def test_a_flow_run_whose_owner_has_vanished_has_crashed(type_: StateType) -> None:
    zombie = only(compare(view(a_run(), a_flow_run(type_))))

    assert zombie.kind is Kind.ZOMBIE
    assert len(zombie.actions) == 1, "the run is left to the next owner"
    assert flow_run_targets(zombie) == {LATEST: StateType.CRASHED}
    assert zombie.repair == "flow run to Crashed"


def test_a_zombies_task_runs_end_as_their_steps_did() -> None:
    steps = [a_step(Status.COMPLETED, "done"), a_step(Status.PENDING, "working")]
    tasks = [a_task_run(StateType.RUNNING, slug) for slug in ("done", "working", "unclaimed")]

    zombie = only(compare(view(a_run(), a_flow_run(StateType.RUNNING), *tasks, steps=steps)))

    assert task_run_targets(zombie) == {
        find_task_run_id(LATEST, TaskKey("done")): StateType.COMPLETED,
        find_task_run_id(LATEST, TaskKey("working")): StateType.CRASHED,
        find_task_run_id(LATEST, TaskKey("unclaimed")): StateType.CRASHED,
    }


def test_task_runs_that_a_crashed_flow_run_left_behind_are_zombies() -> None:
    left = view(a_run(), a_flow_run(StateType.CRASHED), a_task_run(StateType.RUNNING))

    zombie = only(compare(left))

    assert zombie.kind is Kind.ZOMBIE
    assert flow_run_targets(zombie) == {}
    assert task_run_targets(zombie) == {find_task_run_id(LATEST, TaskKey("step")): StateType.CRASHED}


@pytest.mark.parametrize("held", [Held.LEASED, Held.QUEUED, Held.EXPIRED])
def test_a_former_owner_is_a_zombie_however_the_run_is_held_now(held: Held) -> None:
    run = a_run(held=held, flow_run_ids=(FORMER, LATEST))
    former = a_flow_run(StateType.RUNNING, id_=FORMER)
    latest = a_flow_run(StateType.SCHEDULED, deployed=True)

    zombie = only(compare(view(run, former, latest)))

    assert zombie.kind is Kind.ZOMBIE
    assert flow_run_targets(zombie) == {FORMER: StateType.CRASHED}


def test_a_former_owner_has_a_moment_to_notice() -> None:
    run = a_run(held=Held.LEASED, taken=GRACE / 2, flow_run_ids=(FORMER, LATEST))
    assert compare(view(run, a_flow_run(StateType.RUNNING, id_=FORMER))) == []


def test_the_flow_run_of_a_run_that_was_reopened_is_a_former_one() -> None:
    run = a_run(held=Held.RELEASED, flow_run_id=None)

    assert compare(view(run, a_flow_run(StateType.FAILED))) == []
    assert compare(view(run, a_flow_run(StateType.CANCELLED, cancelled=True))) == [], "it was wished for before"
    assert only(compare(view(run, a_flow_run(StateType.RUNNING)))).kind is Kind.ZOMBIE


def test_a_flow_run_that_began_to_run_and_never_took_its_run_makes_way() -> None:
    zombie = only(compare(view(a_run(held=Held.QUEUED), a_flow_run(StateType.RUNNING))))

    assert zombie.kind is Kind.ZOMBIE
    assert zombie.actions[-1] == ReleaseRun(1)


def test_a_lease_that_holds_is_respected() -> None:
    run = a_run(held=Held.LEASED)

    assert list_dead(run, GRACE) == [], "Prefect need not even be asked"
    for type_ in StateType:
        assert compare(view(run, a_flow_run(type_), a_task_run(StateType.RUNNING))) == []


@pytest.mark.parametrize(
    "starting",
    [
        a_flow_run(StateType.SCHEDULED, "AwaitingRetry", deployed=True),
        a_flow_run(StateType.PENDING, age=3 * GRACE),
        a_flow_run(StateType.RUNNING, age=GRACE / 2),
    ],
)
def test_a_flow_run_that_a_user_has_started_again_is_left_alone(starting: ShownFlowRun) -> None:
    assert compare(view(a_run(), starting)) == []


# orphaned_run


@pytest.mark.parametrize(
    ("type_", "name"),
    [
        (StateType.CRASHED, "Crashed"),
        (StateType.FAILED, "Failed"),
        (StateType.COMPLETED, "Completed"),
        (StateType.CANCELLED, "Superseded"),
        (StateType.CANCELLED, "HandedBack"),
    ],
)
def test_a_run_whose_flow_run_ended_before_it_took_the_run_is_handed_back(type_: StateType, name: str) -> None:
    orphan = only(compare(view(a_run(held=Held.QUEUED), a_flow_run(type_, name))))

    assert orphan.kind is Kind.ORPHANED_RUN
    assert orphan.actions == (ReleaseRun(1),)


def test_a_run_whose_flow_run_was_deleted_is_handed_back() -> None:
    orphan = only(compare(view(a_run(held=Held.QUEUED))))

    assert (orphan.kind, orphan.actions) == (Kind.ORPHANED_RUN, (ReleaseRun(1),))
    assert compare(view(a_run(held=Held.EXPIRED))) == [], "that one is taken anyway"


@pytest.mark.parametrize("type_", [StateType.SCHEDULED, StateType.PENDING])
def test_a_run_may_wait_for_its_flow_run_for_ever(type_: StateType) -> None:
    assert compare(view(a_run(held=Held.QUEUED), a_flow_run(type_, deployed=True))) == []


def test_a_run_whose_flow_run_is_being_created_is_left_alone() -> None:
    assert compare(view(a_run(held=Held.EXPIRED, flow_run_id=None, flow_run_ids=()))) == []


# cancelled_in_prefect


@pytest.mark.parametrize("held", [Held.QUEUED, Held.EXPIRED, Held.RELEASED])
def test_a_persons_cancel_ends_a_run_that_no_process_executes(held: Held) -> None:
    wish = only(compare(view(a_run(held=held), a_flow_run(StateType.CANCELLED, cancelled=True))))

    assert wish.kind is Kind.CANCELLED_IN_PREFECT
    assert wish.actions == (CancelRun("cancelled in Prefect"),)


def test_a_cancel_that_waits_for_a_dead_process_is_concluded() -> None:
    cancelling = a_flow_run(StateType.CANCELLING, cancelled=True)

    wish = only(compare(view(a_run(), cancelling, a_task_run(StateType.RUNNING))))

    assert flow_run_targets(wish) == {LATEST: StateType.CANCELLED}
    assert [*task_run_targets(wish).values()] == [StateType.CANCELLED]
    assert isinstance(wish.actions[0], CancelRun), "PostgreSQL first"


# Without Prefect


def test_the_rows_alone_tell_of_owners_that_have_vanished() -> None:
    expired = only(compare_without_prefect(a_run()))
    given_up = only(compare_without_prefect(a_run(Status.FAILED, error_message="given up: 4 owners", is_given_up=True)))

    assert (expired.kind, given_up.kind) == (Kind.ZOMBIE, Kind.ZOMBIE)
    assert expired.actions == ()
    assert str(RUN) in str(expired)


@pytest.mark.parametrize(
    "run", [a_run(held=Held.LEASED), a_run(held=Held.QUEUED), a_run(Status.COMPLETED), a_run(Status.FAILED)]
)
def test_the_rows_alone_tell_nothing_of_the_others(run: UnsettledRun) -> None:
    assert compare_without_prefect(run) == []
