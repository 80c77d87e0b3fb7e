"""Reads and writes JSON that other programs understand."""

import json
from typing import Any, NoReturn

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from pgflow_prefect.errors import NotRetriableError


def check_json(body: bytes) -> str:
    """Return the text of a JSON document unchanged, so that no number loses a digit in Python.

    Raises:
        ValueError: it is not JSON; NaN and Infinity are not.
    """
    text = body.decode("utf-8-sig")  # RFC 8259: UTF-8, and a reader may ignore a byte order mark
    try:
        # Numbers stay text, because Python refuses valid integers of thousands of digits.
        json.loads(text, parse_constant=_refuse, parse_int=str, parse_float=str)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return text


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def check_size(body: bytes, limit: int, step_slug: str, place: str) -> None:
    """Refuse to send a message that is too large.

    Args:
        body: JSON.
        limit: in bytes.
        step_slug: the step whose input it is.
        slot: where it would be sent, for people.

    Raises:
        NotRetriableError: the message is larger than the limit.
    """
    if len(body) > limit:
        raise NotRetriableError(
            f"step {step_slug!r}: the message for {place} has {len(body):,} bytes, more than the limit of {limit:,} "
            "(PGFLOW_RESULT_LIMIT): store the data elsewhere and send its address"
        )


def dump(value: Any, adapter: TypeAdapter[Any] | None) -> str:  # noqa: ANN401  any value
    """Return a value as JSON text by its annotation; without one, in pydantic's form.

    Raises:
        PydanticSerializationError: pydantic has no form for it.
        ValueError: JSON has none.
    """
    if adapter is None:
        return write_json(to_jsonable_python(value, inf_nan_mode="constants"))
    return write_json(adapter.dump_python(value, mode="json", by_alias=True, round_trip=True, warnings=False))


def write_json(plain: Any, *, sort_keys: bool = False) -> str:  # noqa: ANN401
    """Return plain data as standard JSON; pydantic would write NaN as null, and hide a wrong number.

    Raises:
        TypeError: it is not plain.
        ValueError: JSON has no form for a number.
    """
    return json.dumps(plain, allow_nan=False, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys)
