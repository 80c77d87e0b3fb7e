"""Reads pydantic's schema of an annotation, for each part of a value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

_SAFE = {
    *("bool", "date", "datetime", "decimal", "float", "int", "literal", "none", "str", "time", "timedelta", "uuid"),
    *("dict", "list", "nullable", "set", "frozenset", "tuple"),
}
"""Types whose values come back unchanged from JSON."""

_COLLECTIONS = {"list", "set", "frozenset", "tuple"}

_LISTS = {"list", "generator"}
"""Types under which a tuple may come back as a list: `Sequence` and `Iterable` accept both."""

_INNER = ("schema", "python_schema", "lax_schema", "items_schema", "values_schema", "keys_schema")
_CONTAINERS: dict[type, set[str]] = {list: {"list"}, tuple: {"tuple"}, set: {"set"}, frozenset: {"frozenset"}}


def is_lossless(adapter: TypeAdapter[Any]) -> bool:
    """Tell whether every value of an annotation comes back unchanged from JSON, so that no comparison is needed."""
    return _is_safe(adapter.core_schema)


def _is_safe(schema: Any) -> bool:  # noqa: ANN401  a dictionary of pydantic's
    if isinstance(schema, list):
        return all(map(_is_safe, schema))
    if schema["type"] not in _SAFE or "serialization" in schema:
        return False
    if schema["type"] == "dict" and "keys_schema" not in schema:  # two of its keys may be one in JSON
        return False
    if schema["type"] in _COLLECTIONS and "items_schema" not in schema:  # with items of any type, such as models
        return False
    return all(_is_safe(schema[name]) for name in _INNER if name in schema)


@dataclass(frozen=True)
class SchemaView:
    """The annotation of one place in a value.

    Attributes:
        schema: pydantic's; None if it is not known.
        definitions: by their references.
    """

    schema: Mapping[str, Any] | None
    definitions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: TypeAdapter[Any]) -> "SchemaView":
        """Return the view of the whole value."""
        schema: Mapping[str, Any] = adapter.core_schema
        if schema["type"] != "definitions":
            return cls(schema)
        return cls(schema["schema"], {each["ref"]: each for each in schema["definitions"]})

    @property
    def takes_anything(self) -> bool:
        """Whether the annotation allows any value here, as `Any` does."""
        return self.schema is not None and self.schema["type"] == "any"

    @property
    def takes_any_keys(self) -> bool:
        """Whether the annotation allows any keys of a dictionary; then they come back as their JSON."""
        return self.schema is not None and self.schema.get("keys_schema", {"type": "any"})["type"] == "any"

    @property
    def takes_lists_for_tuples(self) -> bool:
        """Whether the annotation is a sequence that may be a list or a tuple."""
        return self.schema is not None and self.schema["type"] in _LISTS

    def choose(self, value: Any) -> "SchemaView":  # noqa: ANN401
        """Return the view of this value, without wrappers; for a union, of the member that has the value."""
        schema = self.schema
        while schema is not None:
            kind = schema["type"]
            if kind == "definition-ref":
                schema = self.definitions.get(schema["schema_ref"])
            elif kind in {"union", "tagged-union"}:
                schema = self._choose_member(schema, value)
                if schema is None:
                    break
            elif kind in {"model", "dataclass", "model-fields", "dataclass-args"}:
                break
            elif kind == "chain":  # the last step makes the value, as of `Sequence`
                schema = schema["steps"][-1]
            elif inner := next((schema[name] for name in _INNER[:3] if name in schema), None):
                schema = inner
            else:
                break
        return self._view(schema)

    def field(self, name: str) -> "SchemaView":
        """Return the view of a field of a model, a dataclass or a typed dictionary."""
        schema = self.schema
        while schema is not None and schema["type"] != "definition-ref":
            if "fields" in schema and schema["type"] != "dataclass":  # which has the names of its fields only
                break
            schema = schema.get("schema")
        fields = (schema or {}).get("fields", {})
        by_name = fields if isinstance(fields, dict) else {each["name"]: each for each in fields}
        return self._view(by_name.get(name, {"type": "any"}))  # other fields of a model

    def value(self, name: str) -> "SchemaView":
        """Return the view of a value of a dictionary."""
        if self.schema is not None and "fields" in self.schema:
            return self.field(name)
        return self._view((self.schema or {}).get("values_schema"))

    def item(self, number: int) -> "SchemaView":
        """Return the view of an item of a list or a tuple; by default, it may be anything."""
        if self.schema is not None and self.schema["type"] == "named-tuple":
            return self._view(self.schema["fields"][number]["schema"])
        items = (self.schema or {}).get("items_schema")
        if isinstance(items, list):
            items = items[min(number, len(items) - 1)] if items else None
        elif items is None and self.schema is not None:
            items = {"type": "any"}
        return self._view(items)

    def _view(self, schema: Mapping[str, Any] | None) -> "SchemaView":
        return SchemaView(schema, self.definitions)

    def _choose_member(self, schema: Mapping[str, Any], value: Any) -> Mapping[str, Any] | None:  # noqa: ANN401
        choices = schema["choices"]
        members = [*choices.values()] if isinstance(choices, dict) else choices
        for each in members:
            member: Mapping[str, Any] = each[0] if isinstance(each, tuple) else each
            seen = self._view(member).choose(value).schema
            if seen is not None and _fits(seen, value):
                return seen
        return None


def _fits(schema: Mapping[str, Any], value: Any) -> bool:  # noqa: ANN401
    if "cls" in schema:
        return type(value) is schema["cls"]
    if isinstance(value, Mapping):
        return schema["type"] in {"dict", "typed-dict"}
    return schema["type"] in _CONTAINERS.get(type(value), {"any"})
