"""What a handler returns is what the next step gets; what would not be is refused, with its place and what to do."""

import base64
import datetime as dt
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from io import StringIO
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import pytest
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    PrivateAttr,
    SecretBytes,
    SecretStr,
    TypeAdapter,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import core_schema
from typing_extensions import TypedDict

from pgflow_prefect.handlers.generators import find_collected
from pgflow_prefect.handlers.schemas import is_lossless
from pgflow_prefect.handlers.values import UnstorableError, write_result


class Login(BaseModel):
    user: str
    token: SecretStr


class RevealedLogin(BaseModel):
    token: Annotated[SecretStr, PlainSerializer(lambda secret: secret.get_secret_value())]


class Event(BaseModel):
    at: str


class Sale(Event):
    amount: int


class Batch(BaseModel):
    events: list[Event]


class TwoAliases(BaseModel):
    number: int = Field(validation_alias="in", serialization_alias="out")


class Leaving(BaseModel):
    kept: int
    left: int = Field(default=1, exclude=True)


@pydantic_dataclass
class LeavingItem:
    kept: int
    left: int = Field(default=1, exclude=True)


class LeavingRequired(BaseModel):
    left: int = Field(exclude=True)


class Cat(BaseModel):
    name: str


class Dog(BaseModel):
    name: str


class TellingCat(BaseModel):
    kind: Literal["cat"] = "cat"
    name: str


class TellingDog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    extra: Any = None


class Tree(BaseModel):
    leaf: Event | None = None
    children: list["Tree"] = []


T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    items: list[T]


@dataclass
class Base:
    x: int


@dataclass
class Derived(Base):
    y: int = 0


class Row(NamedTuple):
    day: dt.date
    price: float


class Record(TypedDict):
    raw: Any
    at: dt.datetime


class Colour(Enum):
    RED = "red"


class Keeping(BaseModel):
    kept: int
    _left: str = PrivateAttr("")
    _client: object = PrivateAttr(default_factory=object)

    @classmethod
    def with_left(cls, left: str) -> "Keeping":
        made = cls(kept=1)
        made._left = left
        return made


@dataclass
class Doubled:
    x: int
    y: int = field(init=False)
    seen: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.y = 2 * self.x


def change(value: Any, **attributes: object) -> Any:
    for name, each in attributes.items():
        setattr(value, name, each)
    return value


@dataclass
class Holder:
    items: list[Base]


class WithoutComparison:
    """Has pydantic's schema, and no `__eq__`."""

    def __init__(self, number: int) -> None:
        self.number = number

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> Any:
        return core_schema.no_info_plain_validator_function(
            lambda value: value if isinstance(value, cls) else cls(value),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value.number),
        )


NOON = dt.datetime(2026, 7, 1, 12, tzinfo=dt.UTC)


def make_adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def write(value: object, annotation: object = None) -> str:
    return write_result(value, None if annotation is None else make_adapter(annotation))


