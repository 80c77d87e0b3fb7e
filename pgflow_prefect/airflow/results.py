"""Return values of Airflow's tasks. Others have written them: they are data, and no name in them is imported."""

import json
from typing import Any, NoReturn

from pydantic import JsonValue

from pgflow_prefect.database.airflow.runs import MOST_BYTES, ReturnValue

_PICKLED = b"\x80"  # the first byte of every protocol that Airflow has used
_CLASS, _DATA = "__classname__", "__data__"
_ARRAYS = frozenset({"builtins.tuple", "builtins.set", "builtins.frozenset"})
_SHOWN = 100  # characters of a name in a note

NOT_READ = ReturnValue(is_json=True, size=-1, text=None)
"""Stands for a return value that the settings leave alone."""

MOST_TOGETHER = 64 * 1024 * 1024
"""The most bytes of return values that are read of a run at once, and some more."""

TOO_MUCH = ReturnValue(is_json=True, size=-2, text=None)
"""Stands for a return value of a run whose others are as many bytes already."""


def read_return_value(found: ReturnValue) -> tuple[str | None, str | None]:
    """Return the result of a step as JSON text, and a note for people: what is not as in Airflow.

    A value that can't be taken over has no text. Arrays of Python that JSON lacks become arrays.
    """
    if found is NOT_READ:
        return None, "its result was not copied: PGFLOW_AIRFLOW_RESULTS is false"
    if found is TOO_MUCH:
        return None, f"its result was not copied: others of its run have {MOST_TOGETHER:,} bytes already"
    if found.text is None or found.size > 2 * MOST_BYTES + 2:
        return None, f"its result has more than {MOST_BYTES:,} bytes: it was not copied"
    text, problem = (found.text, None) if found.is_json else _decode(found.text)
    if text is None:
        return None, problem
    if len(text.encode("utf-8", "replace")) > MOST_BYTES:
        return None, f"its result has more than {MOST_BYTES:,} bytes: it was not copied"
    return _unwrap_text(text) if f'"{_CLASS}"' in text else (text, None)


def _decode(digits: str) -> tuple[str | None, str | None]:
    """Return the JSON text of a column of bytes."""
    try:
        data = bytes.fromhex(digits.removeprefix("\\x"))
        if data.startswith(_PICKLED):
            return None, "its result is pickled: it was not copied"
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse, parse_int=str, parse_float=str)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # no half of a pair of surrogates
        is_stored = "\\u0000" not in json.dumps(value)
    except (ValueError, RecursionError):
        is_stored = False
    return (text, None) if is_stored else (None, "its result is no JSON that PostgreSQL stores: it was not copied")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _unwrap_text(text: str) -> tuple[str | None, str | None]:
    others: set[str] = set()
    try:
        value = _unwrap(json.loads(text), others)
        unwrapped = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None, "its result nests arrays and objects too deeply: it was not copied"
    if others:
        return unwrapped, f"its result is as Airflow has stored it: an object of {', '.join(sorted(others))[:_SHOWN]}"
    return unwrapped, None


def _unwrap(value: Any, others: set[str]) -> JsonValue:  # noqa: ANN401  a JSON value
    """Return a value without Airflow's wrappers of arrays; add the names of other wrappers."""
    if isinstance(value, list):
        return [_unwrap(each, others) for each in value]
    if not isinstance(value, dict):
        unwrapped: JsonValue = value
        return unwrapped
    data = value.get(_DATA)
    if value.get(_CLASS) in _ARRAYS and isinstance(data, list):
        return _unwrap(data, others)
    if isinstance(value.get(_CLASS), str):
        others.add(value[_CLASS])
    return {name: _unwrap(each, others) for name, each in value.items()}
