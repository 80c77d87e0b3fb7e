"""Tells automations of runs that have failed while no process executed them.

The process that executes a run sends `pgflow.run.failed` at its end. Where it has vanished before that, the process
that repairs what Prefect shows sends the event. Several of them may: an automation of `deploy --on-failure` tells of a
run once.
"""

from collections.abc import Callable
from typing import TypeAlias
from uuid import UUID

from prefect.client.schemas.objects import FlowRun, StateType

from pgflow_prefect.database.unsettled import UnsettledRun
from pgflow_prefect.deployment.reconciliation.comparison import View
from pgflow_prefect.deployment.reconciliation.disagreements import Disagreement, SetFlowRun, ShownFlowRun
from pgflow_prefect.execution.reporting.events import RunEvents
from pgflow_prefect.models import Status, TaskKey
from pgflow_prefect.prefect_api.event_sender import find_outbox
from pgflow_prefect.prefect_api.ids import find_task_run_id
from pgflow_prefect.settings import Events
from pgflow_prefect.state_names import StateName

Tell: TypeAlias = Callable[[UnsettledRun, ShownFlowRun], None]
"""Is called with a run that has failed, and with its last flow run."""


def tell_none(run: UnsettledRun, flow_run: ShownFlowRun) -> None:
    """Send no event."""


def make_teller(wanted: Events) -> Tell:
    """Return a function that sends the event of a failed run, if the setting `PGFLOW_EVENTS` selects it."""

    def tell(run: UnsettledRun, flow_run: ShownFlowRun) -> None:
        def find(step_slug: str) -> UUID:
            return find_task_run_id(flow_run.id, TaskKey(step_slug))

        named = FlowRun(id=flow_run.id, name=flow_run.name, flow_id=flow_run.id)  # no more of it is in an event
        events = RunEvents(run.id, run.workflow_slug, named, find, wanted, find_outbox())
        events.tell_of_run(StateName.FAILED, run.finished_at, run.error_message)

    return tell


def is_end_untold(view: View, repaired: Disagreement) -> bool:
    """Tell whether this repair has shown the end of a failed run, so that its own process has not told of it."""
    actions = (each for each in repaired.actions if isinstance(each, SetFlowRun))
    return repaired.repaired and _has_failed(view.run) and any(each.target.type is StateType.FAILED for each in actions)


def has_vanished(view: View) -> bool:
    """Tell whether a run has failed after its last process had vanished, and Prefect shows that process's end only."""
    return _has_failed(view.run) and view.current is not None and view.current.type is StateType.CRASHED


def _has_failed(run: UnsettledRun) -> bool:
    return run.status is Status.FAILED and not run.is_cancelled
