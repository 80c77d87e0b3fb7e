"""What pictures say of a run: states, times, the critical path, and its timeline."""

import json
from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgflow_prefect.definitions.graph import build_graph, find_last_path
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.models import Ending, Held, Status, StepState
from pgflow_prefect.render.labels import clean, cut, format_seconds, measure
from pgflow_prefect.render.mermaid import draw_mermaid
from pgflow_prefect.render.node_link import make_node_link
from pgflow_prefect.render.progress import Look
from pgflow_prefect.render.text import draw_text
from pgflow_prefect.render.timeline import describe_timeline, draw_axis, draw_bar, list_rows, make_timeline, write_rows
from pgflow_prefect.render.timeline_svg import draw_timeline_svg
from tests.unit.definitions import define
from tests.unit.runs import at, make_run, make_state, odd_dags, read_svg, runs, slugs, trace

DIAMOND = define({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]})
HALF = trace(DIAMOND, make_state("a", start=0, end=1), make_state("b", Status.PENDING, 1, attempts=2), now=3)


@pytest.mark.parametrize(
    ("state", "look"),
    [
        (make_state("a"), Look.COMPLETED),
        (make_state("a", shown="Cached"), Look.CACHED),
        (make_state("a", Status.FAILED, error="by me"), Look.FAILED),
        (make_state("a", Status.FAILED, error="by me", ended_as=Ending.CANCELLED), Look.CANCELLED),
        (make_state("a", Status.PENDING, attempts=0), Look.PENDING),
        (make_state("a", Status.PENDING, 1), Look.RUNNING),
        (make_state("a", Status.PENDING, 1, shown="Running"), Look.RUNNING),
        (make_state("a", Status.PENDING, 1, shown="AwaitingRetry"), Look.RETRYING),
        (make_state("a", Status.PENDING, shown="Waiting"), Look.ELSEWHERE),
        (make_state("a", Status.PENDING, 1, shown="Deferred"), Look.ELSEWHERE),
    ],
)
def test_a_step_looks_as_status_says(state: StepState, look: Look) -> None:
    run = make_run(Status.FAILED, error="by me", ended_as=Ending.CANCELLED)
    assert trace(define({"a": [], "b": ["a"]}), state, run=run).marks["a"].look is look


def test_a_step_that_waits_for_others_has_done_nothing() -> None:
    mark = HALF.marks["d"]
    assert (mark.look, mark.attempts, mark.seconds) == (Look.WAITING, 0, None)


def test_a_step_that_goes_on_has_taken_until_now() -> None:
    assert HALF.marks["b"].seconds == 2


def test_a_step_that_an_ended_run_left_behind_does_not_go_on_for_ever() -> None:
    running = make_state("b", Status.PENDING, 1)
    left = make_run(Status.FAILED, finished=4, held=Held.RELEASED)
    going = make_run(Status.FAILED, finished=4, held=Held.LEASED)
    assert trace(DIAMOND, running, run=left).marks["b"].seconds == 3
    assert trace(DIAMOND, running, run=going).marks["b"].seconds == 99, "its worker still lives"


def test_the_critical_path_goes_back_to_the_upstream_step_that_ended_last() -> None:
    ended = [("a", 0, 1), ("b", 1, 5), ("c", 1, 3), ("d", 5, 6)]
    assert trace(DIAMOND, *(make_state(slug, start=s, end=e) for slug, s, e in ended)).critical == ("a", "b", "d")


def test_the_critical_path_of_a_run_under_way_begins_with_what_has_been_at_it_longest() -> None:
    states = [make_state("a", start=0, end=1), *(make_state(s, Status.PENDING, n) for s, n in [("b", 3), ("c", 2)])]
    assert trace(DIAMOND, *states).critical == ("a", "c")


def test_steps_without_times_and_those_cancelled_before_they_began_decide_nothing() -> None:
    cancelled = make_state("c", Status.FAILED, None, 9, ended_as=Ending.CANCELLED)
    run = make_run(Status.FAILED, ended_as=Ending.CANCELLED)
    assert trace(DIAMOND, make_state("a"), make_state("b", end=2), cancelled, run=run).critical == ("b",)


@given(odd_dags(), st.data())
def test_a_critical_path_is_a_chain_of_deps(definition: WorkflowDefinition, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(definition.steps), unique=True))
    path = find_last_path(build_graph(definition), {slug: data.draw(st.integers(0, 9)) for slug in chosen})
    assert set(path) <= set(chosen)
    assert set(pairwise(path)) <= set(definition.deps)


