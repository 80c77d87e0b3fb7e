"""What goes into a handler and what comes out: checked by its annotations, and the same in every run."""

import datetime as dt
import logging
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import scalar_row
from pydantic import BaseModel, ConfigDict, Field, JsonValue, SecretStr
from typing_extensions import TypedDict

from pgflow_prefect.errors import ArgumentInvalidError, ResultInvalidError, UsageError
from pgflow_prefect.handlers.base import StepContext, StepExecution
from pgflow_prefect.handlers.python import PythonHandler
from pgflow_prefect.models import Claim, Status
from pgflow_prefect.raw_json import RawJson
from tests.conftest import Connection

pytestmark = pytest.mark.anyio

CONTEXT = StepContext(
    run_id=UUID(int=1), workflow_slug="campaign", step_slug="send", attempt=1, logger=logging.getLogger(__name__)
)


async def execute(function: Callable[..., Any], **upstream_results: JsonValue) -> str:
    payload = upstream_results.pop("payload", None)
    results = RawJson.of(upstream_results)
    claim = Claim(status=Status.PENDING, attempt=1, payload=RawJson.of(payload), upstream_results=results)
    result = await PythonHandler("send", function).execute(claim, tuple(upstream_results), StepExecution(CONTEXT))
    assert isinstance(result, str)
    return result


@pytest.fixture(scope="module")
def postgres(server_dsn: str) -> Iterator[Connection]:
    """Any database: what is tested is how jsonb keeps a value."""
    with psycopg.connect(server_dsn) as connection:
        yield connection


def produce(value: object, annotation: object) -> Callable[[], object]:
    """Return a handler that returns this value and is annotated so."""

    def send() -> object:
        return value

    send.__annotations__["return"] = annotation
    return send


class Recipient(BaseModel):
    name: str
    born: dt.date
    tags: set[str] = Field(default_factory=set)


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)

    at: dt.datetime
    id: UUID
    amount: Decimal
    parts: tuple[int, ...]


class Aliased(BaseModel):
    first_name: str = Field(alias="firstName")
    last_name: str = Field(validation_alias="lastIn", serialization_alias="lastIn")


@dataclass(frozen=True)
class Point:
    x: float
    y: float


class Pair(NamedTuple):
    left: int
    right: str


class Sent(TypedDict):
    count: int
    at: dt.datetime


class Colour(Enum):
    RED = "red"


SECRET = "hunter2"  # noqa: S105  not a real one
NOON = dt.datetime(2026, 7, 1, 12, 0, 0, 123456, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (None, None),
        (None, JsonValue),
        (None, int | None),
        ("snow ☃ and \u2028 lines", str),
        (2**70, int),
        (0.1 + 0.2, float),
        ({"nested": [1, {"two": None}]}, dict[str, Any]),
        ({1: "one"}, dict[int, str]),
        ({3, 1, 2}, set[int]),
        (frozenset({"a"}), frozenset[str]),
        ((1, "two"), tuple[int, str]),
        (NOON, dt.datetime),
        (dt.date(2026, 7, 1), dt.date),
        (dt.timedelta(days=1, microseconds=1), dt.timedelta),
        (UUID(int=7), UUID),
        (Decimal("1.10"), Decimal),
        (Path("a/b"), Path),
        (b"bytes", bytes),
        (Colour.RED, Colour),
        (Point(0.5, 1e300), Point),
        (Pair(1, "r"), Pair),
        (Sent(count=1, at=NOON), Sent),
        (Recipient(name="Zoë", born=dt.date(2000, 2, 29), tags={"x", "y"}), Recipient),
        ([Recipient(name="A", born=dt.date(2000, 1, 1))], list[Recipient]),
        (Strict(at=NOON, id=UUID(int=9), amount=Decimal("0.30"), parts=(1, 2)), Strict),
        (Aliased(firstName="Ada", lastIn="Lovelace"), Aliased),
    ],
)
async def test_a_value_is_the_same_to_the_next_step_in_a_first_run_and_in_a_resumed_one(
    postgres: Connection, value: object, annotation: object
) -> None:
    text = await execute(produce(value, annotation))
    stored = postgres.cursor(row_factory=scalar_row).execute("SELECT %s::jsonb", [text]).fetchone()
    taken = []

    def take(send: object) -> None:
        taken.append(send)

    take.__annotations__["send"] = annotation
    await execute(take, send=stored)
    assert taken == [value]
    assert type(taken[0]) is type(value)


async def test_without_annotations_a_value_is_what_its_json_says() -> None:
    def send(first, payload):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        return {"first": first, "at": NOON, "tags": (1, 2), "point": Point(1, 2), "born": payload}

    assert await execute(send, first=1.5, payload="2000-01-01") == (
        '{"first":1.5,"at":"2026-07-01T12:00:00.123456Z","tags":[1,2],"point":{"x":1.0,"y":2.0},"born":"2000-01-01"}'
    ).replace("1.0,", "1,").replace("2.0}", "2}")


