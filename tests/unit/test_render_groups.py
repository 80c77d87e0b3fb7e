"""Boxes around steps whose slugs begin alike."""

import re

from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.render.dot import draw_dot
from pgflow_prefect.render.groups import Group, find_groups
from pgflow_prefect.render.mermaid import draw_mermaid
from pgflow_prefect.render.svg import draw_svg
from tests.unit.definitions import define

NESTED = build_graph(
    define(
        {
            "get": [],
            "load.big": ["get"],
            "load.small.a": ["get"],
            "load.small.b": ["get"],
            "v1.2": ["load.big"],
            "end": ["v1.2"],
        }
    )
)


def test_two_steps_whose_slugs_begin_alike_are_a_group() -> None:
    assert find_groups(NESTED) == Group(
        "",
        ["get", "v1.2", "end"],
        [Group("load", ["load.big"], [Group("load.small", ["load.small.a", "load.small.b"])])],
    )


def test_a_group_of_one_group_is_one_box() -> None:
    assert find_groups(["a.b.x", "a.b.y"]) == Group("", [], [Group("a.b", ["a.b.x", "a.b.y"])])


def test_dots_that_divide_nothing_make_no_group() -> None:
    slugs = [".", "..", ".a", ".b", "a.", "b.", "a..", "x"]
    assert find_groups(slugs) == Group("", slugs)


def test_deep_names_end_in_one_box() -> None:
    slugs = [".".join(["a", *map(str, range(depth))]) for depth in range(200)]
    assert sorted(find_groups(slugs).list_slugs()) == sorted(slugs)


def test_mermaid_draws_a_box_around_a_group() -> None:
    lines = [line.strip() for line in draw_mermaid(NESTED).splitlines()]
    assert lines[1:12] == [
        'step0["get"]',
        'step4["v1.2"]',
        'step5["end"]',
        'subgraph group0["load"]',
        'step1["load.big"]',
        'subgraph group1["load.small"]',
        'step2["load.small.a"]',
        'step3["load.small.b"]',
        "end",
        "end",
        "step0 --> step1",
    ]


def test_graphviz_draws_a_box_around_a_group() -> None:
    drawn = draw_dot(NESTED)
    assert 'subgraph "cluster_load" {' in drawn
    assert 'subgraph "cluster_load.small" {' in drawn
    assert drawn.count("{") == drawn.count("}")


def test_a_picture_has_a_frame_around_a_group_that_no_other_step_stands_in() -> None:
    frames = re.findall(r'class="frame".*?<title>([^<]*)</title>', draw_svg(NESTED))
    assert frames == ["load", "load.small"]
    mixed = build_graph(define({"a.x": [], "other": [], "a.y": ["a.x", "other"], "b": ["other"]}))
    assert len(re.findall('class="frame"', draw_svg(mixed))) <= 1


def test_a_workflow_without_groups_is_drawn_as_before() -> None:
    plain = build_graph(define({"a": [], "b": ["a"]}))
    assert "subgraph" not in draw_mermaid(plain) + draw_dot(plain)
    assert 'class="frame"' not in draw_svg(plain)
