"""The order of a workflow's steps: what comes first, what runs side by side, what ends it, what takes longest."""

from collections import defaultdict

import networkx as nx
from hypothesis import given

from pgflow_prefect.definitions.graph import (
    build_graph,
    find_critical_path,
    find_layers,
    find_leaves,
    find_problems,
    sort_steps,
)
from pgflow_prefect.definitions.model import WorkflowDefinition
from tests.unit.definitions import dags, define

CAMPAIGN = define(
    {"prepare_list": [], "render": ["prepare_list"], "check": [], "send": ["render", "check"], "report": ["send"]}
)


def test_a_graph_has_a_node_for_each_step_and_an_edge_for_each_dep() -> None:
    graph = build_graph(CAMPAIGN)
    assert set(graph.nodes) == set(CAMPAIGN.steps)
    assert set(graph.edges) == set(CAMPAIGN.deps)
    assert graph.graph["slug"] == CAMPAIGN.slug


def test_steps_are_sorted_by_what_they_wait_for_and_then_by_alphabet() -> None:
    assert sort_steps(build_graph(CAMPAIGN)) == ["check", "prepare_list", "render", "send", "report"]


def test_the_steps_of_a_layer_wait_for_earlier_layers_only() -> None:
    assert find_layers(build_graph(CAMPAIGN)) == [["check", "prepare_list"], ["render"], ["send"], ["report"]]


def test_the_critical_path_is_a_longest_chain() -> None:
    assert find_critical_path(build_graph(CAMPAIGN)) == ["prepare_list", "render", "send", "report"]


def test_leaves_are_the_steps_without_downstream_steps_in_the_definition_s_order() -> None:
    assert find_leaves(build_graph(CAMPAIGN)) == ["report"]
    assert find_leaves(build_graph(define({"z": [], "a": [], "m": ["z"]}))) == ["a", "m"]


def test_a_step_of_its_own_is_root_and_leaf_and_path() -> None:
    graph = build_graph(define({"only": []}))
    assert (sort_steps(graph), find_layers(graph), find_critical_path(graph), find_leaves(graph)) == (
        ["only"],
        [["only"]],
        ["only"],
        ["only"],
    )


@given(dags())
def test_every_step_comes_once_and_after_its_upstream_steps(definition: WorkflowDefinition) -> None:
    order = sort_steps(build_graph(definition))
    assert sorted(order) == sorted(definition.steps)
    place = {slug: number for number, slug in enumerate(order)}
    assert all(place[upstream] < place[downstream] for upstream, downstream in definition.deps)


@given(dags())
def test_a_step_s_layer_is_its_longest_distance_from_a_root(definition: WorkflowDefinition) -> None:
    upstream = defaultdict(list)
    for dep in definition.deps:
        upstream[dep.downstream].append(dep.upstream)

    def measure(slug: str) -> int:
        return 1 + max((measure(each) for each in upstream[slug]), default=-1)

    expected = {slug: measure(slug) for slug in definition.steps}
    layers = find_layers(build_graph(definition))
    assert {slug: depth for depth, layer in enumerate(layers) for slug in layer} == expected


@given(dags())
def test_the_critical_path_follows_deps_and_has_a_step_of_each_layer(definition: WorkflowDefinition) -> None:
    graph = build_graph(definition)
    path = find_critical_path(graph)
    assert len(path) == len(find_layers(graph))
    assert nx.is_path(graph, path)


@given(dags())
def test_the_leaves_are_the_steps_that_no_dep_starts_from(definition: WorkflowDefinition) -> None:
    starts = {dep.upstream for dep in definition.deps}
    assert find_leaves(build_graph(definition)) == [slug for slug in definition.steps if slug not in starts]


@given(dags())
def test_a_definition_without_a_cycle_has_no_problem(definition: WorkflowDefinition) -> None:
    assert find_problems(definition) == []
