"""Numbers in the arguments of handlers: a Decimal gets every digit, and everything else what it got before."""

import json
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, NamedTuple

import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from pgflow_prefect.handlers.exact import ValueReader

LONG = "12345678901234567.89"


class Item(BaseModel):
    price: Decimal
    weight: float = 0
    note: Any = None


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)
    price: Decimal
    day: date
    other: Decimal


@dataclass
class Order:
    total: Decimal
    first: Item | None = None


class Tree(BaseModel):
    value: Decimal
    below: list["Tree"] = Field(default_factory=list)


class Pair(NamedTuple):
    one: Decimal
    two: float


class Row(TypedDict):
    price: Decimal


class Prices(RootModel[dict[str, Decimal]]):
    pass


def read(annotation: Any, text: str) -> Any:
    return ValueReader(TypeAdapter(annotation)).read(text)


@pytest.mark.parametrize(
    "number",
    [
        "0",
        "-7",
        "9007199254740993",
        "123456789012345678901234567890",
        f"1{'0' * 400}",
        "1.10",
        "1.0",
        "0.0",
        LONG,
        f"-{LONG}",
        "0.1",
        "0.10000000000000000000000001",
        f"0.{'0' * 330}1",
        f"{'9' * 900}.{'9' * 900}",
        "1E+2",
        "2.50e-3",
        "1e400",
    ],
)
@pytest.mark.parametrize(
    ("annotation", "within", "find"),
    [
        (Decimal, "{}", lambda read: read),
        (Decimal | None, "{}", lambda read: read),
        (list[Decimal], "[1, {}]", lambda read: read[1]),
        (dict[str, Decimal], '{{"a": {}}}', lambda read: read["a"]),
        (Annotated[Decimal, Field(allow_inf_nan=False)], "{}", lambda read: read),
        (Item, '{{"price": {}}}', lambda read: read.price),
        (list[Item], '[{{"price": {}}}]', lambda read: read[0].price),
        (Order, '{{"total": 1, "first": {{"price": {}}}}}', lambda read: read.first.price),
        (Row, '{{"price": {}}}', lambda read: read["price"]),
        (Prices, '{{"a": {}}}', lambda read: read.root["a"]),
        (tuple[Decimal, date], '[{}, "2026-01-31"]', lambda read: read[0]),
        (Pair, "[{}, 1.5]", lambda read: read.one),
        (Strict, '{{"price": {}, "day": "2026-01-31", "other": "1.20"}}', lambda read: read.price),
        (Tree, '{{"value": 1, "below": [{{"value": {}}}]}}', lambda read: read.below[0].value),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:30],
)
def test_a_decimal_has_every_digit(annotation: Any, within: str, find: Any, number: str) -> None:
    found = find(read(annotation, within.format(number)))
    assert isinstance(found, Decimal)
    assert found == Decimal(number)
    if "e" not in number.lower() and not number.endswith(".0"):
        assert str(found) == number or found.is_zero() or "E" in str(found)


def test_numbers_that_are_one_float_stay_apart() -> None:
    text = '{"a": 12345678901234567.89, "b": 12345678901234567.88, "c": 1.10, "d": 1.5}'
    assert {name: str(price) for name, price in read(dict[str, Decimal], text).items()} == {
        "a": "12345678901234567.89",
        "b": "12345678901234567.88",
        "c": "1.10",
        "d": "1.5",
    }
    assert [item.price for item in read(list[Item], f'[{{"price": {LONG}}}, {{"price": {LONG}01}}]')] == [
        Decimal(LONG),
        Decimal(f"{LONG}01"),
    ]


def test_other_values_than_decimals_are_read_as_before() -> None:
    item = read(Item, f'{{"price": {LONG}, "weight": {LONG}, "note": [{LONG}, 1.10]}}')
    assert type(item.weight) is float
    assert (item.price, item.weight, item.note) == (Decimal(LONG), float(LONG), [float(LONG), 1.1])
    assert [type(each) for each in item.note] == [float, float]
    assert read(float, LONG) == float(LONG)
    assert read(list[float | Decimal], "[1.10]") == [1.1]
    assert read(list[Decimal | int], "[1, 1.10]") == [1, Decimal("1.10")]
    assert read(list[Decimal | str], '["1.10", 1.10]') == ["1.10", Decimal("1.10")]
    assert read(Order, '{"total": "1.10"}') == Order(Decimal("1.10"))


def test_a_strict_model_takes_from_json_what_it_took() -> None:
    whole = read(Strict, '{"price": 1, "day": "2026-01-31", "other": 1.10}')
    assert (whole.price, whole.day, whole.other) == (Decimal(1), date(2026, 1, 31), Decimal("1.10"))
    with pytest.raises(ValidationError):
        read(Strict, '{"price": true, "day": "2026-01-31", "other": 1.10}')


@pytest.mark.parametrize(
    ("annotation", "text", "place"),
    [
        (Decimal, "null", ()),
        (Decimal, "NaN", ()),
        (list[Decimal], '[1.10, "one"]', (1,)),
        (Item, '{"weight": 1.10}', ("price",)),
        (dict[str, Decimal], "[1.10]", ()),
        (dict[str, Decimal], '{"a": 1.10', ()),
        (Annotated[Decimal, Field(max_digits=3)], LONG, ()),
        (Annotated[Decimal, Field(lt=1)], "1.10", ()),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(annotation: Any, text: str, place: tuple[object, ...]) -> None:
    with pytest.raises(ValidationError) as refused:
        read(annotation, text)
    assert refused.value.errors()[0]["loc"] == place


def test_a_long_list_is_read_in_the_time_that_json_takes() -> None:
    text = json.dumps([{"price": 1.1, "weight": number} for number in range(1000)]).replace("1.1", "1.10")
    assert sum(item.price for item in read(list[Item], text)) == Decimal(1100)
