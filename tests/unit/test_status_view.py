"""What `status` says of a run, and how it draws the steps on a terminal."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pgflow_prefect.cli.snapshot import COLUMNS, Snapshot, choose_widths
from pgflow_prefect.handlers.references import Reference
from pgflow_prefect.models import Enabled, Ending, Held, Run, Status, StepState
from pgflow_prefect.raw_json import RawJson
from tests.unit.runs import BEGAN, make_run, make_state, slugs

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


def draw(found: Snapshot, width: int) -> list[str]:
    """Return the table's lines, as a terminal of this width shows them."""
    console = Console(width=width, color_system=None, force_terminal=True)
    with console.capture() as drawn:
        console.print(found.make_table(width))
    return drawn.get().splitlines()


LONG = make_state("broken", Status.FAILED, 1, 2, error="the disk is full, " * 20)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_each_step_is_drawn_in_one_line_that_fits_the_terminal(width: int) -> None:
    states = {**FOUND.states, "broken": LONG, "working": make_state("working", Status.PENDING, 3, attempts=1234)}
    lines = draw(Snapshot(make_run(), states, ORDER), width)
    assert [line.split()[0] for line in lines] == ["step", *ORDER]
    assert max(map(len, lines)) <= width


def test_the_columns_stay_where_they_are_while_the_run_goes_on() -> None:
    begun = Snapshot(make_run(), {}, ORDER)
    later = Snapshot(make_run(Status.FAILED, error="x", finished=9), {**FOUND.states, "broken": LONG}, ORDER)
    assert draw(begun, 80)[0] == draw(later, 80)[0]


@given(st.integers(20, 300), st.integers(0, 300))
def test_columns_take_no_more_than_there_is(width: int, longest: int) -> None:
    widths = choose_widths(width, longest)
    assert [*widths] == [name for name in COLUMNS if name in widths]
    assert sum(widths.values()) + 2 * (len(widths) - 1) <= max(width, 60)


@given(st.lists(slugs, min_size=1, max_size=5, unique=True))
def test_any_slug_is_one_line(order: list[str]) -> None:
    assert len(draw(Snapshot(make_run(), {}, order), 80)) == 1 + len(order)


@pytest.mark.parametrize(
    ("state", "run", "status"),
    [
        (make_state("s", Status.PENDING, 1), make_run(), "running (pending)"),
        (make_state("s", Status.PENDING, 1), make_run(held=None), "running (pending)"),
        (make_state("s", Status.PENDING, 1), make_run(held=Held.EXPIRED), "stopped (pending)"),
        (make_state("s", Status.PENDING, 1), make_run(held=Held.RELEASED), "stopped (pending)"),
        (make_state("s", Status.PENDING, 1, shown="AwaitingRetry"), make_run(), "retrying (pending)"),
        (make_state("s", Status.PENDING, shown="Waiting"), make_run(), "elsewhere (pending)"),
        (make_state("s", Status.PENDING), make_run(), "pending"),
        (make_state("s", start=1, end=2, shown="Cached"), make_run(), "completed"),
        (make_state("s", Status.FAILED, 1, 2, error="why"), make_run(Status.FAILED, error="s: why"), "failed"),
        (
            make_state("s", Status.FAILED, 1, 2, error="why", ended_as=Ending.CANCELLED),
            make_run(Status.FAILED, error="why", ended_as=Ending.CANCELLED),
            "cancelled (failed)",
        ),
    ],
)
def test_a_step_has_the_word_that_a_person_expects_beside_the_row_s(state: StepState, run: Run, status: str) -> None:
    [row] = Snapshot(run, {"s": state}, ["s"]).rows()
    assert row.status == status


def test_a_step_that_a_dead_process_has_begun_is_stopped_and_its_run_is_told_how_to_go_on() -> None:
    run, working = make_run(held=Held.LEASED), make_state("s", Status.PENDING, 1)
    found = Snapshot(run, {"s": working}, ["s"], has_dead_holder=True)
    assert found.describe_word("s") == "stopped"
    assert f"held by {run.held_by}, which is dead: " in found.describe()[1]
    assert f"`pgflow-prefect run --resume {run.id}`" in found.describe()[1]


def test_a_step_that_an_ended_run_has_not_reached_does_not_wait() -> None:
    assert Snapshot(make_run(), {}, ["s"]).describe_word("s") == "waiting"
    assert Snapshot(make_run(Status.FAILED, error="x", finished=9), {}, ["s"]).describe_word("s") == "not reached"


@pytest.mark.parametrize("noted", ["Running", "AwaitingRetry", "Waiting", "Deferred"])
def test_a_step_that_has_ended_is_not_shown_as_what_was_noted_while_it_was_worked_on(noted: str) -> None:
    ends = [
        make_state("s", shown=noted),
        make_state("s", Status.FAILED, shown=noted, error="wrong list", ended_as=Ending.CANCELLED),
        make_state("s", Status.FAILED, shown=noted, error="cancelled, says the carrier"),
        make_state("s", Status.PENDING, shown=noted),
    ]
    assert [each.task_state for each in ends] == ["Completed", "Cancelled", "Failed", noted]
    assert make_state("s", shown="Cached").task_state == "Cached"
    assert make_state("s", Status.FAILED, shown="TimedOut").task_state == "TimedOut"


def enabling(*, enabled: bool, later: float = -1) -> Enabled:
    return Enabled(workflow_slug="workflow", enabled=enabled, since=BEGAN + timedelta(seconds=later))


@pytest.mark.parametrize("held", [None, Held.RELEASED, Held.EXPIRED])
def test_a_run_that_no_process_takes_names_its_disabled_workflow(held: Held | None) -> None:
    [_, line] = Snapshot(make_run(held=held), {}, ORDER, enabling(enabled=False)).describe()
    assert "workflow 'workflow' is disabled: no worker and no bridge takes it" in line
    assert "`pgflow-prefect enable workflow`" in line
    assert ("--adopt" in line) is (held is None), "what no process has owned is older than the enabling to come"


def test_a_run_that_only_adopt_takes_says_so() -> None:
    new, old = enabling(enabled=True), enabling(enabled=True, later=1)
    assert len(Snapshot(make_run(held=None), {}, ORDER, new).describe()) == 2
    older = make_run(held=None).model_copy(update={"is_older": True})
    assert "worker --adopt" in Snapshot(older, {}, ORDER, old).describe()[2]
    [_, never] = Snapshot(make_run(held=None), {}, ORDER, None).describe()
    assert "no worker or bridge has served workflow 'workflow' yet: `pgflow-prefect worker --adopt` takes it" in never
    assert len(Snapshot(make_run(held=Held.RELEASED), {}, ORDER, old).describe()) == 2
    assert len(Snapshot(make_run(held=Held.LEASED), {}, ORDER, None).describe()) == 2


def test_a_stored_result_is_shown_by_its_size_and_place() -> None:
    reference = Reference.of(b"x" * 12345, storage="s3://bucket/results", key="k", serializer="pickle", attempt=1)
    state = make_state("old", start=0, end=1).model_copy(update={"step_result": RawJson(reference.write())})
    [row] = Snapshot(make_run(), {"old": state}, ["old"]).rows()
    assert row[-1] == "in a storage: 12,345 bytes of pickle in s3://bucket/results"
