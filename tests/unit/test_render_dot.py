"""The picture for Graphviz: valid whatever the slugs, and complete."""

import re
import shutil
import subprocess
from html import unescape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.render.dot import draw_dot
from pgflow_prefect.render.labels import clean
from tests.unit.definitions import define
from tests.unit.runs import make_state, odd_dags, runs, trace

# https://graphviz.org/doc/info/lang.html: a quoted name ends at the first quote that no backslash stands before.
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|->|[\w.]+|[][{}=,]|\s+', re.DOTALL)

ODD_SLUGS = ['say "hi"', "back\\", '\\"', "\\N", "a->b", "{}", "<b>&amp;", "two\nlines", "größe 🚀", "a\\\\", "a\\"]


def read_dot(drawn: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return the nodes with their attributes as text, and the edges; strictly, for what `draw_dot` writes."""
    tokens = TOKEN.findall(drawn)
    assert "".join(tokens) == drawn, "there is something that Graphviz would not take"
    tokens = [token for token in tokens if not token.isspace()]
    assert (tokens[0], tokens[2], tokens[-1]) == ("digraph", "{", "}")
    nodes: dict[str, str] = {}
    edges = []
    place = 3
    while place < len(tokens) - 1:
        name, then = tokens[place : place + 2]
        if then == "->":
            edges.append((unquote(name), unquote(tokens[place + 2])))
            place += 3
            continue
        assert then == "[", f"{name} {then}"
        end = tokens.index("]", place)
        if name not in {"graph", "node", "edge"}:
            assert unquote(name) not in nodes
            nodes[unquote(name)] = "".join(tokens[place + 2 : end])
        place = end + 1
    return nodes, edges


def unquote(token: str) -> str:
    assert token.startswith('"'), token
    return re.sub(r"\\(.)", r"\1", token[1:-1], flags=re.DOTALL)


@settings(max_examples=50)
@given(odd_dags(), st.data())
def test_any_graph_has_each_step_and_each_dep_once(definition: WorkflowDefinition, data: st.DataObject) -> None:
    nodes, edges = read_dot(draw_dot(build_graph(definition), data.draw(st.none() | runs(definition))))
    assert sorted(nodes) == sorted(definition.steps)
    assert sorted(edges) == sorted(definition.deps)


def test_a_run_has_states_and_durations() -> None:
    definition = define({"a": [], "b": ["a"]})
    nodes, _ = read_dot(draw_dot(build_graph(definition), trace(definition, make_state("a", start=0, end=1.5))))
    assert 'label="a\\n✓ completed, 1.50 s"' in nodes["a"]
    assert 'label="b\\n○ waiting"' in nodes["b"]
    assert nodes["a"].split("fillcolor")[1] != nodes["b"].split("fillcolor")[1]


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed: install the package graphviz")
def test_graphviz_draws_every_slug_as_it_is() -> None:
    definition = define({slug: ODD_SLUGS[:place] for place, slug in enumerate(ODD_SLUGS)})
    drawn = subprocess.run(
        ["dot", "-Tsvg"], input=draw_dot(build_graph(definition)), capture_output=True, text=True, check=True
    )
    assert drawn.stderr == ""
    shown = [unescape(text) for text in re.findall(r"<text[^>]*>(.*)</text>", drawn.stdout)]
    assert sorted(text.replace("\xa0", " ") for text in shown) == sorted(map(clean, ODD_SLUGS))
    assert drawn.stdout.count('class="edge"') == len(definition.deps)
