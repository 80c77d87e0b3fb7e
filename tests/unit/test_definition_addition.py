"""Importing a definition again: additions only."""

from pgflow_prefect.definitions.addition import add_definition
from pgflow_prefect.definitions.model import Dep, Rule, StepRules, WorkflowDefinition
from tests.unit.definitions import define

OLD = define({"a": [], "b": ["a"]}, "etl")


def test_a_new_workflow_is_taken_as_it_is() -> None:
    added = add_definition(None, OLD, "Airflow")
    assert (added.definition, added.steps, added.kept) == (OLD, OLD.steps, ())


def test_new_steps_and_deps_are_added_with_their_rules() -> None:
    new = define({"a": [], "b": ["a"], "c": ["b"]}, "etl").model_copy(
        update={"rules": {"c": StepRules(rule=Rule.ALL_DONE)}}
    )
    added = add_definition(OLD, new, "Airflow")
    assert added.steps == ("c",)
    assert added.deps == (Dep("b", "c"),)
    assert added.definition.find_rules("c").rule is Rule.ALL_DONE
    assert added.definition.definition_hash != OLD.definition_hash
    assert added.kept == ()


def test_what_is_gone_or_differs_stays_and_is_named() -> None:
    old = define({"a": [], "b": ["a"], "mine": ["b"]}, "etl")
    new = WorkflowDefinition(
        slug="etl", steps=("a", "b"), deps=(), rules={"b": StepRules(rule=Rule.ALWAYS)}, failed_by="leaves"
    )
    added = add_definition(old, new, "Airflow")
    assert added.definition == old
    assert (added.steps, added.deps) == ((), ())
    assert added.kept == (
        "step 'mine' is no longer in Airflow",
        "step 'b' no longer waits for 'a' in Airflow",
        "step 'b' has other rules in Airflow: rule is None here and 'always' there",
        "failed_by is 'steps' here and 'leaves' in Airflow",
    )


def test_the_same_definition_adds_nothing() -> None:
    added = add_definition(OLD, OLD, "Airflow")
    assert (added.steps, added.deps, added.kept) == ((), (), ())
    assert added.definition.definition_hash == OLD.definition_hash