@pytest.mark.parametrize(
    ("value", "annotation", "place", "reason"),
    [
        (Login(user="ada", token=SecretStr("hunter2")), Login, "token is a SecretStr", "load the secret in the step"),
        ({"a": [SecretBytes(b"hunter2")]}, dict[str, list[SecretBytes]], "a[0] is a SecretBytes", "get_secret_value()"),
        ({"a": SecretStr("hunter2")}, None, "a is a SecretStr", "stars only"),
        ([Login(user="ada", token=SecretStr("hunter2"))], None, "[0].token is a SecretStr", "stars only"),
        ([Event(at="a"), Sale(at="b", amount=7)], list[Event], "[1] is a Sale", "comes back as a Event"),
        (Sale(at="b", amount=7), Event, "it is a Sale", "comes back as a Event"),
        (Batch(events=[Sale(at="b", amount=7)]), Batch, "events[0] is a Sale", "name what it is"),
        (Batch(events=[Sale(at="b", amount=7)]), None, "events[0] is a Sale", "name what it is"),
        (Page[Event](items=[Sale(at="b", amount=7)]), Page[Event], "items[0] is a Sale", "name what it is"),
        ({"k": Derived(1, 2)}, dict[str, Base], "k is a Derived", "comes back as a Base"),
        (Tree(children=[Tree(leaf=Sale(at="b", amount=1))]), Tree, "children[0].leaf is a Sale", "name what it is"),
        (TwoAliases.model_validate({"in": 1}), TwoAliases, "in is written so that it can't be read", "one alias"),
        ([Leaving(kept=1, left=5)], list[Leaving], "[0].left comes back as another value", "leaves something out"),
        (LeavingRequired(left=5), LeavingRequired, "left is written so that it can't be read", "no `exclude`"),
        (Dog(name="Rex"), Cat | Dog, "it is a Dog", "discriminator"),
        ([Dog(name="Rex")], list[Cat | Dog], "[0] is a Dog", "comes back as a Cat"),
        ("2026-07-01", dt.date | str, "it is a str", "comes back as a date"),
        ({"at": NOON}, dict[str, str | dt.datetime], "at is a datetime", "comes back as a str"),
        ((1, 2), list[int] | tuple[int, ...], "it is a tuple", "comes back as a list"),
        ({1: "a"}, dict[str | int, str], "it has keys that come back as others", "use texts as keys"),
        ({1: "a", "1": "b"}, None, "it has the keys 1 and '1'", "one key in JSON"),
        ({"a": [{True: 1, "true": 2}]}, None, "a[0] has the keys True and 'true'", "one key in JSON"),
        ({None: 1, "null": 2}, dict, "it has the keys None and 'null'", "one key in JSON"),
        ({NOON.date(): 1, "2026-07-01": 2}, None, "it has the keys", "one key in JSON"),
        ({1: "a", "1": "b"}, dict[Any, Any], "it has the keys 1 and '1'", "one key in JSON"),
        ({1: "a", "1": "b"}, dict[str | int, str], "it has the keys 1 and '1'", "one key in JSON"),
        ([{1: "a", "1": "b"}], list[Any], "[0] has the keys 1 and '1'", "one key in JSON"),
        (Open(extra={1: "a", "1": "b"}), Open, "extra has the keys 1 and '1'", "one key in JSON"),
        (Keeping.with_left("a"), Keeping, "_left is a private attribute", "make it a field"),
        ({"k": Keeping.with_left("a")}, None, "k._left is a private attribute", "make it a field"),
        ((Leaving(kept=1, left=5),), list, "[0].left comes back as another value", "leaves something out"),
        ({"a": [Leaving(kept=1, left=5)]}, dict, "a[0].left comes back as another value", "leaves something out"),
        ({"a": Leaving(kept=1, left=5)}, dict[str, Any], "a.left comes back as another value", "leaves something out"),
        (Leaving(kept=1, left=5), object, "left comes back as another value", "leaves something out"),
        ([{"k": Keeping.with_left("a")}], list[dict[str, Any]], "[0].k._left is a private attribute", "a field"),
        (Open(extra=[Batch(events=[Sale(at="b", amount=7)])]), Open, "extra[0].events[0] is a Sale", "name what it is"),
        ([LeavingItem(1, 5)], None, "[0].left comes back as another value", "leaves something out"),
        ([change(Doubled(1), y=7)], list[Doubled], "[0].y is a field with init=False", "leave out init=False"),
        (change(Doubled(1), seen=7), Doubled, "seen is a field with init=False", "leave out init=False"),
        (Holder([Derived(1)]), Holder, "items[0] is a Derived", "comes back as a Base"),
    ],
)
def test_a_value_that_would_come_back_as_another_is_refused_with_its_place(
    value: object, annotation: object, place: str, reason: str
) -> None:
    with pytest.raises(UnstorableError) as refused:
        write(value, annotation)
    assert str(refused.value).startswith(place)
    assert reason in str(refused.value)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (RevealedLogin(token=SecretStr("open")), RevealedLogin),
        (Login(user="ada", token=SecretStr("")), Login),
        ([Sale(at="a", amount=1)], list[Sale]),
        ([Event(at="a"), Sale(at="b", amount=7)], list[Sale | Event]),
        (Leaving(kept=1), Leaving),
        ([TellingDog(name="Rex")], list[Annotated[TellingCat | TellingDog, Field(discriminator="kind")]]),
        ([(1, "a"), (2, "b")], list[Any]),
        ({"raw": (1, 2), "at": NOON}, Record),
        (Open(extra={"rows": [(1, NOON)]}), Open),
        (Open.model_validate({"more": [(1, 2)]}), Open),
        ({"raw": (1, 2)}, dict[str, Any] | None),
        (Row(dt.date(2026, 7, 1), 0.5), Row),
        ({1: "a"}, dict),
        ({1: "a", "b": None}, None),
        ({1: "a", None: "b"}, dict[Any, Any]),
        ({1: {2: "a"}}, dict[int, dict[int, str]]),
        (Keeping(kept=1), Keeping),
        (Doubled(1), Doubled),
        (Holder([Base(1)]), Holder),
        ([Derived(1, 2)], list[Derived]),
        (Tree(children=[Tree(leaf=Event(at="a"))]), Tree),
        (Page[int](items=[1]), Page[int]),
        (WithoutComparison(7), WithoutComparison),
        ([WithoutComparison(7)], list[WithoutComparison]),
        (Colour.RED, Colour | int),
        (Path("a"), Path),
        (1.0, int | float),
        ({"a": {1, 2}}, dict[str, set[int]]),
        ((number for number in range(3)), Iterable[int]),
    ],
)
def test_a_value_that_comes_back_as_it_was_is_stored(value: object, annotation: object) -> None:
    assert write(value, annotation)