def test_text_has_state_duration_and_attempts() -> None:
    assert draw_text(build_graph(DIAMOND), HALF).splitlines() == [
        "╙── a  ✓ completed 1.00 s",
        "    ├─╼ b  ▶ running 2.00 s, 2 attempts",
        "    │   └─╼ d  ○ waiting ╾ c",
        "    └─╼ c  ○ waiting",
        "        └─╼  ...",
    ]


def test_a_graph_too_deep_for_a_tree_is_a_list_in_order() -> None:
    chain = {f"s{place:02}": [f"s{place - 1:02}"] if place else [] for place in range(50)}
    lines = draw_text(build_graph(define({**chain, "end": ["s49", "s00"]}))).splitlines()
    assert lines[:2] == ["s00", "s01 ╾ s00"]
    assert lines[-1] == "end ╾ s49, s00"
    assert len(lines) == 51


@settings(max_examples=50)
@given(odd_dags(), st.data())
def test_text_has_one_line_for_each_step_whatever_the_slugs(
    definition: WorkflowDefinition, data: st.DataObject
) -> None:
    drawn = draw_text(build_graph(definition), data.draw(st.none() | runs(definition)))
    lines = [line for line in drawn.split("\n") if not line.endswith("╼  ...")]
    assert len(lines) == len(definition.steps)
    assert drawn.splitlines() == drawn.split("\n")
    assert not any(ord(character) < ord(" ") for line in lines for character in line)


def test_mermaid_has_a_colour_for_each_state_that_occurs() -> None:
    lines = draw_mermaid(build_graph(DIAMOND), HALF).splitlines()
    assert lines[1:5] == [
        '    step0["a<br/>✓ completed, 1.00 s"]:::completed',
        '    step1["b<br/>▶ running, 2.00 s, 2 attempts"]:::running',
        '    step2["c<br/>○ waiting"]:::waiting',
        '    step3["d<br/>○ waiting"]:::waiting',
    ]
    assert [line.split()[:2] for line in lines[9:]] == [
        ["classDef", look] for look in ("completed", "running", "waiting")
    ]


@settings(max_examples=50)
@given(odd_dags(), st.data())
def test_json_is_read_again_by_networkx(definition: WorkflowDefinition, data: st.DataObject) -> None:
    graph = build_graph(definition)
    written = json.loads(json.dumps(make_node_link(graph, data.draw(st.none() | runs(definition)))))
    read = nx.node_link_graph(written, edges="edges")
    assert nx.utils.graphs_equal(
        nx.create_empty_copy(read, with_data=False), nx.create_empty_copy(graph, with_data=False)
    )
    assert set(read.edges) == set(graph.edges)
    assert read.graph["slug"] == definition.slug


def test_json_of_a_run_has_what_each_step_has_done() -> None:
    data = make_node_link(build_graph(DIAMOND), HALF)
    nodes = {node["id"]: node for node in data["nodes"]}  # type: ignore[attr-defined]
    assert nodes["b"] == {
        "id": "b",
        "state": "running",
        "attempts": 2,
        "started_at": "2026-01-31T09:30:01+00:00",
        "ended_at": "2026-01-31T09:30:03+00:00",
        "seconds": 2.0,
        "handler": None,
        "error": None,
        "critical": True,
    }
    assert nodes["d"]["state"] == "waiting"


def test_a_timeline_begins_with_what_began_first_and_ends_with_what_has_not_begun() -> None:
    states = [make_state("a", start=1, end=2), make_state("b", start=4, end=8), make_state("c", start=3, end=4)]
    chart = make_timeline(build_graph(DIAMOND), trace(DIAMOND, *states))
    assert list(write_rows(chart)) == [
        ("a", "1.000", "1.000", "1", "completed", "yes"),
        ("c", "3.000", "1.000", "1", "completed", "no"),
        ("b", "4.000", "4.000", "1", "completed", "yes"),
        ("d", "", "", "0", "waiting", "no"),
    ]
    assert (chart.first, chart.last) == (1, 8)
    assert [row.slug for row in chart.take_longest(2).rows] == ["a", "b"]
    assert list(describe_timeline(chart))[1] == (
        "its steps worked from 1.00 s to 8.00 s after its beginning, those of the critical path for 5.00 s"
    )


def test_a_step_that_was_never_claimed_has_no_bar() -> None:
    chart = make_timeline(build_graph(DIAMOND), trace(DIAMOND, make_state("a", end=4)))
    assert [draw_bar(row, chart, 10) for row in chart.rows] == [("", "")] * 4
    assert next(iter(write_rows(chart))) == ("a", "", "", "1", "completed", "yes")


