"""What is wrong with a workflow: all of it at once, each problem named so that it can be put right."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgflow_prefect.definitions.graph import CYCLES_SHOWN, build_graph, find_problems, sort_steps
from pgflow_prefect.definitions.model import Dep, WorkflowDefinition
from pgflow_prefect.errors import InvalidDefinitionError
from pgflow_prefect.wording import suggest
from tests.growth import is_linear
from tests.unit.definitions import dags, define, make_layered

CHAIN = define({"fetch": [], "clean": ["fetch"], "store": ["clean"]})
CHAIN_HANDLERS = {"fetch": ["payload"], "clean": ["fetch", "context"], "store": ["upstream"]}


def test_a_chain_with_its_handlers_is_valid() -> None:
    assert find_problems(CHAIN, CHAIN_HANDLERS) == []


def test_a_workflow_without_steps_is_named() -> None:
    assert find_problems(define({})) == ["it has no steps: insert them into pgflow.steps"]


def test_a_cycle_is_a_path_from_its_smallest_slug() -> None:
    definition = define({"c": ["b"], "b": ["a"], "a": ["c"]})
    assert find_problems(definition) == ["its steps wait for each other: a -> b -> c -> a"]


def test_every_cycle_is_told() -> None:
    definition = define({"a": ["b"], "b": ["a", "c"], "c": ["b"], "y": ["z"], "z": ["y"], "free": ["a"]})
    assert sorted(find_problems(definition)) == [
        "its steps wait for each other: a -> b -> a",
        "its steps wait for each other: b -> c -> b",
        "its steps wait for each other: y -> z -> y",
    ]


def test_a_step_that_waits_for_itself_is_a_cycle_and_told_once() -> None:
    assert find_problems(define({"a": ["a"]})) == ["its steps wait for each other: a -> a"]
    assert sorted(find_problems(define({"a": ["a", "b"], "b": ["a"]}))) == [
        "its steps wait for each other: a -> a",
        "its steps wait for each other: a -> b -> a",
    ]


def test_a_tangle_shows_some_cycles_and_that_there_are_more() -> None:
    slugs = [f"s{number:02}" for number in range(30)]
    problems = find_problems(define({slug: [other for other in slugs if other != slug] for slug in slugs}))
    assert len(problems) == CYCLES_SHOWN + 1
    assert problems[-1] == "there are more cycles among the 30 steps around 's00'"


def test_a_dep_on_an_unknown_step_is_named_with_the_nearest() -> None:
    definition = define({"fetch": [], "clean": ["fetsh"]})
    assert find_problems(definition) == [
        "a dependency names the step 'fetsh', which does not exist (did you mean 'fetch'?)"
    ]


def test_steps_that_would_be_one_argument_can_not_be_told_apart() -> None:
    (problem,) = find_problems(define({"a-b": [], "a_b": [], "a b": [], "c": []}))
    assert problem == "the steps 'a b', 'a-b', 'a_b' have the same Python name 'a_b': rename all but one"


def test_a_step_without_a_handler_is_external_and_a_handler_without_a_step_a_mistake() -> None:
    assert find_problems(CHAIN, {"fetch": [], "store": []}) == []
    assert find_problems(CHAIN, {"fetch": [], "cleen": [], "store": []}) == [
        "handler 'cleen' fits no step (did you mean 'clean'?)"
    ]


def test_a_handler_too_many_may_be_a_typing_error_of_a_step_that_has_one() -> None:
    assert find_problems(CHAIN, {**CHAIN_HANDLERS, "fetch2": []}) == [
        "handler 'fetch2' fits no step (did you mean 'fetch'?)"
    ]


def test_an_argument_that_is_no_upstream_step_is_named_with_the_nearest() -> None:
    handlers = {**CHAIN_HANDLERS, "clean": ["fecth", "paylod", "xyz"]}
    assert find_problems(CHAIN, handlers) == [
        "the handler of step 'clean' takes 'fecth', which is no upstream step of it (did you mean 'fetch'?)",
        "the handler of step 'clean' takes 'paylod', which is no upstream step of it (did you mean 'payload'?)",
        "the handler of step 'clean' takes 'xyz', which is no upstream step of it",
    ]


def test_an_argument_has_the_slug_s_python_name() -> None:
    definition = define({"fetch-all": [], "class": [], "2nd": ["fetch-all", "class"]})
    handlers = {"fetch-all": [], "class": [], "2nd": ["fetch_all", "class_"]}
    assert find_problems(definition, handlers) == []


def test_a_handler_need_not_take_anything() -> None:
    assert find_problems(CHAIN, dict.fromkeys(CHAIN.steps, ())) == []


def test_all_kinds_of_problems_come_at_once() -> None:
    definition = define({"a": ["b"], "b": ["a"], "a-b": ["gone"], "a_b": []})
    problems = find_problems(definition, {"a": ["nothing"], "b": [], "a-b": [], "other": []})
    wanted = ("'gone'", "same Python name", "a -> b -> a", "handler 'other'", "takes 'nothing'")
    assert len(problems) == len(wanted)
    assert all(any(words in problem for problem in problems) for words in wanted)


def test_the_error_lists_every_problem_and_keeps_them_apart() -> None:
    error = InvalidDefinitionError("campaign", ["one thing", "another"])
    assert str(error) == "workflow 'campaign' has 2 problems:\n  - one thing\n  - another"
    assert error.problems == ("one thing", "another")
    assert str(InvalidDefinitionError("campaign", ["one"])).startswith("workflow 'campaign' has 1 problem:")


def test_nothing_is_suggested_for_what_looks_like_nothing() -> None:
    assert suggest("xyz", ["abc", "def"]) == ""
    assert suggest("abd", ["abc", "xyz"]) == " (did you mean 'abc'?)"


@given(dags(least=2), st.data())
def test_a_dep_that_leads_back_is_always_a_cycle(definition: WorkflowDefinition, data: st.DataObject) -> None:
    order = sort_steps(build_graph(definition))
    first, last = sorted(data.draw(st.lists(st.integers(0, len(order) - 1), min_size=2, max_size=2, unique=True)))
    chain = [Dep(order[place], order[place + 1]) for place in range(first, last)]
    back = Dep(order[last], order[first])
    deps = tuple(dict.fromkeys([*definition.deps, *chain, back]))
    paths = [
        problem
        for problem in find_problems(WorkflowDefinition(slug="w", steps=definition.steps, deps=deps))
        if not problem.startswith("there are more cycles among")  # only some of many are written out
    ]
    assert paths
    for problem in paths:
        said, _, path = problem.partition(": ")
        assert said == "its steps wait for each other"
        cycle = path.split(" -> ")
        assert cycle[0] == cycle[-1] == min(cycle)
        assert all(pair in deps for pair in pairwise(cycle))


@pytest.mark.thorough
def test_validation_takes_time_in_proportion_to_the_steps() -> None:
    definitions = {steps: make_layered(steps) for steps in (2_000, 20_000)}

    def validate(steps: int) -> None:
        definition = definitions[steps]
        assert find_problems(definition, {slug: ["payload"] for slug in definition.steps}) == []
        sort_steps(build_graph(definition))

    assert is_linear(validate, 2_000, 10)


def test_mistyped_names_are_told_in_proportion_to_their_number() -> None:
    definitions = {steps: make_layered(steps) for steps in (1_000, 10_000)}

    def tell(steps: int) -> None:
        definition = definitions[steps]
        assert len(find_problems(definition, {f"x{slug}": () for slug in definition.steps})) == steps

    assert is_linear(tell, 1_000, 10)
