"""Finds parts of a value without an equal form in JSON: their place, and what to do."""

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import fields, is_dataclass
from decimal import Decimal
from typing import Any

from pydantic import BaseModel, SecretBytes, SecretStr
from pydantic.types import Secret
from pydantic_core import PydanticSerializationError, to_jsonable_python

Found = tuple[str, str]
"""A place within a value, such as `[1].price`, and what is wrong there."""

PLAIN = (str, int, float, bool, type(None))
"""JSON's own types without parts."""

SECRETS = (SecretStr, SecretBytes, Secret)

DEEPEST = 300
"""The greatest depth of a value that is searched; PostgreSQL stores 200 levels by default."""

_LONGEST_INTEGER = 14_280
"""Bits of an integer with 4,300 digits, the most that Python writes."""

_NONE = "which JSON has no form for"

_OR_STORAGE = (
    'or keep the result in a storage, by result_storage= and result_serializer="pickle": `pgflow-prefect guide results`'
)


class _Circle:
    """Stands for a value that contains itself."""


def find_unstorable(value: Any) -> Iterator[Found]:  # noqa: ANN401  any value
    """Yield the parts without a form in JSON, with the advice, but without any value."""
    for place, each in _walk(value):
        for explain in _EXPLANATIONS:
            if (reason := explain(each)) is not None:
                yield place, reason
                break


def find_secrets(value: Any) -> Iterator[Found]:  # noqa: ANN401
    """Yield pydantic's secrets, whose JSON is stars."""
    for place, each in _walk(value):
        if isinstance(each, SECRETS):
            yield (
                place,
                f"is a {type(each).__name__}, for which JSON gets stars only: load the secret in the step that needs "
                "it, or return .get_secret_value() if it may stand in the database",
            )


def find_replaced(value: Any) -> Iterator[Found]:  # noqa: ANN401
    """Yield the parts that pydantic would silently change: clashing keys, and files, which become their lines."""
    yield from find_clashes(value)
    for place, each in _walk(value):
        if (reason := _explain_file(each)) is not None:
            yield place, reason


def find_clashes(value: Any) -> Iterator[Found]:  # noqa: ANN401
    """Yield the dictionaries with two keys that are one key in JSON, which would lose a value."""
    for place, each in _walk(value):
        if isinstance(each, Mapping) and not all(isinstance(key, str) for key in each):
            names: dict[str, Any] = {}
            for key in each:
                for name in {_name_key(key), _name_key_as_pydantic(key)}:
                    if names.setdefault(name, key) is not key:
                        yield place, f"has the keys {names[name]!r} and {key!r}, which are one key in JSON: use texts"


def _name_key(key: Any) -> str:  # noqa: ANN401
    """Return a key in the form of the json module."""
    try:
        return str(next(iter(json.loads(json.dumps({key: None})))))
    except TypeError:
        return _name_key_as_pydantic(key)


def _name_key_as_pydantic(key: Any) -> str:  # noqa: ANN401
    return str(next(iter(to_jsonable_python({key: None}))))


def list_fields(value: Any) -> list[str]:  # noqa: ANN401
    """Return the names of the fields of a model or a dataclass."""
    if isinstance(value, BaseModel):
        return [*type(value).model_fields, *(value.model_extra or {})]
    return [each.name for each in fields(value)]


def _walk(value: Any, place: str = "", above: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Yield a value and all its parts, each with its place.

    Raises:
        RecursionError: it is deeper than any value that can be stored.
    """
    if isinstance(value, PLAIN):
        yield place, value
        return
    if id(value) in above:
        yield place, _Circle()
        return
    if len(above) > DEEPEST:
        raise RecursionError
    yield place, value
    within = above | {id(value)}
    for name, each in list_parts(value):
        yield from _walk(each, f"{place}{name}", within)


def list_parts(value: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Yield the fields of an object, the values of a mapping, or the items of a collection, each with its place."""
    if isinstance(value, BaseModel) or (is_dataclass(value) and not isinstance(value, type)):
        yield from ((f".{name}", getattr(value, name, None)) for name in list_fields(value))
    elif isinstance(value, Mapping):
        yield from ((f".{name}", each) for name, each in value.items())
    elif isinstance(value, list | tuple | Set):
        yield from ((f"[{number}]", each) for number, each in enumerate(value))


def _name_kind(value: Any) -> str:  # noqa: ANN401
    kind = type(value)
    library = kind.__module__.partition(".")[0]
    return kind.__name__ if library in {"builtins", "__main__"} else f"{library}.{kind.__name__}"


def _explain_missing(value: Any) -> str | None:  # noqa: ANN401
    if type(value).__name__ not in {"NaTType", "NAType"}:
        return None
    return f"is pandas' {value!r}, {_NONE}: return None in its place"


def _explain_circle(value: Any) -> str | None:  # noqa: ANN401
    return f"contains itself, {_NONE}" if isinstance(value, _Circle) else None


def _explain_integer(value: Any) -> str | None:  # noqa: ANN401
    if not isinstance(value, int) or value.bit_length() <= _LONGEST_INTEGER:
        return None
    return "is an integer of more than 4,300 digits, which Python does not write: return a text, hex(…)"


def _explain_file(value: Any) -> str | None:  # noqa: ANN401
    if not isinstance(value, io.IOBase):
        return None
    return f"is an open file, {_NONE}: return what .read() returns, or the file's path"


def _explain_number(value: Any) -> str | None:  # noqa: ANN401
    if not isinstance(value, float | Decimal) or math.isfinite(value):
        return None
    return f"is {float(value)!r}, {_NONE}: return None in its place, or a text"


def _explain_bytes(value: Any) -> str | None:  # noqa: ANN401
    if not isinstance(value, bytes | bytearray):
        return None
    try:
        value.decode()
    except UnicodeDecodeError:
        return f"is binary bytes, {_NONE}: return base64.b64encode(…).decode(), {_OR_STORAGE}"
    return None


def _explain_table(value: Any) -> str | None:  # noqa: ANN401
    if type(value).__name__ != "DataFrame":
        return None
    return f"is a {_name_kind(value)}, {_NONE}: return its rows, frame.to_dict('records'), {_OR_STORAGE}"


def _explain_numpy(value: Any) -> str | None:  # noqa: ANN401
    if isinstance(value, PLAIN) or not callable(getattr(value, "tolist", None)):
        return None
    call = "tolist()" if getattr(value, "ndim", 1) else "item()"
    return f"is a {_name_kind(value)}, {_NONE}: return its Python value, .{call}, {_OR_STORAGE}"


def _explain_other(value: Any) -> str | None:  # noqa: ANN401
    if isinstance(value, (*PLAIN, dict, list, tuple, set, frozenset, BaseModel)) or is_dataclass(value):
        return None
    try:
        to_jsonable_python(value)
    except (PydanticSerializationError, ValueError, TypeError, AttributeError):
        return f"is a {_name_kind(value)}, {_NONE}: return texts, numbers, lists and dicts, {_OR_STORAGE}"
    return None


_EXPLANATIONS: tuple[Callable[[Any], str | None], ...] = (
    _explain_circle,
    _explain_missing,
    _explain_integer,
    _explain_number,
    _explain_file,
    _explain_bytes,
    _explain_table,
    _explain_numpy,
    _explain_other,
)
