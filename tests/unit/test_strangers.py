"""Flow runs that have taken no run: which are ended, and which are left alone."""

from uuid import UUID

import pytest
from prefect.client.schemas.objects import StateType

from pgflow_prefect.deployment.reconciliation.disagreements import (
    Kind,
    ShownFlowRun,
)
from pgflow_prefect.deployment.reconciliation.strangers import compare_stranger
from tests.unit.views import GRACE, LATEST, NOW, RUN, a_flow_run, flow_run_targets


def test_a_flow_run_of_a_run_that_does_not_exist_is_ended() -> None:
    scheduled = compare_stranger("workflow", a_flow_run(StateType.SCHEDULED), None, NOW, GRACE)
    running = compare_stranger("workflow", a_flow_run(StateType.RUNNING), None, NOW, GRACE)

    assert scheduled is not None
    assert running is not None
    assert (scheduled.kind, running.kind) == (Kind.ORPHANED_FLOW_RUN, Kind.ORPHANED_FLOW_RUN)
    assert flow_run_targets(scheduled) == {LATEST: StateType.CANCELLED}
    assert flow_run_targets(running) == {LATEST: StateType.CRASHED}


def test_a_flow_run_that_died_before_it_created_its_run_is_ended() -> None:
    found = compare_stranger("workflow", a_flow_run(StateType.RUNNING, run_id=None), None, NOW, GRACE)
    assert found is not None
    assert found.kind is Kind.ORPHANED_FLOW_RUN


def test_a_flow_run_that_died_before_it_took_its_run_is_a_zombie() -> None:
    found = compare_stranger("workflow", a_flow_run(StateType.PENDING), RUN, NOW, GRACE)
    assert found is not None
    assert (found.kind, found.run_id) == (Kind.ZOMBIE, RUN)


@pytest.mark.parametrize(
    ("shown", "run_id"),
    [
        (a_flow_run(StateType.SCHEDULED, run_id=None), None),
        (a_flow_run(StateType.SCHEDULED), RUN),
        (a_flow_run(StateType.PENDING, age=3 * GRACE), RUN),
        (a_flow_run(StateType.RUNNING, age=3 * GRACE, run_id=None), None),
    ],
)
def test_a_flow_run_that_is_about_to_take_or_create_its_run_is_left_alone(
    shown: ShownFlowRun, run_id: UUID | None
) -> None:
    assert compare_stranger("workflow", shown, run_id, NOW, GRACE) is None
