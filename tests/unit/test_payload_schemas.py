"""The schema of a deployment's parameters, as Prefect's own validator takes it."""

from typing import Any
from uuid import uuid4

import pytest
from prefect.utilities.schema_tools.validation import ValidationError, validate
from pydantic import BaseModel, Field, JsonValue
from typing_extensions import TypeAliasType

from pgflow_prefect import Workflow
from pgflow_prefect.definitions.model import Dep, WorkflowDefinition
from pgflow_prefect.deployment.deployments.payloads import describe_payload, make_parameter_schema
from pgflow_prefect.errors import UsageError


class Address(BaseModel):
    city: str


class Campaign(BaseModel):
    name: str = Field(min_length=1)
    sizes: list[int] = []
    home: Address | None = None


class Audience(BaseModel):
    people: int


Tree = TypeAliasType("Tree", "dict[str, Tree]")


def make_schema(*annotations: Any) -> dict[str, Any]:
    """Return the schema of a workflow whose roots take payloads of these types; a join takes another one."""
    workflow = Workflow("campaign")
    roots = [f"root{number}" for number in range(len(annotations))]
    for slug, annotation in zip(roots, annotations, strict=True):

        def handle(payload: Any) -> None: ...

        handle.__annotations__["payload"] = annotation
        workflow.step(slug)(handle)

    @workflow.step
    def join(payload: set[str]) -> None: ...

    deps = tuple(Dep(root, "join") for root in roots)
    definition = WorkflowDefinition(slug="campaign", steps=(*roots, "join"), deps=deps)
    return make_parameter_schema(workflow, definition)


def is_taken(schema: dict[str, Any], **parameters: Any) -> bool:
    try:
        validate(parameters, schema, raise_on_error=True)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (Campaign, {"name": "spring", "home": {"city": "Ulm"}}, {"name": ""}),
        (Campaign, {"name": "spring", "home": None}, {"name": "spring", "home": {}}),
        (dict[str, int], {"n": 1}, {"n": "one"}),
        (list[Audience], [{"people": 3}], [{"people": "many"}]),
        (int, 7, "seven"),
    ],
)
def test_a_payload_has_to_fit_what_the_root_takes(annotation: Any, good: Any, bad: Any) -> None:
    schema = make_schema(annotation)

    assert is_taken(schema, payload=good)
    assert is_taken(schema, run_id=str(uuid4())), "a run that SQL started has its payload there"
    assert is_taken(schema)
    assert not is_taken(schema, payload=bad)
    assert not is_taken(schema, run_id=7, payload=good)


def test_a_payload_has_to_fit_all_roots_where_they_take_different_objects() -> None:
    schema = make_schema(Campaign, Audience, Campaign)

    assert len(schema["properties"]["payload"]["allOf"]) == 2
    assert is_taken(schema, payload={"name": "spring", "people": 3})
    assert not is_taken(schema, payload={"name": "spring"})
    assert not is_taken(schema, payload={"people": 3})
    assert describe_payload(schema) == "Campaign (name, sizes, home) and Audience (people)"


@pytest.mark.parametrize(
    "annotations", [(Any,), (dict[str, Any],), (int, str), (Any, dict[str, Any]), (JsonValue,), (dict[str, JsonValue],)]
)
def test_any_json_is_taken_where_no_annotation_says_otherwise_or_all_differ(annotations: tuple[Any, ...]) -> None:
    schema = make_schema(*annotations)

    for payload in (None, 7, "seven", [1], {"n": 1}):
        assert is_taken(schema, payload=payload)
    assert describe_payload(schema) == "any JSON"
    assert set(schema["properties"]) == {"payload", "run_id", "schedule_id"}
    assert "Leave it empty" in schema["properties"]["run_id"]["description"]


def test_models_of_the_same_name_are_kept_apart() -> None:
    other = type("Campaign", (BaseModel,), {"__annotations__": {"budget": int}, "__module__": "elsewhere"})

    schema = make_schema(Campaign, other)

    assert is_taken(schema, payload={"name": "spring", "budget": 5})
    assert not is_taken(schema, payload={"name": "spring"})
    assert not is_taken(schema, payload={"budget": 5})


def test_a_type_within_itself_is_checked_as_deep_as_it_goes() -> None:
    schema = make_schema(Tree)

    assert is_taken(schema, payload={"a": {"b": {}}})
    assert not is_taken(schema, payload={"a": {"b": 7}})
    assert describe_payload(schema) == "Tree"


@pytest.mark.parametrize("annotation", ["nowhere", "Campaign.nowhere", "list[", "1 / 0"])
def test_an_annotation_that_means_nothing_is_named_with_its_step(annotation: str) -> None:
    with pytest.raises(UsageError, match="step 'root0' has an annotation that can't be used"):
        make_schema(annotation)
