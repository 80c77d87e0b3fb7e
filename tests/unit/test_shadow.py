"""Where two results differ, and that nothing of them is shown."""

import pytest
from pydantic import JsonValue

from pgflow_prefect.handlers.shadow import DIFFERENCES_SHOWN, find_differences


@pytest.mark.parametrize("value", [None, True, 0, 1.5, "text", [], {}, {"a": [1, {"b": None}]}, [[], [[]]]], ids=str)
def test_a_value_does_not_differ_from_itself(value: JsonValue) -> None:
    assert find_differences(value, value) == []


def test_numbers_are_compared_as_numbers_and_names_without_order() -> None:
    assert find_differences({"a": 1, "b": 2.0}, {"b": 2, "a": 1.0}) == []


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
    assert find_differences(theirs, ours) == places


def test_nobody_reads_thousands_of_differences() -> None:
    assert len(find_differences([*range(5000)], [*range(1, 5001)])) == DIFFERENCES_SHOWN
