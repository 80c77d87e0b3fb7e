"""Compares the JSON schemas of two annotations: can a value of one be a value of the other?

In doubt they fit, because a user's validator or serializer may turn anything into anything.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from pydantic import AliasChoices, AliasPath, BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

Schema: TypeAlias = Mapping[str, Any]

_NUMBERS = frozenset({"integer", "number"})
_WORDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "an object",
}


class _Generator(GenerateJsonSchema):
    """Makes schemas that allow any value, `{}`, wherever code decides."""

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        return {} if self.mode == "validation" else super().function_before_schema(schema)

    def function_wrap_schema(self, schema: core_schema.WrapValidatorFunctionSchema) -> JsonSchemaValue:
        return {} if self.mode == "validation" else super().function_wrap_schema(schema)

    def function_plain_schema(self, schema: core_schema.PlainValidatorFunctionSchema) -> JsonSchemaValue:
        return {}

    def ser_schema(
        self, schema: "core_schema.SerSchema | core_schema.IncExSeqSerSchema | core_schema.IncExDictSerSchema"
    ) -> JsonSchemaValue | None:
        is_code = schema["type"] in {"function-plain", "function-wrap"}
        return {} if is_code and schema.get("return_schema") is None else super().ser_schema(schema)

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> JsonSchemaValue:
        return {"type": ["number", "string"]}  # a text, which every annotation of a number takes

    def json_schema(self, schema: core_schema.JsonSchema) -> JsonSchemaValue:
        return {}

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        if self.mode == "validation" and _has_several_names(schema["cls"]):
            return {}
        return super().model_schema(schema)

    def field_is_required(
        self, field: "core_schema.ModelField | core_schema.DataclassField | core_schema.TypedDictField", total: bool
    ) -> bool:
        # What has a default is written with it; only a typed dict may lack a key.
        if self.mode == "serialization" and field["type"] != "typed-dict-field":
            return "serialization_exclude_if" not in field
        return super().field_is_required(field, total)

    def handle_invalid_for_json_schema(self, schema: core_schema.CoreSchema, error_info: str) -> JsonSchemaValue:
        return {}


def _has_several_names(model: type[BaseModel]) -> bool:
    """Tell whether a field is found by more than the one name that its schema has."""
    by_name = model.model_config.get("populate_by_name") or model.model_config.get("validate_by_name")
    aliases = [each.validation_alias for each in model.model_fields.values()]
    return bool(by_name) or any(isinstance(alias, AliasChoices | AliasPath) for alias in aliases)


@dataclass(frozen=True)
class Shape:
    """The JSON that an annotation describes.

    Attributes:
        schema: a JSON schema.
        definitions: what it refers to, by name.
    """

    schema: Schema
    definitions: Mapping[str, Schema] = field(default_factory=dict, repr=False)

    def resolve(self) -> "Shape":
        """Return the schema that a reference names."""
        found, seen = self.schema, set[str]()
        while (name := str(found.get("$ref", "")).rpartition("/")[2]) and name not in seen:
            seen.add(name)
            found = self.definitions.get(name, {})  # a type of the user's may refer to anywhere
        return self.pick(found)

    def pick(self, schema: Any) -> "Shape":  # noqa: ANN401  true and false are schemas, too
        """Return a part of it."""
        return Shape(schema if isinstance(schema, Mapping) else {}, self.definitions)

    @property
    def alternatives(self) -> list["Shape"]:
        """The members of a union, or the schema itself."""
        schema = self.schema
        parts = schema.get("anyOf") or schema.get("oneOf")
        if parts is None and isinstance(schema.get("type"), list):
            parts = [{**schema, "type": each} for each in schema["type"]]
        if parts is None:
            return [self]
        return [each for part in parts for each in self.pick(part).resolve().alternatives]

    @property
    def type(self) -> str | None:
        """Its JSON type, or None if that is unknown."""
        if self.values is not None:
            kinds = {_find_type(value) for value in self.values}
            return kinds.pop() if len(kinds) == 1 else None
        found = self.schema.get("type")
        return str(found) if found in _WORDS else None

    @property
    def values(self) -> list[Any] | None:
        """All possible values, or None if they are not listed."""
        if "const" in self.schema:
            return [self.schema["const"]]
        found = self.schema.get("enum")
        return list(found) if found is not None else None

    @property
    def properties(self) -> Mapping[str, Any]:
        """The named properties of an object."""
        found: Mapping[str, Any] = self.schema.get("properties", {})
        return found

    @property
    def required(self) -> list[str]:
        """The required properties of an object, without those that pydantic computes."""
        known = self.properties
        return [
            name for name in self.schema.get("required", ()) if not self.pick(known.get(name)).schema.get("readOnly")
        ]

    @property
    def others(self) -> "Shape | None":
        """The schema of an object's further properties, or None if it has none."""
        found = self.schema.get("additionalProperties", not self.properties)
        return None if found is False else self.pick(found)


