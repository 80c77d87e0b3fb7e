"""Reads JSON text according to an annotation. A `Decimal` gets every digit.

pydantic alone reads a number with a point as a float and makes the Decimal from it. Then 12345678901234567.89 becomes
12345678901234568, and 1.10 becomes 1.1.
"""

import json
from contextvars import ContextVar
from decimal import Decimal, InvalidOperation
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import SchemaValidator

_texts: ContextVar[dict[float, str]] = ContextVar("_texts")
"""The numbers of the current document, by their value as a float."""

_NO_SCHEMAS = frozenset({"metadata", "serialization", "default", "expected", "cls", "config"})
"""The parts of a schema of pydantic that have no schemas in them."""


class _ExactFloat(float):
    """A float that prints its original text, so that pydantic makes the exact Decimal."""

    __slots__ = ("text",)

    def __new__(cls, text: str) -> "_ExactFloat":
        made = super().__new__(cls, text)
        made.text = text
        return made

    text: str

    def __str__(self) -> str:
        return self.text


class ValueReader:
    """Reads values of one annotation.

    Attributes:
        adapter: of the annotation.
    """

    def __init__(self, adapter: TypeAdapter[Any]) -> None:
        self.adapter = adapter

    @property
    def has_decimals(self) -> bool:
        """Whether the annotation contains a Decimal."""
        return self._exact is not None

    def read(self, text: str) -> Any:  # noqa: ANN401  whatever the annotation says
        """Return the value of JSON text, according to the annotation.

        Raises:
            ValidationError: it does not fit.
        """
        if self._exact is None:
            return self.adapter.validate_json(text)
        found: dict[float, set[str]] = {}
        try:
            json.loads(text, parse_float=lambda number: found.setdefault(float(number), set()).add(number))
        except (ValueError, RecursionError):
            return self.adapter.validate_json(text)  # it says what is wrong
        if all(repr(value) in texts and len(texts) == 1 for value, texts in found.items()):
            return self.adapter.validate_json(text)  # no float would change a digit
        if any(len({*map(Decimal, texts)}) > 1 for texts in found.values()):
            # Two numbers have the same float, so each has to keep its own digits.
            return self.adapter.validate_python(json.loads(text, parse_float=_ExactFloat))
        token = _texts.set({value: max(texts, key=len) for value, texts in found.items()})
        try:
            return self._exact.validate_json(text)
        finally:
            _texts.reset(token)

    @cached_property
    def _exact(self) -> SchemaValidator | None:
        """The validator that finds the digits of Decimals, or None if the annotation has none."""
        schema = self.adapter.core_schema
        return _make_validator(_replace_decimals(schema, strict=False)) if _has_decimal(schema) else None


def _make_validator(schema: Any) -> SchemaValidator:  # noqa: ANN401  a schema of pydantic
    try:
        # Not the existing validators of models, which don't do this.
        return SchemaValidator(schema, None, _use_prebuilt=False)
    except TypeError:  # pydantic before 2.11 has no others
        return SchemaValidator(schema, None)


def _has_decimal(schema: Any) -> bool:  # noqa: ANN401
    if isinstance(schema, list | tuple):
        return any(map(_has_decimal, schema))
    if not isinstance(schema, dict):
        return False
    parts = (part for name, part in schema.items() if name not in _NO_SCHEMAS)
    return schema.get("type") == "decimal" or any(map(_has_decimal, parts))


def _replace_decimals(schema: Any, *, strict: bool) -> Any:  # noqa: ANN401
    """Return a schema of pydantic in which each Decimal is looked up before it is checked."""
    if isinstance(schema, list | tuple):
        return type(schema)(_replace_decimals(each, strict=strict) for each in schema)
    if not isinstance(schema, dict):
        return schema
    strict = bool(schema.get("strict", (schema.get("config") or {}).get("strict", strict)))
    if schema.get("type") == "decimal":
        find = _find_strictly if strict else _find
        return {"type": "function-before", "function": {"type": "no-info", "function": find}, "schema": schema}
    return {
        name: part if name in _NO_SCHEMAS else _replace_decimals(part, strict=strict) for name, part in schema.items()
    }


def _find(value: object) -> object:
    """Return the Decimal of a number, and any other value unchanged."""
    text = _texts.get().get(value) if type(value) is float else None
    return value if text is None else Decimal(text)


def _find_strictly(value: object) -> object:
    """Return the Decimal of a number or a text, the only values in JSON that a strict Decimal accepts."""
    found = _find(value)
    if type(found) in (int, float, str):
        try:
            return Decimal(str(found))
        except InvalidOperation:
            return found
    return found


def explain(error: ValidationError) -> str:
    """Return pydantic's reasons on one line, without links, and without the value, which may be secret."""
    reasons = []
    for detail in error.errors(include_url=False, include_input=False):
        place = ".".join(map(str, detail["loc"]))
        reasons.append(f"{place}: {detail['msg']}" if place else detail["msg"])
    return "; ".join(reasons)
