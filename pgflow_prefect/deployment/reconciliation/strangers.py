"""Flow runs of our workflows that have taken no run: the rules for them."""

from datetime import datetime, timedelta
from uuid import UUID

from prefect.client.schemas.objects import StateType

from pgflow_prefect.deployment.reconciliation.comparison import START
from pgflow_prefect.deployment.reconciliation.disagreements import (
    Disagreement,
    Kind,
    SetFlowRun,
    ShownFlowRun,
    Target,
    describe,
)


def compare_stranger(
    workflow_slug: str, shown: ShownFlowRun, run_id: UUID | None, now: datetime, grace: timedelta
) -> Disagreement | None:
    """Return the disagreement about an open flow run that has taken no run; None if there is none.

    Args:
        workflow_slug: its workflow.
        shown: the flow run.
        run_id: the run that it should execute, if that exists.
        now: the time.
        grace: for how long the two may differ.
    """
    has_begun = shown.type is not StateType.SCHEDULED
    if has_begun and now - shown.since < START * grace:
        return None  # it is about to take or create its run
    if not has_begun and (run_id is not None or shown.run_id is None):
        return None  # it will
    missing = f"run {shown.run_id}, which does not exist" if shown.run_id else "no run that exists"
    found = f"flow run {shown.name!r} is {shown.state}, " + ("and has not taken its run" if run_id else f"of {missing}")
    is_unwanted = shown.is_cancelled or not has_begun
    target = Target(StateType.CANCELLED if is_unwanted else StateType.CRASHED, found)
    actions = (SetFlowRun(shown.id, target),)
    return Disagreement(
        kind=Kind.ZOMBIE if run_id else Kind.ORPHANED_FLOW_RUN,
        run_id=run_id,
        workflow_slug=workflow_slug,
        flow_run_id=shown.id,
        found=found,
        repair=describe(actions),
        actions=actions,
    )