async def test_an_argument_that_does_not_fit_names_step_argument_and_reason_but_not_the_value() -> None:
    def send(recipients: list[Recipient]) -> None: ...

    with pytest.raises(ArgumentInvalidError) as refused:
        await execute(send, recipients=[{"name": "Ada", "born": SECRET}, {"born": "2000-01-01"}])
    message = str(refused.value)
    assert message.startswith("step 'send': argument 'recipients' does not fit its annotation: ")
    assert "0.born: " in message
    assert "1.name: Field required" in message
    assert "http" not in message
    assert "\n" not in message
    assert SECRET not in "".join(traceback.format_exception(refused.value)), "it would be in Prefect's logs"


async def test_a_payload_that_does_not_fit_is_an_argument_that_does_not_fit() -> None:
    def send(payload: int) -> None: ...

    with pytest.raises(ArgumentInvalidError, match="argument 'payload'"):
        await execute(send, payload="many")


async def test_a_run_without_a_payload_gets_the_default_where_an_empty_object_does_not_fit() -> None:
    def send(payload: list[int] | None = None) -> bool:
        return payload is None

    assert await execute(send, payload={}) == "true"
    assert await execute(send, payload=[1]) == "false"
    with pytest.raises(ArgumentInvalidError):
        await execute(send, payload={"n": 1})


async def test_all_results_by_slug_are_checked_each() -> None:
    def send(upstream: Mapping[str, Annotated[int, Field(ge=0)]]) -> int:
        return sum(upstream.values())

    assert await execute(send, a=1, b=2) == "3"
    with pytest.raises(ArgumentInvalidError, match=r"argument 'upstream' .*: b: .* greater than or equal to 0"):
        await execute(send, a=1, b=-2)


async def test_a_result_that_does_not_fit_says_why_and_not_what() -> None:
    with pytest.raises(ResultInvalidError) as refused:
        await execute(produce({"name": SECRET}, Recipient))
    assert str(refused.value) == "step 'send': the result does not fit its annotation: born: Field required"
    assert SECRET not in "".join(traceback.format_exception(refused.value))


class float32:  # noqa: N801  as numpy has it
    """No number of Python's."""

    ndim = 0

    def tolist(self) -> float:
        return 1.5


float32.__module__ = "numpy"


async def test_a_result_of_numpy_that_does_not_fit_says_what_to_return() -> None:
    with pytest.raises(ResultInvalidError) as refused:
        await execute(produce([{"price": float32()}], list[dict[str, float]]))
    assert str(refused.value).startswith(
        "step 'send': the result does not fit its annotation: 0.price: Input should be a valid number: [0].price is a "
        "numpy.float32, which JSON has no form for: return its Python value, .item(), or keep the result in a storage"
    )


async def test_a_result_that_fits_is_stored_as_what_its_annotation_makes_of_it() -> None:
    assert await execute(produce("7", int)) == "7"


@pytest.mark.parametrize("annotation", [JsonValue, Any, float, list[float], dict[str, float], dict[str, Any], Point])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
async def test_a_number_that_json_has_not_is_refused_and_never_becomes_none(annotation: object, number: float) -> None:
    shapes: dict[Any, object] = {list[float]: [number], Point: Point(0, number)}
    value = shapes.get(annotation, {"n": number} if "dict" in str(annotation) else number)
    with pytest.raises(ResultInvalidError, match="step 'send': the result can't be stored as JSON"):
        await execute(produce(value, annotation))


@pytest.mark.parametrize("value", [object(), {"f": print}, b"\xff", {(1, 2): 3}.keys(), lambda: None])
async def test_a_result_that_is_no_json_is_refused(value: object) -> None:
    with pytest.raises(ResultInvalidError, match="step 'send'"):
        await execute(produce(value, Any))


async def test_a_result_that_contains_itself_is_refused() -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(ResultInvalidError, match="step 'send'"):
        await execute(produce(endless, Any))


async def test_a_secret_is_never_stored_as_stars() -> None:
    with pytest.raises(ResultInvalidError) as refused:
        await execute(produce({"token": SecretStr(SECRET)}, Any))
    assert str(refused.value).startswith(
        "step 'send': the result can't be stored as JSON: token is a SecretStr, for which"
    )
    assert SECRET not in "".join(traceback.format_exception(refused.value))


class NoSchema:
    """Nothing that pydantic knows how to check."""


def test_an_annotation_that_names_nothing_is_refused_before_anything_runs() -> None:
    def send(payload: "Undefined") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(UsageError) as refused:
        PythonHandler("send", send).check_annotations()
    assert str(refused.value) == (
        "the handler of step 'send' has an annotation that can't be used: name 'Undefined' is not defined"
    )


def test_an_annotation_that_can_t_be_checked_is_refused_before_anything_runs() -> None:
    def send(payload: NoSchema) -> None: ...

    with pytest.raises(UsageError, match=r"the handler of step 'send' .* can't be used: .*NoSchema"):
        PythonHandler("send", send).check_annotations()


def test_annotations_that_can_be_used_pass() -> None:
    def send(payload: Recipient, upstream: Mapping[str, int], context: StepContext) -> list[Point]:
        return []

    PythonHandler("send", send).check_annotations()
