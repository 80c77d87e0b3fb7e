"""Results that can't be the arguments that they are for: found by their annotations, before anything runs."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict
from uuid import UUID

import pytest
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    JsonValue,
    PlainSerializer,
    TypeAdapter,
    WithJsonSchema,
    computed_field,
    model_validator,
)

from pgflow_prefect.definitions.model import Dep, MapRules
from pgflow_prefect.handlers.edges import find_type_problems
from pgflow_prefect.handlers.json_shapes import find_misfit, make_shape
from pgflow_prefect.handlers.python import PythonHandler


class Colour(Enum):
    RED = "red"


class Order(BaseModel):
    item: str
    count: int = 1


class Priced(BaseModel):
    item: str
    price: Decimal


class Forbidding(BaseModel):
    model_config = ConfigDict(extra="forbid")
    item: str


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    count: int = 1


class Renamed(BaseModel):
    item: str = Field(alias="the-item")


class ByAnyName(BaseModel):
    item: str = Field(validation_alias=AliasChoices("what", "item"))


class Doubled(BaseModel):
    item: str

    @computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> str:
        return self.item * 2


class Converting(BaseModel):
    count: int

    @model_validator(mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return {"count": len(value)}


class Tree(BaseModel):
    name: str
    children: list["Tree"] = []


class Numbered(BaseModel):
    name: int
    children: list["Numbered"] = []


@dataclass
class Point:
    x: int
    y: int


class Pair(NamedTuple):
    x: int
    y: int


class Options(TypedDict):
    x: int


class Raising:
    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        raise OSError("a type of the user's")


Elsewhere = Annotated[int, WithJsonSchema({"$ref": "https://example.org/schema.json"})]
Parsed = Annotated[int, BeforeValidator(lambda text: len(str(text)))]
Written = Annotated[int, PlainSerializer(lambda number: [number])]

MISFITS = [
    (str, int),
    (str, float),
    (str, bool),
    (int, str),
    (bool, str),
    (float, str),
    (None, int),
    (int, None),
    (list[int], int),
    (int, list[int]),
    (list[str], list[int]),
    (set[str], list[int]),
    (dict[str, str], dict[str, int]),
    (dict[str, list[str]], dict[str, list[int]]),
    (list[int], dict[str, Any]),
    (dict[str, Any], list[int]),
    (str, dict[str, JsonValue]),
    (tuple[int, str], list[int]),
    (tuple[int, int], tuple[int, int, int]),
    (Literal["a", "b"], Literal["c"]),
    (Literal["a"], Colour),
    (Literal["a"], int),
    (Colour, int),
    (str | None, int),
    (str | list[str], int | dict[str, int]),
    (Order, str),
    (str, Order),
    (Order, Priced),
    (Order, Forbidding),
    (Order, dict[str, list[int]]),
    (Order, Renamed),
    (Point, Order),
    (list[Order], list[Priced]),
    (list[Order], Order),
    (Order, list[Order]),
    (dict[str, str], Point),
    (Tree, Numbered),
    (date, int | list[int]),
    (UUID, int),
]

FITS = [
    (int, int),
    (int, float),
    (float, int),
    (bool, int),
    (int, bool),
    (str, datetime),
    (str, UUID),
    (str, Path),
    (str, Decimal),
    (str, Colour),
    (str, Literal["a"]),
    (Decimal, int),
    (Decimal, float),
    (Decimal, str),
    (float, Decimal),
    (int, datetime),
    (float, timedelta),
    (datetime, str),
    (Colour, str),
    (Colour, Literal["red", "blue"]),
    (str | None, str),
    (str | int, int),
    (int, int | None),
    (None, int | None),
    (list[int], tuple[int, ...]),
    (list[int], tuple[int, int]),
    (set[int], list[int]),
    (list[str | int], list[int]),
    (Any, int),
    (int, Any),
    (JsonValue, int),
    (str, object),
    (Order, Order),
    (Order, dict[str, str | int]),
    (Order, dict[str, Any]),
    (Order, Point | Order),
    (dict[str, int], Point),
    (dict[str, Any], Order),
    (Open, Order),
    (Renamed, Renamed),
    (Renamed, Order | Renamed),
    (Order, ByAnyName),
    (Doubled, Forbidding),
    (list[str], Converting),
    (str, Parsed),
    (Written, list[int]),
    (Json[int], int),
    (Tree, Tree),
    (Raising, int),
    (str, Raising),
    (str, Elsewhere),
    (Point, Pair),
    (Pair, list[int]),
    (Options, Point | Options),
    (dict[str, int], Options),
    (Path, int),  # what writes a path as text is code of its own
    (Callable[[], int], int),
]


def name(annotation: object) -> str:
    """Return an annotation's text without addresses: all processes that run tests find the same names."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(annotation))


@pytest.mark.parametrize(("returned", "taken"), MISFITS, ids=name)
def test_annotations_that_have_no_value_in_common_are_a_misfit(returned: Any, taken: Any) -> None:
    assert find_misfit(make_shape(returned, "serialization"), make_shape(taken, "validation")) is not None


