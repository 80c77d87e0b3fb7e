"""What `status --watch` shows of a run that has more steps than the terminal has lines."""

from pgflow_prefect.cli.status import Snapshot
from pgflow_prefect.models import Status
from tests.unit.runs import make_run, make_state

ORDER = ["old", "first", "broken", "young", "working", "started", "waiting", "last"]
STATES = [
    make_state("old", start=0, end=1),
    make_state("first", start=0, end=2),
    make_state("broken", Status.FAILED, 1, 2),
    make_state("young", start=2, end=5),
    make_state("working", Status.PENDING, 3),
    make_state("started", Status.PENDING),
]
FOUND = Snapshot(make_run(), {state.step_slug: state for state in STATES}, ORDER)


def test_what_failed_is_worked_on_or_ended_last_comes_before_the_rest_and_in_order() -> None:
    assert FOUND.pick(1) == ["broken"]
    assert FOUND.pick(2) == ["broken", "working"]
    assert FOUND.pick(4) == ["broken", "young", "working", "started"]
    assert FOUND.pick(6) == ["old", "first", "broken", "young", "working", "started"]
    assert FOUND.pick(100) == ORDER
    assert [row[0] for row in FOUND.rows(FOUND.pick(2))] == ["broken", "working"]


def test_it_says_how_far_the_run_is() -> None:
    assert FOUND.count() == "3 of 8 steps completed"