class NaTType(dt.datetime):
    """As pandas has it: a datetime that is none."""

    year = math.nan  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "NaT"


class int64:  # noqa: N801  as numpy has it
    """As numpy has it: no number of Python's."""

    ndim = 0

    def tolist(self) -> int:
        return 1


class ndarray(int64):  # noqa: N801
    ndim = 1


class DataFrame:
    """As pandas has it."""


int64.__module__ = ndarray.__module__ = "numpy"
DataFrame.__module__ = "pandas.core.frame"


CIRCLE: dict[str, Any] = {}
CIRCLE["a"] = CIRCLE


def nest(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"price": 1.5}, {"price": math.nan}], "[1].price is nan, which JSON has no form for: return None in its"),
        ({"a": {"b": [math.inf]}}, "a.b[0] is inf, which"),
        (Row(dt.date(2026, 7, 1), -math.inf), "[1] is -inf, which"),
        (
            [{"day": NaTType(1, 1, 1)}],
            "[0].day is pandas' NaT, which JSON has no form for: return None in its place",
        ),
        ({"n": int64()}, "n is a numpy.int64, which JSON has no form for: return its Python value, .item()"),
        ([ndarray()], "[0] is a numpy.ndarray, which JSON has no form for: return its Python value, .tolist()"),
        (
            DataFrame(),
            "it is a pandas.DataFrame, which JSON has no form for: return its rows, frame.to_dict('records')",
        ),
        (
            {"file": b"\xff\x00"},
            "file is binary bytes, which JSON has no form for: return base64.b64encode(…).decode()",
        ),
        ({"total": Decimal("NaN")}, "total is nan, which"),
        (
            {"n": [1, 10**5000]},
            "n[1] is an integer of more than 4,300 digits, which Python does not write: return a text",
        ),
        ({"a": {"b": 1}.items()}, "a is a dict_items, which JSON has no form for"),
        ([MappingProxyType({"a": 1})], "[0] is a mappingproxy, which JSON has no form for"),
        (
            {"log": [StringIO("a\nb")]},
            "log[0] is an open file, which JSON has no form for: return what .read() returns",
        ),
        ([CIRCLE], "[0].a contains itself, which JSON has no form for"),
        (nest(5_000), "it nests lists, dicts or objects more than 300 deep: store it elsewhere"),
        ({"f": print}, "f is a builtin_function_or_method, which JSON has no form for: return texts, numbers, lists"),
    ],
)
@pytest.mark.parametrize("annotation", [None, Any, dict[str, Any] | list[Any] | Any])
def test_what_json_has_no_form_for_is_named_with_its_place_and_what_to_do(
    value: object, message: str, annotation: object
) -> None:
    with pytest.raises(UnstorableError) as refused:
        write(value, annotation)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("annotation", [list[float], list[dict[str, float]] | list[float], list[Any]])
