"""The SVG picture: well-formed whatever the slugs, complete, self-contained, and readable without colours."""

import re
from xml.etree.ElementTree import Element

from hypothesis import given, settings
from hypothesis import strategies as st

from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.models import Status
from pgflow_prefect.render.labels import clean
from pgflow_prefect.render.svg import draw_svg
from pgflow_prefect.render.timeline import make_timeline
from pgflow_prefect.render.timeline_svg import draw_timeline_svg, find_tick
from tests.unit.definitions import define
from tests.unit.runs import make_run, make_state, odd_dags, read_svg, runs, trace

SVG = "{http://www.w3.org/2000/svg}"
DIAMOND = define({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]})


def find_all(drawing: Element, kind: str, name: str) -> list[Element]:
    """Return the elements of a kind that have this class."""
    return [found for found in drawing.iter(f"{SVG}{kind}") if name in found.get("class", "").split()]


def title_of(element: Element) -> str:
    return element.findtext(f"{SVG}title") or ""


@settings(max_examples=50)
@given(odd_dags(), st.data())
def test_any_graph_is_well_formed_with_one_element_for_each_step_and_dep(
    definition: WorkflowDefinition, data: st.DataObject
) -> None:
    graph = build_graph(definition)
    progress = data.draw(st.none() | runs(definition))
    drawing = read_svg(draw_svg(graph, progress))
    steps = find_all(drawing, "g", "step")
    assert len(steps) == len(definition.steps)
    assert len(find_all(drawing, "path", "line")) == len(definition.deps)
    if progress is None:
        # What XML reads back: it takes any white space in a text as it is, but for the ends of lines.
        assert sorted(map(title_of, steps)) == sorted(map(clean, definition.steps))


@settings(max_examples=50)
@given(odd_dags(), st.data())
def test_any_timeline_is_well_formed_with_one_row_for_each_step(
    definition: WorkflowDefinition, data: st.DataObject
) -> None:
    progress = data.draw(runs(definition))
    drawing = read_svg(draw_timeline_svg(make_timeline(build_graph(definition), progress)))
    assert len(find_all(drawing, "g", "row")) == len(definition.steps)
    worked = [slug for slug, mark in progress.marks.items() if mark.seconds is not None]
    assert len(find_all(drawing, "rect", "bar")) == len(worked)


def test_it_has_a_title_a_description_and_tool_tips_for_those_who_listen() -> None:
    drawing = read_svg(draw_svg(build_graph(DIAMOND)))
    assert drawing.get("role") == "img"
    named = [drawing.find(f"*[@id='{each}']") for each in (drawing.get("aria-labelledby") or "").split()]
    assert [each.text for each in named if each is not None] == ["workflow", "4 steps, 4 dependencies"]
    assert sorted(map(title_of, find_all(drawing, "path", "line"))) == ["a → b", "a → c", "b → d", "c → d"]


def test_it_loads_nothing_from_elsewhere_and_fits_dark_pages() -> None:
    drawn = draw_svg(build_graph(DIAMOND))
    assert re.findall(r"https?://[^\"]+", drawn) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"<script|href|@import|url\((?!#)", drawn)
    assert "prefers-color-scheme: dark" in drawn


def test_a_slug_is_text_and_never_markup() -> None:
    slug = "<script>alert('1')</script>&amp;\x1b[31m\n]]>"
    drawing = read_svg(draw_svg(build_graph(define({slug: []}))))
    [step] = find_all(drawing, "g", "step")
    assert title_of(step) == "<script>alert('1')</script>&amp;␛[31m␊]]>"
    assert not list(drawing.iter(f"{SVG}script"))


def test_a_long_name_is_cut_in_its_box_and_whole_in_its_tool_tip() -> None:
    slug = "a_very_long_name_" * 10
    drawing = read_svg(draw_svg(build_graph(define({slug: []}))))
    [name] = find_all(drawing, "text", "name")
    [step] = find_all(drawing, "g", "step")
    assert (name.text or "").endswith("…")
    assert slug.startswith((name.text or "")[:-1])
    assert title_of(step) == slug


def test_a_run_has_states_durations_attempts_and_a_legend() -> None:
    failed = make_state("b", Status.FAILED, 1, 3.5, attempts=3, error="ValueError: no disk\nmore")
    progress = trace(DIAMOND, make_state("a", start=0, end=1), failed, run=make_run(Status.FAILED, finished=3.5))
    drawing = read_svg(draw_svg(build_graph(DIAMOND), progress))
    steps = {title_of(step).split("\n")[0]: step for step in find_all(drawing, "g", "step")}
    assert {slug: step.get("class") for slug, step in steps.items()} == {
        "a": "step completed critical",
        "b": "step failed critical",
        "c": "step waiting",
        "d": "step waiting",
    }
    assert [text.text for text in find_all(steps["b"], "text", "note")] == ["failed, 2.50 s, 3 attempts"]
    assert title_of(steps["b"]).endswith("ValueError: no disk")
    assert [title_of(line) for line in find_all(drawing, "path", "critical") if line.get("d") and title_of(line)] == [
        "a → b"
    ]
    [legend] = find_all(drawing, "g", "legend")
    assert [text.text for text in legend.iter(f"{SVG}text")] == [
        *("✓", "completed 1", "○", "waiting 2", "✗", "failed 1", "━", "critical path")
    ]


def test_lines_across_a_timeline_are_apart_as_people_count() -> None:
    assert [find_tick(span) for span in (0.5, 7, 60, 400, 7200, 86400 * 30)] == [0.1, 1, 10, 60, 900, 86400 * 4]
