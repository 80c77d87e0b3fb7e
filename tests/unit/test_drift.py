"""Where a file and the database have come apart, in words."""

from collections.abc import Iterable

from pgflow_prefect import Workflow
from pgflow_prefect.definitions.model import Dep, WorkflowDefinition
from pgflow_prefect.deployment.deployments.change import Change
from pgflow_prefect.deployment.deployments.plan import Outcome, Plan
from pgflow_prefect.deployment.drift import Part, compare_deployment, compare_enabling, compare_handlers


def make_workflow(*, after: Iterable[str] = ()) -> Workflow:
    workflow = Workflow("shop")

    @workflow.step
    def a() -> None: ...

    @workflow.step
    def b() -> None: ...

    @workflow.step(after=list(after))
    def c(a: None) -> None: ...

    return workflow


DIAMOND = WorkflowDefinition(slug="shop", steps=("a", "b", "c"), deps=(Dep("a", "b"), Dep("a", "c"), Dep("b", "c")))


def test_a_dep_that_only_the_database_has_is_named_where_the_file_says_what_waits_for_what() -> None:
    found = [*compare_handlers(make_workflow(after=["b"]), DIAMOND, [])]

    assert [each.part for each in found] == [Part.HANDLERS]
    assert found[0].message.startswith("step 'b' waits for 'a' in the database, but not in the file")


def test_a_handler_that_leaves_an_upstream_result_out_is_no_difference() -> None:
    assert [*compare_handlers(make_workflow(), DIAMOND, [])] == []


def test_a_problem_of_the_handlers_is_a_difference() -> None:
    [found] = compare_handlers(make_workflow(), DIAMOND, ["step 'd' is missing"])

    assert (found.workflow_slug, found.part, found.message) == ("shop", Part.HANDLERS, "step 'd' is missing")


def test_a_deployment_is_missing_outdated_without_handlers_or_without_workflow() -> None:
    def say(outcome: Outcome, *changes: Change, defined: Iterable[str] = ("shop",)) -> list[str]:
        return [each.message for each in compare_deployment(Plan("shop", "shop", None, outcome, changes), [*defined])]

    assert say(Outcome.UNCHANGED) == []
    assert say(Outcome.CREATED) == ["it is not deployed: `pgflow-prefect deploy shop`"]
    assert say(Outcome.UPDATED, Change("version", "1", "2"), Change("schedule", "daily", None)) == [
        "its deployment differs, version: 1 -> 2: `pgflow-prefect deploy shop`",
        "its deployment differs, schedule: daily -> none: `pgflow-prefect deploy shop`",
    ]
    assert say(Outcome.DELETED) == ["it has a deployment, and no handlers here"]
    assert say(Outcome.DELETED, defined=[])[0].startswith("it has a deployment, and is gone from the database")


def test_a_workflow_whose_runs_no_process_takes_is_named() -> None:
    assert [*compare_enabling("shop", {"shop"})] == []
    assert [each.part for each in compare_enabling("shop", set())] == [Part.ENABLED]
