"""What a workflow's handlers say of its steps and of what waits for what, and where they say nothing that can be."""

from collections.abc import Callable, Collection, Mapping

import pytest

from pgflow_prefect import StepContext, Workflow
from pgflow_prefect.definitions.from_handlers import derive_definition
from pgflow_prefect.definitions.model import Dep
from pgflow_prefect.errors import InvalidDefinitionError, UsageError
from tests.unit.definitions import define

Names = Mapping[str, Collection[str]]


def find_problems(arguments: Names, after: Names | None = None, slug: str = "workflow") -> list[str]:
    with pytest.raises(InvalidDefinitionError) as caught:
        derive_definition(slug, [*arguments], arguments, after or {})
    return [*caught.value.problems]


def test_an_argument_that_names_a_step_is_a_dep() -> None:
    workflow = Workflow("campaign")

    @workflow.step
    def send(prepare_list: list[str], _2nd: str, payload: object, context: StepContext) -> None: ...

    @workflow.step("prepare-list")
    def prepare(payload: object) -> None: ...

    @workflow.step("2nd", unimplemented=True)
    def second() -> None: ...

    assert workflow.known_steps == ["send", "prepare-list", "2nd"]
    assert workflow.definition == define({"send": ["prepare-list", "2nd"], "prepare-list": [], "2nd": []}, "campaign")


def test_an_argument_with_a_default_is_a_dep_only_if_it_names_a_step() -> None:
    workflow = Workflow("report")

    @workflow.step
    def fetch(payload: object, page_size: int = 100) -> None: ...

    @workflow.step
    def publish(fetch: object = None, *, dry: bool = False) -> None: ...

    assert workflow.definition == define({"fetch": [], "publish": ["fetch"]}, "report")
    assert workflow.find_problems(define({"fetch": [], "publish": []}, "report")) == []


def test_after_names_what_no_argument_does() -> None:
    workflow = Workflow("join")

    @workflow.step
    def a() -> None: ...

    @workflow.step("b-b")
    def b() -> None: ...

    @workflow.step(after=["a", "b-b"])
    def sums(upstream: dict[str, int]) -> None: ...

    @workflow.step(after=["sums", "a"])
    def clean(a: int) -> None: ...

    assert workflow.definition.deps == (
        Dep("a", "sums"),
        Dep("b-b", "sums"),
        Dep("a", "clean"),
        Dep("sums", "clean"),
    )


def test_a_step_of_another_kind_waits_for_what_it_is_said_to_come_after() -> None:
    definition = derive_definition("w", ["a", "queued"], {"a": []}, {"queued": ["a"]})
    assert definition == define({"a": [], "queued": ["a"]}, "w")


def test_a_name_that_fits_no_step_is_told_with_the_nearest() -> None:
    assert find_problems({"load": [], "send": ["lod", "load"]}) == [
        "the handler of step 'send' takes 'lod', which is no step of this workflow (did you mean 'load'?)"
    ]
    assert find_problems({"load-it": [], "send": ["upstrem"]}, {"send": ["load_it"]}) == [
        "the handler of step 'send' takes 'upstrem', which is no step of this workflow (did you mean 'upstream'?)",
        "step 'send' is to come after 'load_it', which is no step of this workflow (did you mean 'load-it'?)",
    ]


def test_all_results_of_no_step_is_a_mistake() -> None:
    [problem] = find_problems({"load": [], "join": ["upstream"]})
    assert problem.startswith("the handler of step 'join' takes the results of all its upstream steps, and nothing")
    assert problem.endswith("@workflow.step(after=[…])")
    assert derive_definition("w", ["load", "join"], {"load": [], "join": ["upstream", "load"]}, {}).deps


def test_steps_that_wait_for_each_other_are_told_as_a_path() -> None:
    assert find_problems({"a": ["c"], "b": ["a"], "c": []}, {"c": ["b"]}) == [
        "its steps wait for each other: a -> b -> c -> a"
    ]
    assert find_problems({"a": ["a"]}) == ["its steps wait for each other: a -> a"]


def test_steps_of_one_python_name_are_told() -> None:
    assert find_problems({"check-it": [], "check_it": [], "c": ["check_it"]}) == [
        "the steps 'check-it', 'check_it' have the same Python name 'check_it': rename all but one"
    ]


def test_a_workflow_without_steps_says_how_it_gets_one() -> None:
    with pytest.raises(InvalidDefinitionError, match=r"it has no steps: decorate a function with @workflow\.step"):
        _ = Workflow("empty").definition


def test_a_slug_that_postgresql_can_not_store_is_told() -> None:
    assert find_problems({"a\0": []}, slug="w\ud800") == [
        "the slug 'w\\ud800' has a character that PostgreSQL can't store: rename it",
        "the slug 'a\\x00' has a character that PostgreSQL can't store: rename it",
    ]


def test_one_slug_where_a_list_belongs_is_refused() -> None:
    with pytest.raises(UsageError, match=r"give a list of slugs, after=\['load'\]"):
        Workflow("w").step(after="load")


def test_what_comes_after_is_missed_in_a_database_that_does_not_say_so() -> None:
    workflow = Workflow("workflow")
    steps: dict[str, Callable[..., None]] = {"a": lambda: None, "b": lambda: None}
    workflow.step("a")(steps["a"])
    workflow.step("b", after=["a"])(steps["b"])

    [problem] = workflow.find_problems(define({"a": [], "b": []}))
    assert problem.startswith("step 'b' is to come after 'a', which is no upstream step of it in the database")
    assert workflow.find_problems(workflow.definition) == []
