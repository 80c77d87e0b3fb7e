"""JSON that is passed on as text: taken apart, put together and printed without a number losing a digit."""

import json
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, JsonValue, ValidationError

from pgflow_prefect.handlers.base import join_input
from pgflow_prefect.raw_json import ExactNumbers, RawJson, UnreadableJsonError, write_object

NUMBERS = [
    "0",
    "-1",
    "9007199254740993",
    "18446744073709551617",
    f"1{'0' * 400}",
    "1.10",
    "1.0",
    "-0.0",
    "12345678901234567.89",
    "0.10000000000000000000000001",
    f"0.{'0' * 400}1",
    "1e5",
    "1E+400",
    "-2.50e-3",
]

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class Shown(BaseModel):
    id: UUID = UUID(int=1)
    payload: RawJson | None


def print_exactly(value: BaseModel) -> str:
    numbers = ExactNumbers()
    return numbers.restore(json.dumps(value.model_dump(mode="json", context=numbers), indent=2, ensure_ascii=False))


@given(st.dictionaries(st.text(), values, max_size=5), st.sampled_from([None, 2]), st.booleans())
def test_an_object_is_taken_apart_and_put_together_again(
    members: dict[str, JsonValue], indent: int | None, escaped: bool
) -> None:
    raw = RawJson(json.dumps(members, indent=indent, ensure_ascii=escaped))
    parts = raw.split()
    assert {name: part.decode() for name, part in parts.items()} == members
    assert write_object(parts).decode() == members


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("within", ["{}", "[{}, 1]", '{{"a": [{}]}}', '{{"\\u00fc\\"": {}}}'])
def test_a_member_keeps_its_text(number: str, within: str) -> None:
    member = within.format(number)
    assert RawJson(f'{{"x": {member}, "payload":{member} }}').split() == {
        "x": RawJson(member),
        "payload": RawJson(member),
    }


@pytest.mark.parametrize("text", ["[1]", "1", '"{}"', "null", '{"a": }', '{"a" 1', "", '{"a": 1, "b'])
def test_a_document_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(UnreadableJsonError, match="can't be read"):
        RawJson(text).split()


def test_a_document_that_nests_too_deeply_is_refused() -> None:
    with pytest.raises(UnreadableJsonError, match="too deeply"):
        RawJson(f'{{"a": {"[" * 200_000}{"]" * 200_000}}}').split()


def test_a_number_that_python_does_not_read_passes_and_is_refused_where_it_is_asked_for() -> None:
    raw = RawJson(f'{{"a": {"9" * 5000}}}')
    assert raw.split()["a"].text == "9" * 5000
    with pytest.raises(UnreadableJsonError, match="too many digits"):
        raw.decode()


@pytest.mark.parametrize(
    ("results", "joined"),
    [
        ("{}", '{"payload":1.10}'),
        (" { } ", '{"payload":1.10}'),
        ('{"a": 1.10}', '{"payload":1.10,"a": 1.10}'),
        ('{"a": "payload"}', '{"payload":1.10,"a":"payload"}'),
        ('{"payload": 1.10, "a": 2}', '{"payload":1.10,"payload_":1.10,"a":2}'),
        ('{"payload ": 1}', '{"payload":1.10,"payload ":1}'),
    ],
)
def test_a_step_s_input_is_its_payload_and_its_results(results: str, joined: str) -> None:
    assert join_input(RawJson("1.10"), RawJson(results)).text == joined


@pytest.mark.parametrize("number", NUMBERS)
def test_a_document_within_other_json_is_printed_with_every_digit(number: str) -> None:
    printed = print_exactly(Shown(payload=RawJson(f'{{"n": [{number}], "text": "{number}"}}')))
    read = json.loads(printed, parse_float=str, parse_int=str)
    if number not in {"1e5", "1E+400"}:
        assert read["payload"] == {"n": [number], "text": number}
    assert list(read) == ["id", "payload"]
    assert printed.splitlines()[0] == "{"


def test_a_text_that_looks_like_a_placeholder_stays_as_it_is() -> None:
    text = '{"a": "number 0123456789abcdef 0", "b": 1.10}'
    assert json.loads(print_exactly(Shown(payload=RawJson(text))))["payload"]["a"] == "number 0123456789abcdef 0"


def test_a_model_takes_the_text_of_a_document_only() -> None:
    assert Shown(payload=None).payload is None
    assert Shown.model_validate({"payload": "[1.10]"}).payload == RawJson("[1.10]")
    with pytest.raises(ValidationError):
        Shown.model_validate({"payload": {"n": 1}})
