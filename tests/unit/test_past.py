"""When steps are shown that were completed before a flow run began."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.execution.reporting.past import Past
from tests.unit.definitions import dags

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@given(dags(), st.none() | st.timedeltas(timedelta(milliseconds=1), timedelta(days=3)))
def test_no_step_begins_before_what_it_waits_for_has_ended(
    definition: WorkflowDefinition, since: timedelta | None
) -> None:
    began_at = None if since is None else NOW - since
    past = Past(build_graph(definition), began_at, NOW)
    for upstream, downstream in definition.deps:
        assert past.find_times(upstream)[1] <= past.find_times(downstream)[0]
    for step in definition.steps:
        began, ended = past.find_times(step)
        assert began < ended <= NOW
        assert began_at is None or began >= began_at


@pytest.mark.parametrize("ahead", [timedelta(), timedelta(hours=1)])
def test_a_flow_run_whose_clock_is_ahead_keeps_the_order(ahead: timedelta) -> None:
    definition = WorkflowDefinition.model_validate(
        {"slug": "w", "steps": ("a", "b"), "deps": ({"upstream": "a", "downstream": "b"},)}
    )
    past = Past(build_graph(definition), NOW + ahead, NOW)
    assert past.find_times("a")[1] <= past.find_times("b")[0] < NOW
