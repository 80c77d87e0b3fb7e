"""Where two results differ, and that nothing of them is shown."""

import pytest
from pydantic import JsonValue

from pgflow_prefect.handlers.shadow import DIFFERENCES_SHOWN, find_differences
from pgflow_prefect.raw_json import RawJson


@pytest.mark.parametrize("value", [None, True, 0, 1.5, "text", [], {}, {"a": [1, {"b": None}]}, [[], [[]]]], ids=str)
def test_a_value_does_not_differ_from_itself(value: JsonValue) -> None:
    assert find_differences(RawJson.of(value), RawJson.of(value)) == []


def test_numbers_are_compared_as_numbers_and_names_without_order() -> None:
    assert find_differences(RawJson('{"a": 1, "b": 2.0}'), RawJson('{"b": 2, "a": 1.0}')) == []


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("1.10", "1.1"),
        ("0.0", "-0.0"),
        ("1e2", "100"),
        ("1e400", f"1{'0' * 400}"),
        (f"{'9' * 5000}", f"{'9' * 5000}.0"),
    ],
)
def test_a_number_is_the_same_however_it_is_written(theirs: str, ours: str) -> None:
    assert find_differences(RawJson(theirs), RawJson(ours)) == []


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("12345678901234567.89", "12345678901234567.88"),
        ("9007199254740993", "9007199254740992.0"),
        ("0.1", "0.10000000000000001"),
    ],
)
def test_numbers_differ_that_are_one_float(theirs: str, ours: str) -> None:
    assert find_differences(RawJson(theirs), RawJson(ours)) == ["$: another number"]


@pytest.mark.parametrize(
    ("theirs", "ours", "places"),
    [
        (1, 2, ["$: another number"]),
        ("secret", "hidden", ["$: another string"]),
        (True, 1, ["$: number instead of boolean"]),
        (0, False, ["$: boolean instead of number"]),
        (None, {}, ["$: object instead of null"]),
        ([1], {"0": 1}, ["$: object instead of array"]),
        ({"a": 1}, {}, ["$.a: missing from the shadow's result"]),
        ({}, {"a": 1}, ["$.a: in the shadow's result only"]),
        ({"a": None}, {}, ["$.a: missing from the shadow's result"]),
        ([1, 2], [1], ["$: 1 elements instead of 2"]),
        ([1], [2, 3], ["$[0]: another number", "$: 2 elements instead of 1"]),
        ({"items": [{"price": 1}, {"price": "secret"}]}, {"items": [{"price": 1}, {"price": 2}]},
         ["$.items[1].price: number instead of string"]),
    ],
)  # fmt: skip
def test_each_place_is_named_and_no_value_is(theirs: JsonValue, ours: JsonValue, places: list[str]) -> None:
    assert find_differences(RawJson.of(theirs), RawJson.of(ours)) == places


def test_no_reader_gets_thousands_of_differences() -> None:
    assert len(find_differences(RawJson.of([*range(5000)]), RawJson.of([*range(1, 5001)]))) == DIFFERENCES_SHOWN