def make_shape(annotation: Any, mode: Literal["validation", "serialization"]) -> Shape:  # noqa: ANN401  any there is
    """Return the JSON that an argument or a result of this annotation has.

    Args:
        annotation: or an adapter that was made of it.
        mode: `validation` for what is taken, `serialization` for what is returned.
    """
    try:
        adapter = annotation if isinstance(annotation, TypeAdapter) else TypeAdapter(annotation)
        schema = adapter.json_schema(mode=mode, by_alias=True, schema_generator=_Generator)
    except Exception:  # noqa: BLE001  it has no schema, or a type of the user's, which makes its own, raises anything
        return Shape({})
    return Shape(schema, schema.get("$defs", {})).resolve()


def make_array(shape: Shape) -> Shape:
    """Return the shape of an array of values of a shape."""
    return Shape({"type": "array", "items": shape.schema}, shape.definitions)


def make_object(parts: Mapping[str, Shape]) -> Shape:
    """Return the shape of an object that has exactly these properties."""
    definitions: dict[str, Schema] = {}
    properties: dict[str, Schema] = {}
    for number, (name, part) in enumerate(parts.items()):
        prefix = f"{number}:"  # two annotations may have different types of one name
        definitions |= {f"{prefix}{known}": _rename(schema, prefix) for known, schema in part.definitions.items()}
        properties[name] = _rename(part.schema, prefix)
    schema = {"type": "object", "properties": properties, "required": [*parts], "additionalProperties": False}
    return Shape(schema, definitions)


def _rename(schema: Any, prefix: str) -> Any:  # noqa: ANN401  any JSON value
    """Return a schema whose references have a prefix."""
    if isinstance(schema, Mapping):
        return {
            key: f"{prefix}{str(value).rpartition('/')[2]}" if key == "$ref" else _rename(value, prefix)
            for key, value in schema.items()
            if key != "$defs"
        }
    return [_rename(each, prefix) for each in schema] if isinstance(schema, list) else schema


def find_misfit(produced: Shape, accepted: Shape) -> str | None:
    """Return the reason why no value of one shape fits another, or None if one may fit.

    An empty list fits any list: it counts for nothing.
    """
    return _Comparison().find(produced, accepted, ())


_Place: TypeAlias = tuple[str, ...]