def test_a_number_that_is_none_is_named_where_an_annotation_lets_it_pass(annotation: object) -> None:
    with pytest.raises(UnstorableError, match=r"^\[1\] is nan"):
        write([1.0, math.nan], annotation)


@pytest.mark.parametrize("annotation", [list[dict[str, dt.datetime]], list[Any]])
def test_a_day_that_is_none_is_named_where_an_annotation_lets_it_pass(annotation: object) -> None:
    with pytest.raises(UnstorableError, match=r"^\[0\]\.day is pandas' NaT"):
        write([{"day": NaTType(1, 1, 1)}], annotation)


def test_binary_bytes_are_stored_as_text_that_says_what_they_are() -> None:
    encode = PlainSerializer(lambda value: base64.b64encode(value).decode())

    class File(BaseModel):
        model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
        content: bytes

    assert write(File(content=b"\xff\x00"), File) == '{"content":"_wA="}'
    with pytest.raises(UnstorableError, match="it comes back as another value"):
        write(b"\xff\x00", Annotated[bytes, encode])


def test_a_text_that_looks_like_a_secret_is_a_text() -> None:
    assert write(["**********", "NaT"]) == '["**********","NaT"]'
    assert write(["**********"], list[str]) == '["**********"]'


@pytest.mark.parametrize("annotation", [int, list[int], dict[str, float | None], tuple[str, ...], dt.date, JsonValue])
def test_a_value_of_plain_types_is_not_read_again(annotation: object) -> None:
    assert is_lossless(make_adapter(annotation)) or annotation is JsonValue


@pytest.mark.skipif(
    "pandas" not in sys.modules and not __import__("importlib.util").util.find_spec("pandas"),
    reason="pandas is not installed: `pip install pandas` un-skips it",
)
def test_the_real_things_of_pandas_and_numpy_are_named() -> None:
    pandas: ModuleType = __import__("pandas")
    frame = pandas.DataFrame({"n": [1], "day": [pandas.NaT]})
    for value, message in [
        (frame, "it is a pandas.DataFrame, which"),
        ([{"day": pandas.NaT}], "[0].day is pandas' NaT, which"),
        ([pandas.NA], "[0] is pandas' <NA>, which"),
        ({"n": frame["n"].iloc[0]}, "n is a numpy.int64, which JSON has no form for: return its Python value, .item()"),
        ({"n": frame["n"].to_numpy()}, "n is a numpy.ndarray, which"),
        ([float("nan")], "[0] is nan, which"),
    ]:
        with pytest.raises(UnstorableError) as refused:
            write(value)
        assert str(refused.value).startswith(message)
    assert write(frame[["n"]].to_dict("records")) == '[{"n":1}]'


class Piece(BaseModel):
    name: str


class DatedPiece(Piece):
    due: str


class Pair(NamedTuple):
    piece: Piece


class Box(BaseModel):
    tags: Sequence[str] = ()


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Sequence[Piece], [DatedPiece(name="a", due="noon")]),
        (Iterable[Piece], [DatedPiece(name="a", due="noon")]),
        (Pair, Pair(DatedPiece(name="a", due="noon"))),
    ],
    ids=str,
)
def test_a_subclass_is_not_cut_down_in_any_kind_of_sequence(annotation: Any, value: Any) -> None:
    with pytest.raises(UnstorableError, match="DatedPiece"):
        write_result(value, TypeAdapter(find_collected(annotation)))


@pytest.mark.parametrize(
    ("annotation", "value", "written"),
    [(Sequence[str], ("a", "b"), ["a", "b"]), (Box, Box(), {"tags": []}), (Sequence[str], ["a"], ["a"])],
    ids=str,
)
def test_a_tuple_that_is_a_sequence_is_stored_as_a_list(annotation: Any, value: Any, written: object) -> None:
    assert json.loads(write_result(value, TypeAdapter(annotation))) == written
