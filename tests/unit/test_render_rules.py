"""Pictures of steps that are maps, or that have a condition."""

import pytest

from pgflow_prefect.definitions.graph import Graph, build_graph
from pgflow_prefect.definitions.model import MapRules, Rule, StepRules, WhenUnmet
from pgflow_prefect.render.dot import draw_dot
from pgflow_prefect.render.mermaid import draw_mermaid
from pgflow_prefect.render.node_link import make_node_link
from pgflow_prefect.render.rules import describe_rules
from pgflow_prefect.render.svg import draw_svg
from pgflow_prefect.render.text import draw_text
from tests.unit.definitions import define
from tests.unit.runs import make_state, read_svg, trace
from tests.unit.test_render_svg import find_all, title_of

PHOTOS = define({"list": [], "resize": ["list"], "warn": ["resize"], "clean": ["warn"]}).model_copy(
    update={
        "rules": {
            "resize": StepRules(map=MapRules(), when_exhausted=WhenUnmet.SKIP),
            "warn": StepRules(only_if={"resize": [0]}, unless={"resize": [1]}, when_unmet=WhenUnmet.SKIP_CASCADE),
            "clean": StepRules(rule=Rule.ALL_DONE),
        }
    }
)


@pytest.fixture
def graph() -> Graph:
    return build_graph(PHOTOS)


def test_the_text_tells_what_a_map_is_executed_for_and_when_a_step_runs(graph: Graph) -> None:
    drawn = draw_text(graph)
    assert "resize  (for each of list; skip where it fails)" in drawn
    assert 'warn  (if {"resize": [0]}; unless {"resize": [1]}; otherwise skip-…)' in drawn
    assert "clean  (all_done)" in drawn
    assert "list  (" not in drawn


def test_a_map_of_the_payload_says_so() -> None:
    roots = define({"each": []}).model_copy(update={"rules": {"each": StepRules(map=MapRules())}})
    assert describe_rules(build_graph(roots), "each") == "for each of payload"


def test_maps_and_conditions_have_shapes_of_their_own_with_a_run_and_without(graph: Graph) -> None:
    for progress in (None, trace(PHOTOS, make_state("list", start=0, end=1))):
        lines = draw_mermaid(graph, progress).splitlines()[1:5]
        assert [line.split('"', 1)[0].lstrip(" step0123") for line in lines] == ["[", "[[", "{{", "{{"]
        dot = {line.strip().split(" ")[0]: line for line in draw_dot(graph, progress).splitlines() if "label=" in line}
        assert "peripheries=2" in dot['"resize"']
        assert "dashed" in dot['"warn"']
        assert "peripheries" not in dot['"list"'] + dot['"warn"']
        steps = {
            title_of(each).split("\n")[0]: each for each in find_all(read_svg(draw_svg(graph, progress)), "g", "step")
        }
        boxes = {slug: len(find_all(each, "rect", "box")) for slug, each in steps.items()}
        assert boxes == {"list": 1, "resize": 2, "warn": 1, "clean": 1}
        assert {slug for slug, each in steps.items() if "conditional" in each.get("class", "")} == {"warn", "clean"}
        assert 'if {"resize": [0]}' in title_of(steps["warn"]), "the tool tip has the whole pattern"


def test_json_has_the_rules_of_each_step(graph: Graph) -> None:
    nodes = make_node_link(graph)["nodes"]
    assert isinstance(nodes, list)
    [warn] = [each for each in nodes if each["id"] == "warn"]
    assert (warn["only_if"], warn["when_unmet"]) == ({"resize": [0]}, "skip-cascade")
    [resize] = [each for each in nodes if each["id"] == "resize"]
    assert resize["map_over"] == "list"
