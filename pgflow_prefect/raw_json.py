"""JSON that passes through Python as text: it is read only where a handler asks for it, and no number loses a digit."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from pydantic import GetCoreSchemaHandler, JsonValue
from pydantic_core import CoreSchema, core_schema

_SHORTEST_UNREADABLE = 640
"""Digits that Python reads in any case: `sys.set_int_max_str_digits` takes no fewer."""

_scan_name = json.decoder.scanstring  # type: ignore[attr-defined]  # it is there, and typeshed does not say so
_SPACE = re.compile(r"[ \t\n\r]*")
_SCANNER = json.JSONDecoder(parse_int=str, parse_float=str)


class UnreadableJsonError(ValueError):
    """A JSON document that Python can't read. The message says why, and has nothing of the document."""


def load_json(document: str | bytes) -> Any:  # noqa: ANN401  a JSON value
    """Return what a JSON document means.

    jsonb holds what Python does not read: numbers of thousands of digits, and a thousand arrays in one another.

    Raises:
        UnreadableJsonError: this is such a document.
    """
    return _load(document, json.loads)


def _load(document: str | bytes, load: Callable[[str | bytes], Any]) -> Any:  # noqa: ANN401
    try:
        return load(document)
    except RecursionError:
        raise UnreadableJsonError("a JSON value nests arrays and objects too deeply to be read") from None
    except ValueError as error:
        if len(document) < _SHORTEST_UNREADABLE:
            raise UnreadableJsonError(f"a JSON value can't be read: {error}") from None
        raise UnreadableJsonError("a JSON value has a number of too many digits to be read") from None


@dataclass(frozen=True, slots=True)
class RawJson:
    """A JSON document that was not read.

    Attributes:
        text: the document.
    """

    text: str

    @classmethod
    def of(cls, value: JsonValue) -> "RawJson":
        """Return the document of a value that is plain JSON already."""
        return cls(json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")))

    def decode(self) -> JsonValue:
        """Return what the document means: a number with a point is a float.

        Raises:
            UnreadableJsonError: Python can't read it.
        """
        value: JsonValue = load_json(self.text)
        return value

    def split(self) -> "dict[str, RawJson]":
        """Return the members of the document, which is an object, by name.

        Raises:
            UnreadableJsonError: Python can't read it.
        """
        members: dict[str, RawJson] = _load(self.text, _split)
        return members

    def __str__(self) -> str:
        return self.text

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:  # noqa: ANN401
        return core_schema.no_info_plain_validator_function(
            _take, serialization=core_schema.plain_serializer_function_ser_schema(_show, info_arg=True)
        )


def _take(value: object) -> RawJson:
    if isinstance(value, RawJson):
        return value
    if isinstance(value, str):
        return RawJson(value)
    raise ValueError("this is no text of a JSON document")


def _show(raw: RawJson, info: Any) -> Any:  # noqa: ANN401  pydantic's
    return info.context.load(raw) if isinstance(info.context, ExactNumbers) else raw.decode()


def _split(document: str | bytes) -> dict[str, RawJson]:
    assert isinstance(document, str)
    members: dict[str, RawJson] = {}
    place = _skip(document, 0)
    if document[place : place + 1] != "{":
        raise ValueError("it is no object")
    place = _skip(document, place + 1)
    while document[place : place + 1] == '"':
        name, place = _scan_name(document, place + 1)
        begin = _skip(document, _skip(document, place) + 1)  # behind the colon
        _, end = _SCANNER.raw_decode(document, begin)
        members[name] = RawJson(document[begin:end])
        place = _skip(document, _skip(document, end) + 1)  # behind the comma, or the end
    return members


def split_array(document: RawJson) -> "list[RawJson] | None":
    """Return the elements of a document that is an array; None for any other document.

    Raises:
        UnreadableJsonError: Python can't read it.
    """
    elements: list[RawJson] | None = _load(document.text, _split_array)
    return elements


def _split_array(document: str | bytes) -> list[RawJson] | None:
    assert isinstance(document, str)
    place = _skip(document, 0)
    if document[place : place + 1] != "[":
        return None
    elements: list[RawJson] = []
    place = _skip(document, place + 1)
    while document[place : place + 1] not in ("]", ""):
        _, end = _SCANNER.raw_decode(document, place)
        elements.append(RawJson(document[place:end]))
        place = _skip(document, end)
        place = _skip(document, place + 1) if document[place : place + 1] == "," else place
    return elements


def _skip(document: str, place: int) -> int:
    found = _SPACE.match(document, place)
    return place if found is None else found.end()


def write_object(members: dict[str, RawJson]) -> RawJson:
    """Return an object of documents: only its names are written anew."""
    written = (f"{json.dumps(name, ensure_ascii=False)}:{value.text}" for name, value in members.items())
    return RawJson(f"{{{','.join(written)}}}")


class ExactNumbers:
    """Documents that are printed within other JSON: the numbers that a float would change keep their digits."""

    def __init__(self) -> None:
        self._mark = f"number {uuid4().hex} "  # in no document
        self._texts: list[str] = []

    def load(self, raw: RawJson) -> Any:  # noqa: ANN401  a JSON value
        """Return what a document means, with placeholders for the numbers that `restore` writes."""
        return _load(raw.text, lambda text: json.loads(text, parse_float=self._read_float, parse_int=self._read_int))

    def restore(self, printed: str) -> str:
        """Return printed JSON with the numbers in the place of their placeholders."""
        if not self._texts:
            return printed
        return re.sub(f'"{self._mark}(\\d+)"', lambda found: self._texts[int(found[1])], printed)

    def _read_float(self, text: str) -> float | str:
        value = float(text)
        return value if repr(value) == text else self._hold(text)

    def _read_int(self, text: str) -> int | str:
        return int(text) if len(text) < _SHORTEST_UNREADABLE else self._hold(text)

    def _hold(self, text: str) -> str:
        self._texts.append(text)
        return f"{self._mark}{len(self._texts) - 1}"
