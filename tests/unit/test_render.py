"""Pictures of a workflow: nothing is left out, nothing drawn twice, and no slug breaks them."""

import re

import pytest
from hypothesis import given

from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.render.layout import lay_out
from pgflow_prefect.render.mermaid import draw_mermaid
from pgflow_prefect.render.svg import find_height, measure_step
from pgflow_prefect.render.text import describe_graph, draw_text
from tests.unit.definitions import dags, define

DIAMOND = define({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]})


def test_a_diamond_as_text() -> None:
    assert draw_text(build_graph(DIAMOND)).splitlines() == [
        "╙── a",
        "    ├─╼ b",
        "    │   └─╼ d ╾ c",
        "    └─╼ c",
        "        └─╼  ...",
    ]


def read_text(drawn: str) -> tuple[list[str], set[tuple[str, str]]]:
    """Return the steps in the order in which a drawing has them, and its edges."""
    steps: list[str] = []
    edges = set()
    above: list[str] = []
    for line in drawn.splitlines():
        match = re.fullmatch(r"([╙╟║ │├└─╼╎]*)(s\d+)(?: ╾ (.*))?", line)
        if match is None:
            continue  # `...`: what is downstream is drawn elsewhere
        depth, slug, others = len(match[1]) // 4, match[2], match[3]
        steps.append(slug)
        above[depth - 1 :] = [slug]
        if depth > 1:
            edges.add((above[depth - 2], slug))
        edges |= {(other, slug) for other in (others or "").split(", ") if other}
    return steps, edges


@given(dags())
def test_text_has_each_step_once_and_every_edge(definition: WorkflowDefinition) -> None:
    steps, edges = read_text(draw_text(build_graph(definition)))
    assert sorted(steps) == sorted(definition.steps)
    assert edges == set(definition.deps)


def test_mermaid_has_each_step_once_and_every_edge() -> None:
    assert draw_mermaid(build_graph(DIAMOND)).splitlines() == [
        "flowchart LR",
        '    step0["a"]',
        '    step1["b"]',
        '    step2["c"]',
        '    step3["d"]',
        "    step0 --> step1",
        "    step0 --> step2",
        "    step1 --> step3",
        "    step2 --> step3",
    ]


@pytest.mark.parametrize(
    ("slug", "label"),
    [
        ('say "hi"', "say #34;hi#34;"),
        ("a[0]", "a#91;0#93;"),
        ("<b>&", "#60;b#62;#38;"),
        ("#35;", "#35;35;"),
        ("`code`", "#96;code#96;"),
        ("two\nlines", "two␊lines"),
        ("end", "end"),
        ("%%{init}%%", "#37;#37;{init}#37;#37;"),
        ("$$x$$", "$\u2060$x$\u2060$"),
        ("a\\", "a#92;"),
        ("größe 🚀", "größe 🚀"),
    ],
)
def test_mermaid_takes_every_slug_for_text(slug: str, label: str) -> None:
    assert draw_mermaid(build_graph(define({slug: []}))).splitlines() == ["flowchart LR", f'    step0["{label}"]']


def test_a_description_has_size_and_critical_path() -> None:
    assert describe_graph(build_graph(DIAMOND)) == "4 steps, 4 dependencies, 3 layers; critical path: a -> b -> d"


def test_a_long_critical_path_is_cut_in_the_middle() -> None:
    chain = define({f"s{place}": [f"s{place - 1}"] if place else [] for place in range(9)})
    assert describe_graph(build_graph(chain)) == (
        "9 steps, 8 dependencies, 9 layers; critical path: s0 -> s1 -> s2 -> s3 -> … -> s6 -> s7 -> s8"
    )


def test_mermaid_runs_in_the_direction_of_the_svg_picture() -> None:
    names = [f"a_step_with_a_long_name_{number}" for number in range(12)]
    long = build_graph(define({name: [names[place - 1]] if place else [] for place, name in enumerate(names)}))
    short = build_graph(define({"a": [], "b": ["a"]}))
    for graph, expected in ((long, "flowchart TD"), (short, "flowchart LR")):
        downwards = lay_out(graph, lambda slug: measure_step(slug, None), find_height(None)).downwards
        assert draw_mermaid(graph).splitlines()[0] == expected
        assert downwards is (expected == "flowchart TD")