@pytest.mark.parametrize(("returned", "taken"), FITS, ids=name)
def test_annotations_that_may_share_a_value_are_no_problem(returned: Any, taken: Any) -> None:
    assert find_misfit(make_shape(returned, "serialization"), make_shape(taken, "validation")) is None


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (Order(item="x"), Order),
        (Order(item="x"), dict[str, str | int]),
        (Doubled(item="x"), Forbidding),
        (Renamed.model_validate({"the-item": "x"}), Renamed),
        (Point(1, 2), Pair),
        (Pair(1, 2), list[int]),
        (Decimal("1.5"), float),
        (Decimal(2), int),
        (True, int),
        (5, datetime),
        (1.5, timedelta),
        (Colour.RED, Literal["red"]),
    ],
    ids=str,
)
def test_a_value_that_pydantic_takes_is_no_misfit(value: Any, taken: Any) -> None:
    of_value, of_taken = TypeAdapter(type(value)), TypeAdapter(taken)
    of_taken.validate_json(of_value.dump_json(value, by_alias=True, round_trip=True))
    assert find_misfit(make_shape(of_value, "serialization"), make_shape(of_taken, "validation")) is None


def find(deps: dict[str, list[str]], **functions: Callable[..., Any]) -> list[str]:
    handlers = {slug: PythonHandler(slug, function) for slug, function in functions.items()}
    return [*find_type_problems(handlers, [Dep(each, slug) for slug, upstream in deps.items() for each in upstream])]


def fetch() -> str:
    return "x"


def price() -> list[Order]:
    return []


def test_a_problem_names_both_steps_both_annotations_and_what_differs() -> None:
    def greet(fetch: int) -> None: ...

    def store(price: list[Priced]) -> None: ...

    assert find({"greet": ["fetch"]}, fetch=fetch, greet=greet) == [
        "the handler of step 'greet' takes 'fetch' as int, which the str that step 'fetch' returns can't be: "
        "it is text here and a whole number there"
    ]
    assert find({"store": ["price"]}, price=price, store=store) == [
        "the handler of step 'store' takes 'price' as list[Priced], which the list[Order] that step 'price' returns "
        "can't be: it has no '*.price'"
    ]


def test_results_that_are_taken_together_are_compared_too() -> None:
    def joins(upstream: dict[str, int]) -> None: ...

    def takes(upstream: dict[str, str | list[Order]]) -> None: ...

    [problem] = find({"joins": ["fetch", "price"]}, fetch=fetch, price=price, joins=joins)
    assert problem == (
        "the handler of step 'joins' takes 'upstream' as dict[str, int], which the results of its upstream steps "
        "can't be: its 'fetch' is text here and a whole number there"
    )
    assert find({"takes": ["fetch", "price", "external"]}, fetch=fetch, price=price, takes=takes) == []


def test_what_says_too_little_is_no_problem() -> None:
    def unannotated(fetch, context, payload: int): ...  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202

    def undefined(fetch: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    def late(external: int, fetch: str, payload: int) -> None: ...

    for function in (unannotated, undefined, late):
        assert find({"step": ["fetch", "external"]}, fetch=fetch, step=function) == []


def test_types_of_one_name_are_told_apart() -> None:
    def make(kind: Any) -> type[BaseModel]:
        class Same(BaseModel):
            value: kind

        return Same

    text, number = make(str), make(int)

    def one():  # type: ignore[no-untyped-def]  # noqa: ANN202
        ...

    def two():  # type: ignore[no-untyped-def]  # noqa: ANN202
        ...

    def joins(upstream):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        ...

    one.__annotations__, two.__annotations__ = {"return": text}, {"return": number}
    joins.__annotations__ = {"upstream": dict[str, text]}  # type: ignore[valid-type]
    [problem] = find({"joins": ["one", "two"]}, one=one, two=two, joins=joins)
    assert "its 'two.value' is a whole number here and text there" in problem


def test_a_map_returns_a_list_of_what_its_handler_returns() -> None:
    def orders() -> list[int]:
        return [1]

    def price(item: int) -> float:
        return item

    def total(price: list[float]) -> float:
        return sum(price)

    def wrong(price: float) -> float:
        return price

    handlers = {
        "orders": PythonHandler("orders", orders),
        "price": PythonHandler("price", price, is_map=True),
        "total": PythonHandler("total", total),
        "wrong": PythonHandler("wrong", wrong),
    }
    deps = [Dep("orders", "price"), Dep("price", "total"), Dep("price", "wrong")]
    [problem] = find_type_problems(handlers, deps, {"price": MapRules(over="orders")})
    assert "step 'wrong' takes 'price' as float, which the list[float] that map 'price' returns can't be" in problem


def test_an_element_of_what_a_map_maps_over_has_to_fit_its_item() -> None:
    def orders() -> list[str]:
        return ["x"]

    def price(item: int) -> int:
        return item

    handlers = {"orders": PythonHandler("orders", orders), "price": PythonHandler("price", price, is_map=True)}
    deps = [Dep("orders", "price")]
    [problem] = find_type_problems(handlers, deps, {"price": MapRules(over="orders")})
    assert "takes 'item' as int, which an element of what step 'orders' returns can't be" in problem
    assert [*find_type_problems(handlers, deps, {"price": MapRules(over="orders", path=("rows",))})] == []
