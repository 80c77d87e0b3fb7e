"""What pydantic's schema of an annotation says of the parts of a value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

_SAFE = {
    *("bool", "date", "datetime", "decimal", "float", "int", "literal", "none", "str", "time", "timedelta", "uuid"),
    *("dict", "list", "nullable", "set", "frozenset", "tuple"),
}
"""What comes back from JSON as it was."""

_COLLECTIONS = {"list", "set", "frozenset", "tuple"}

_LISTS = {"list", "generator"}
"""What a tuple may come back as a list of: `Sequence` and `Iterable` make no difference between the two."""

_INNER = ("schema", "python_schema", "lax_schema", "items_schema", "values_schema", "keys_schema")
_CONTAINERS: dict[type, set[str]] = {list: {"list"}, tuple: {"tuple"}, set: {"set"}, frozenset: {"frozenset"}}


def is_lossless(adapter: TypeAdapter[Any]) -> bool:
    """Tell whether every value that fits an annotation comes back from JSON as it was: there is nothing to compare."""
    return _is_safe(adapter.core_schema)


def _is_safe(schema: Any) -> bool:  # noqa: ANN401  a dictionary of pydantic's
    if isinstance(schema, list):
        return all(map(_is_safe, schema))
    if schema["type"] not in _SAFE or "serialization" in schema:
        return False
    if schema["type"] == "dict" and "keys_schema" not in schema:  # of any keys, of which two may be one in JSON
        return False
    if schema["type"] in _COLLECTIONS and "items_schema" not in schema:  # of any items, such as models
        return False
    return all(_is_safe(schema[name]) for name in _INNER if name in schema)


@dataclass(frozen=True)
class SchemaView:
    """What the annotation says of one place in a value.

    Attributes:
        schema: pydantic's; None where it is not known.
        definitions: by their references.
    """

    schema: Mapping[str, Any] | None
    definitions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: TypeAdapter[Any]) -> "SchemaView":
        """Return what an annotation says of the whole value."""
        schema: Mapping[str, Any] = adapter.core_schema
        if schema["type"] != "definitions":
            return cls(schema)
        return cls(schema["schema"], {each["ref"]: each for each in schema["definitions"]})

    @property
    def takes_anything(self) -> bool:
        """Whether the annotation says nothing here, as `Any` does."""
        return self.schema is not None and self.schema["type"] == "any"

    @property
    def takes_any_keys(self) -> bool:
        """Whether the annotation says nothing of the keys of a dictionary: they are what their JSON says."""
        return self.schema is not None and self.schema.get("keys_schema", {"type": "any"})["type"] == "any"

    @property
    def takes_lists_for_tuples(self) -> bool:
        """Whether the annotation names a sequence, and leaves open whether that is a list or a tuple."""
        return self.schema is not None and self.schema["type"] in _LISTS

    def choose(self, value: Any) -> "SchemaView":  # noqa: ANN401
        """Return what it says of this value: without wrappers, and of a union the member that the value is one of."""
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
        """Return what it says of a field of a model, a dataclass or a typed dictionary."""
        schema = self.schema
        while schema is not None and schema["type"] != "definition-ref":
            if "fields" in schema and schema["type"] != "dataclass":  # which has the names of its fields only
                break
            schema = schema.get("schema")
        fields = (schema or {}).get("fields", {})
        by_name = fields if isinstance(fields, dict) else {each["name"]: each for each in fields}
        return self._view(by_name.get(name, {"type": "any"}))  # what else a model has

    def value(self, name: str) -> "SchemaView":
        """Return what it says of a value of a dictionary."""
        if self.schema is not None and "fields" in self.schema:
            return self.field(name)
        return self._view((self.schema or {}).get("values_schema"))

    def item(self, number: int) -> "SchemaView":
        """Return what it says of an item of a list or a tuple; without a word of it, it is anything."""
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
