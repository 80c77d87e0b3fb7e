"""What a file says of steps that are runs of other workflows, and what is wrong with it."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from pgflow_prefect import Child, SqlFunction, Workflow
from pgflow_prefect.database.definition_script import write_script
from pgflow_prefect.definitions.children import find_child_problems, sort_by_children
from pgflow_prefect.definitions.model import ChildRules, Dep, StepRules, WorkflowDefinition
from pgflow_prefect.deployment.child_workflows import refuse_few_places
from pgflow_prefect.deployment.code_generation import import_workflow
from pgflow_prefect.deployment.handler_files import load_workflow
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.child_edges import KnownWorkflow, find_child_type_problems


class Order(BaseModel):
    """What a step returns."""

    price: int


def make_parent(**options: object) -> Workflow:
    """Return a workflow whose step `settle` is a run of `settlement`."""
    workflow = Workflow("orders")

    @workflow.step
    async def look(payload: int) -> Order:
        return Order(price=payload)

    workflow.bind("settle", Child("settlement", **options), after=["look"])  # type: ignore[arg-type]
    return workflow


def find_rules(workflow: Workflow, step: str = "settle") -> ChildRules:
    child = workflow.definition.find_rules(step).child
    assert child is not None
    return child


def list_type_problems(parent: Workflow, child: Workflow) -> list[str]:
    known = KnownWorkflow(parent.definition, parent.handlers)
    return [*find_child_type_problems(known, {child.slug: KnownWorkflow(child.definition, child.handlers)})]


def test_a_binding_to_a_workflow_is_part_of_the_definition() -> None:
    assert find_rules(make_parent(payload="look.price", retries=2)) == ChildRules(
        workflow="settlement", payload=("look", "price"), retries=2
    )
    assert find_rules(make_parent()).payload is None


@pytest.mark.parametrize(
    ("payload", "path"),
    [("item", ("item",)), ("item.price", ("item", "price")), ("payload", ("payload",)), ("a.b.c", ("a.b", "c"))],
)
def test_a_path_begins_with_the_longest_name_of_a_step(payload: str, path: tuple[str, ...]) -> None:
    workflow = Workflow("orders")
    workflow.bind("a.b", SqlFunction("app.f"))
    workflow.bind_map("settle", Child("settlement", payload=payload), over="a.b")
    assert find_rules(workflow).payload == path


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"retry_delay_seconds": 5}, {"max_children": 0}, {"payload": ""}])
def test_options_that_a_child_has_not_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        make_parent(**wrong)


def test_problems_name_the_step_and_what_is_wrong_with_it() -> None:
    definition = make_parent(payload="lok").definition
    [payload] = find_child_problems(definition, ["settlement"], [])
    assert "from 'lok', which is not in its input" in payload
    unknown, _ = find_child_problems(definition, ["settlements"], [])
    assert "which the database does not have (did you mean 'settlements'?): push that workflow first" in unknown
    handler, _ = find_child_problems(definition, ["settlement"], ["settle"])
    assert "its function here is never executed" in handler


def test_a_payload_that_no_step_of_the_child_takes_is_a_problem() -> None:
    child = Workflow("settlement")

    @child.step
    async def pay(payload: str) -> int:
        return len(payload)

    [problem] = list_type_problems(make_parent(payload="look.price"), child)
    assert "gives look.price to a run of workflow 'settlement', whose step 'pay' takes 'payload' as str" in problem
    [problem] = list_type_problems(make_parent(), child)
    assert "gives all of its input" in problem
    assert list_type_problems(make_parent(payload="payload"), child) == []  # that may be anything


def test_a_result_that_the_next_step_can_not_take_is_a_problem() -> None:
    child = Workflow("settlement")

    @child.step
    async def pay(payload: int) -> str:
        return str(payload)

    parent = make_parent(payload="look.price")

    @parent.step
    async def tell(settle: dict[str, int]) -> None: ...

    [problem] = list_type_problems(parent, child)
    assert "the handler of step 'tell' takes 'settle' as dict[str, int]" in problem


def define(slug: str, *children: str) -> WorkflowDefinition:
    rules = {each: StepRules(child=ChildRules(workflow=each)) for each in children}
    return WorkflowDefinition(slug=slug, steps=(*children, "x"), deps=(), rules=rules)


def test_workflows_are_written_after_their_children() -> None:
    given = [define("a", "b", "c"), define("b", "c"), define("d"), define("c")]
    assert [each.slug for each in sort_by_children(given)] == ["c", "b", "a", "d"]
    assert {each.slug for each in sort_by_children([define("a", "b"), define("b", "a")])} == {"a", "b"}


def test_a_limit_has_a_place_for_each_level_of_the_deepest_run() -> None:
    given = {each.slug: each for each in (define("a", "c", "b"), define("b", "c"), define("d"), define("c", "far"))}
    refuse_few_places(given, 3)
    message = (
        r"--limit 2 is too small for a run of 'a', which waits for one of 'b', which waits for one of 'c', .* 3 at"
    )
    with pytest.raises(UsageError, match=message):
        refuse_few_places(given, 2)
    refuse_few_places({"d": given["d"]}, 1)
    refuse_few_places({"c": given["c"]}, 1)  # another process executes `far`
    refuse_few_places({}, 1)
    refuse_few_places({each.slug: each for each in (define("a", "b"), define("b", "a"))}, 3)  # read beside an edit


def test_an_import_binds_a_child_and_the_file_agrees_with_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rules = {
        "settle": StepRules(child=ChildRules(workflow="settlement", payload=("look", "price"), retries=1)),
        "tell": StepRules(rule="all_done"),
    }
    deps = (Dep("look", "settle"), Dep("settle", "tell"))
    definition = WorkflowDefinition(slug="orders", steps=("look", "settle", "tell"), deps=deps, rules=rules)
    (tmp_path / "flows").mkdir()
    path = tmp_path / "flows" / "nested_orders.py"
    report = import_workflow(definition, path)
    assert report.stubs == ("look", "tell")
    workflow, _ = load_workflow("orders", str(path))
    assert workflow.definition.rules == rules
    assert set(workflow.definition.deps) == set(deps)
    assert not import_workflow(definition, path).added


def test_an_exported_script_names_the_child_before_the_step() -> None:
    script = write_script(make_parent(payload="look.price", retries=1).definition)
    assert script.index("('settlement')") < script.index("child_workflow = 'settlement'")
    assert "child_payload = ARRAY['look', 'price']::text[]" in script
    assert "child_retries = 1" in script