class _Comparison:
    """One comparison. It looks at each pair of parts once, so it also ends for recursive types."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], str | None] = {}
        self._kept: list[Shape] = []  # an id belongs to another object as soon as its own is gone

    def find(self, produced: Shape, accepted: Shape, place: _Place) -> str | None:
        produced, accepted = produced.resolve(), accepted.resolve()
        if not produced.schema or not accepted.schema:
            return None
        pair = (id(produced.schema), id(accepted.schema))
        if pair not in self._known:
            self._known[pair] = None  # as long as it is looked at
            self._kept += [produced, accepted]
            self._known[pair] = self._look(produced, accepted, place)
        return self._known[pair]

    def _look(self, produced: Shape, accepted: Shape, place: _Place) -> str | None:
        first = None
        for one in produced.alternatives:
            for other in accepted.alternatives:
                why = self._compare(one, other, place)
                if why is None:
                    return None
                first = first or why
        return first

    def _compare(self, produced: Shape, accepted: Shape, place: _Place) -> str | None:
        kind, wanted = produced.type, accepted.type
        if kind is None or wanted is None or not _may_become(kind, wanted, accepted):
            return None if kind is None or wanted is None else _say(place, _WORDS[kind], _WORDS[wanted])
        if produced.values is not None and accepted.values is not None:
            if any(value in accepted.values for value in produced.values):
                return None
            return _say(place, _list(produced.values), _list(accepted.values))
        if kind == wanted == "object":
            return self._compare_objects(produced, accepted, place)
        return self._compare_arrays(produced, accepted, place) if kind == wanted == "array" else None

    def _compare_objects(self, produced: Shape, accepted: Shape, place: _Place) -> str | None:
        return next(self._find_property_misfits(produced, accepted, place), None)

    def _find_property_misfits(self, produced: Shape, accepted: Shape, place: _Place) -> Iterator[str]:
        always, wanted = set(produced.required), set(accepted.required)
        for name in wanted - produced.properties.keys():
            if produced.others is None:
                yield f"it has no {'.'.join((*place, name))!r}"
            elif why := self.find(produced.others, accepted.pick(accepted.properties.get(name)), (*place, name)):
                yield why
        for name in produced.properties:
            if name not in always | wanted:
                continue  # it may be left out
            if name not in accepted.properties and accepted.schema.get("additionalProperties") is False:
                yield f"its {'.'.join((*place, name))!r} is not taken"
            taken = accepted.properties.get(name, accepted.schema.get("additionalProperties"))
            if why := self.find(produced.pick(produced.properties[name]), accepted.pick(taken), (*place, name)):
                yield why
        rest = (produced.others, accepted.others)
        if rest[0] is not None and rest[1] is not None and (why := self.find(rest[0], rest[1], (*place, "*"))):
            yield why

    def _compare_arrays(self, produced: Shape, accepted: Shape, place: _Place) -> str | None:
        least, most = produced.schema.get("minItems", 0), produced.schema.get("maxItems")
        wanted, limit = accepted.schema.get("minItems", 0), accepted.schema.get("maxItems")
        if (limit is not None and least > limit) or (most is not None and most < wanted):
            where = f"its {'.'.join(place)!r}" if place else "it"
            return f"{where} is {_count(least, most)} long here and {_count(wanted, limit)} there"
        first, second = produced.schema.get("prefixItems", []), accepted.schema.get("prefixItems", [])
        for number in range(max(len(first), len(second))):
            one = first[number] if number < len(first) else produced.schema.get("items")
            other = second[number] if number < len(second) else accepted.schema.get("items")
            if why := self.find(produced.pick(one), accepted.pick(other), (*place, str(number))):
                return why
        rest = (produced.pick(produced.schema.get("items")), accepted.pick(accepted.schema.get("items")))
        return self.find(*rest, (*place, "*"))


def _may_become(kind: str, wanted: str, accepted: Shape) -> bool:
    """Tell whether pydantic accepts a value of one JSON type for another."""
    if kind == wanted:
        return True
    if wanted in _NUMBERS:
        return kind in _NUMBERS or kind == "boolean"
    if wanted == "boolean":
        return kind in _NUMBERS
    if wanted == "string":  # a moment may be a number of seconds
        return kind in _NUMBERS and "format" in accepted.schema
    return wanted == "array" and kind == "object" and "prefixItems" in accepted.schema  # a named tuple


def _find_type(value: object) -> str:
    kinds: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return kinds.get(type(value), "array" if isinstance(value, list) else "object")


def _say(place: _Place, one: str, other: str) -> str:
    where = f"its {'.'.join(place)!r}" if place else "it"
    return f"{where} is {one} here and {other} there"


def _list(values: list[Any]) -> str:
    return " or ".join(map(repr, values[:5])) + (" or …" if len(values) > 5 else "")  # noqa: PLR2004  enough to see


def _count(least: int, most: int | None) -> str:
    if least == most:
        return f"{least} items"
    return f"{least} items or more" if most is None else f"{least} to {most} items"