def test_bars_stand_at_their_times() -> None:
    states = [make_state("a", start=0, end=5), make_state("b", start=5, end=10), make_state("c", start=10, end=10)]
    chart = make_timeline(build_graph(DIAMOND), trace(DIAMOND, *states))
    drawn = {row.slug: draw_bar(row, chart, 10) for row in chart.rows}
    assert drawn == {"a": ("", "█████"), "b": (" " * 5, "█████"), "c": (" " * 9, "█"), "d": ("", "")}
    assert draw_axis(chart, 16) == "0 s         10 s"


def test_earlier_attempts_are_drawn_up_to_the_latest_one() -> None:
    again = make_state("a", start=5, end=10, attempts=2).model_copy(update={"first_claimed_at": at(0)})
    chart = make_timeline(build_graph(DIAMOND), trace(DIAMOND, again))
    assert draw_bar(chart.rows[0], chart, 10) == ("┄" * 5, "█████")
    assert (chart.first, chart.last) == (0, 10)
    [earlier] = [each for each in read_svg(draw_timeline_svg(chart)).iter() if each.get("class") == "earlier box"]
    [latest] = [each for each in read_svg(draw_timeline_svg(chart)).iter() if each.get("class") == "bar box"]
    assert float(earlier.attrib["x"]) + float(earlier.attrib["width"]) == pytest.approx(float(latest.attrib["x"]))


@pytest.mark.parametrize("attempts", [0, 1])
def test_a_step_that_was_tried_once_has_no_earlier_attempt(attempts: int) -> None:
    once = make_state("a", start=5, end=10, attempts=attempts).model_copy(update={"first_claimed_at": at(0)})
    chart = make_timeline(build_graph(DIAMOND), trace(DIAMOND, once))
    assert draw_bar(chart.rows[0], chart, 10) == ("", "█" * 10)


@pytest.mark.parametrize("start", [0, 59.9, 300, 3_600 * 30])
@pytest.mark.parametrize("length", [0.001, 0.02, 1.5, 30, 90, 4_000, 200_000])
def test_no_two_ticks_read_the_same(start: float, length: float) -> None:
    chart = make_timeline(build_graph(DIAMOND), trace(DIAMOND, make_state("a", start=start, end=start + length)))
    drawn = read_svg(draw_timeline_svg(chart))
    labels = [each.text for each in drawn.iter() if each.get("text-anchor") == "middle"]
    assert len(labels) > 1
    assert len(set(labels)) == len(labels)
    first, last = draw_axis(chart, 60).split("  ", 1)
    assert first != last.strip()


def test_the_critical_path_of_a_failed_run_ends_with_the_step_that_failed_it() -> None:
    states = [
        make_state("a", start=0, end=1),
        make_state("b", Status.FAILED, start=1, end=2, error="ValueError: no"),
        make_state("c", start=1, end=9),
    ]
    failed = make_run(Status.FAILED, error="step 'b': ValueError: no", finished=2)
    assert trace(DIAMOND, *states, run=failed).critical == ("a", "b")
    assert trace(DIAMOND, *states, run=make_run()).critical == ("a", "c"), "it goes on"


def test_of_two_steps_that_failed_the_first_one_decided() -> None:
    states = [
        make_state("a", start=0, end=1),
        make_state("b", Status.FAILED, start=1, end=7, error="ValueError: late"),
        make_state("c", Status.FAILED, start=1, end=2, error="ValueError: no"),
    ]
    failed = make_run(Status.FAILED, error="step 'c': ValueError: no", finished=2)
    assert trace(DIAMOND, *states, run=failed).critical == ("a", "c")


@settings(max_examples=50)
@given(odd_dags(), st.data(), st.integers(1, 200))
def test_bars_stay_in_their_row(definition: WorkflowDefinition, data: st.DataObject, width: int) -> None:
    chart = make_timeline(build_graph(definition), data.draw(runs(definition)))
    for row in chart.rows:
        left, bar = draw_bar(row, chart, width)
        assert len(left) + len(bar) <= width
        assert bool(bar) is (row.start is not None)
    assert sorted(row.slug for row in chart.rows) == sorted(definition.steps)
    json.dumps(list_rows(chart))


@given(st.text(), st.integers(1, 30))
def test_a_cut_text_fits(text: str, columns: int) -> None:
    assert measure(cut(text, columns)) <= columns or columns == 1


@given(slugs)
def test_clean_text_stays_the_same_and_has_no_control_character(text: str) -> None:
    assert clean(clean(text)) == clean(text)
    assert clean("\x1b[31m\u202eabc\x9b") == "␛[31m\ufffdabc\ufffd"
    assert clean("größe 👩‍🔬") == "größe 👩‍🔬"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.123, "0.12 s"), (59.994, "59.99 s"), (59.996, "0:01:00"), (3725, "1:02:05")]
)
def test_durations_as_people_write_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
