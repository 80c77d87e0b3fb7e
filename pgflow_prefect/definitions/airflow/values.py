"""Values of a serialized DAG: plain JSON, and objects that name a type beside their value.

Source: `airflow.serialization.serialized_objects.BaseSerialization` of Airflow 2.11 and 3.3.
"""

import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TypeAlias

from pydantic import JsonValue

from pgflow_prefect.definitions.redaction import is_secret_name, redact, redact_text

Fields: TypeAlias = Mapping[str, JsonValue]

DEEPEST = 60
"""Lists and objects inside each other. Deeper ones are not written out."""

MOST_PARTS = 400
"""Members of lists and objects of one value that are written out."""

LONGEST_VALUE = 4_000
"""Characters of a value that are written out."""


def unwrap(value: JsonValue) -> JsonValue:
    """Return the value of a typed object, and any other value as it is."""
    if isinstance(value, dict) and "__type" in value:
        return value.get("__var")
    return value


def get_type(value: JsonValue) -> str | None:
    """Return the name of the type that a typed object has; None for a plain value."""
    name = value.get("__type") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None


def read_seconds(value: JsonValue) -> float | None:
    """Return the seconds of a duration; None for anything else."""
    number = unwrap(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
        return None
    return float(number)


def read_time(value: JsonValue) -> datetime | None:
    """Return the moment that a value counts in seconds since 1970; None for anything else."""
    seconds = read_seconds(value)
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return None


def read_text(value: JsonValue) -> str | None:
    """Return a text; None for anything else."""
    value = unwrap(value)
    return value if isinstance(value, str) else None


def read_names(value: JsonValue) -> list[str]:
    """Return the texts of a list, or of the keys of an object."""
    value = unwrap(value)
    if isinstance(value, dict | list):
        return [each for each in value if isinstance(each, str)]
    return []


def list_texts(value: JsonValue, depth: int = 0) -> Iterator[str]:
    """Yield each text in a value, keys left out."""
    value = unwrap(value)
    if isinstance(value, str):
        yield value
    elif depth < DEEPEST and isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from list_texts(each, depth + 1)


def write_value(name: str, value: JsonValue) -> str:
    """Return a value as Python source, without secrets, and cut where it is too long.

    Args:
        name: what it is called, which may say that it is a secret.
        value: as Airflow encodes it.
    """
    parts = _Parts()
    text = parts.write(redact(name, value), 0)
    if len(text) > LONGEST_VALUE:
        text = f"{text[:LONGEST_VALUE]}… ({len(text) - LONGEST_VALUE} characters more)"
    return text


def find_block(name: str, value: JsonValue) -> list[str] | None:
    """Return the lines of a text of several lines, without secrets; None for anything else, or a text that is long."""
    text = unwrap(value)
    if not isinstance(text, str) or "\n" not in text.strip() or len(text) > LONGEST_VALUE or is_secret_name(name):
        return None
    lines = redact_text(text).strip("\n").split("\n")
    is_plain = all(line.replace("\t", " ").isprintable() and '"""' not in line for line in lines)
    return [line.expandtabs(4).rstrip() for line in lines] if is_plain else None


class _Parts:
    """Writes one value, up to a number of parts."""

    def __init__(self) -> None:
        self._left = MOST_PARTS

    def write(self, value: JsonValue, depth: int) -> str:
        self._left -= 1
        if depth > DEEPEST or self._left < 0:
            return "…"
        name = get_type(value)
        if name is not None:
            assert isinstance(value, dict)
            return self._write_typed(name, value.get("__var"), depth)
        if isinstance(value, dict):
            return self._write_members(value, depth)
        if isinstance(value, list):
            return f"[{self._write_each(value, depth)}]"
        if isinstance(value, str):
            # In a docstring, three quotes would end it.
            return repr(value[: LONGEST_VALUE + 1]).replace('"' * 3, r"\x22" * 3)
        return repr(value)

    def _write_each(self, values: list[JsonValue], depth: int) -> str:
        written = [self.write(each, depth + 1) for each in values[: max(self._left, 0)]]
        return ", ".join(written + ["…"] * (len(written) < len(values)))

    def _write_members(self, value: Fields, depth: int) -> str:
        members = []
        for key, each in value.items():
            if self._left <= 0:
                members.append("…")
                break
            members.append(f"{key!r}: {self.write(each, depth + 1)}")
        return f"{{{', '.join(members)}}}"

    def _write_typed(self, name: str, value: JsonValue, depth: int) -> str:  # noqa: PLR0911  a line a type
        match name, value:
            case "dict", dict():
                return self._write_members(value, depth)
            case "set", list():
                return f"{{{self._write_each(value, depth)}}}" if value else "set()"
            case "tuple", list():
                return f"({self._write_each(value, depth)}{',' * (len(value) == 1)})"
            case "timedelta", int() | float():
                return f"timedelta(seconds={value!r})"
            case "datetime", int() | float() if moment := read_time(value):
                return f"datetime({moment.isoformat()})"
            case "xcomref", dict():
                return write_reference(value)
            case _:
                return f"<{name[:100]}: {self.write(value, depth + 1)}>"


def write_reference(value: Fields) -> str:
    """Return a reference to the result of another task, as Airflow's API writes it."""
    inner = value.get("arg") if isinstance(value.get("arg"), dict) else None
    if inner is not None:
        kind = read_text(value.get("type")) or "function"
        assert isinstance(inner, dict)
        return f"{write_reference(inner)}.{kind}(…)"
    task = read_text(value.get("task_id"))
    if task is None:
        return "<a result of another task>"
    key = read_text(value.get("key"))
    return f"<result of {task!r}>" if key in {None, "return_value"} else f"<result of {task!r}, key {key!r}>"
