"""Finds what a value loses when it is written as JSON and read again."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass

from pgflow_prefect.handlers.json_text import dump
from pgflow_prefect.handlers.schemas import SchemaView
from pgflow_prefect.handlers.unstorable import (
    PLAIN,
    SECRETS,
    Found,
    find_clashes,
    find_secrets,
    find_unstorable,
    list_fields,
    list_parts,
)

_PRIVATE = (
    "is a private attribute, which JSON leaves out, and it comes back as another value: make it a field, or return the "
    "model without it"
)
_NOT_READ = (
    "is a field with init=False, which is not read from JSON, and it comes back as another value: leave out "
    "init=False, or have __post_init__ find the value from the other fields"
)


def find_losses(before: Any, after: Any, schema: SchemaView) -> Iterator[Found]:  # noqa: ANN401  any value
    """Yield each place where something was lost, with a description.

    Under the annotation `Any`, only values without a JSON form count, and fields that a model leaves out of its JSON.

    Args:
        before: what was written.
        after: what was read.
        schema: of its annotation.
    """
    schema = schema.choose(before)
    if isinstance(before, SECRETS):
        if not _is_same(before, after):
            yield from find_secrets(before)
    elif schema.takes_anything:
        if not _is_same(before, after):  # pydantic writes null for a number that is none
            yield from find_unstorable(before)
            yield from find_clashes(before)
            yield from find_losses_in_models(before)
    elif is_dataclass(before) or isinstance(before, BaseModel):
        yield from _compare_fields(before, after, schema)
    elif isinstance(before, Mapping) and isinstance(after, Mapping):
        yield from _compare_mappings(before, after, schema)
    elif isinstance(before, list | tuple) and _are_sequences(before, after, schema):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _place(f"[{number}]", find_losses(one, other, schema.item(number)))
    elif not _is_same(before, after):
        yield "", _explain(before, after)


def find_losses_in_models(value: Any) -> Iterator[Found]:  # noqa: ANN401
    """Yield the fields that models in a value leave out of their JSON; other values are equal to their JSON."""
    adapters: dict[type, TypeAdapter[Any]] = {}
    for place, model in _find_models(value):
        kind = type(model)
        adapter = adapters[kind] = adapters.get(kind) or TypeAdapter(kind)
        with suppress(ValidationError):  # a step that reads it as such a model hears of that
            again = adapter.validate_json(dump(model, adapter))
            if not _is_same(model, again):
                yield from _place(place, find_losses(model, again, SchemaView.of(adapter)))


def _find_models(value: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Yield the outermost models of pydantic in a value, each with its place."""
    if isinstance(value, BaseModel) or is_pydantic_dataclass(type(value)):
        yield "", value
        return
    for name, each in list_parts(value):
        if not isinstance(each, PLAIN):
            yield from ((f"{name}{beneath}", found) for beneath, found in _find_models(each))


def _are_sequences(before: list[Any] | tuple[Any, ...], after: Any, schema: SchemaView) -> bool:  # noqa: ANN401
    """Tell whether two values are sequences of the same kind and length, to be compared item by item."""
    if type(before) is type(after):
        return len(before) == len(after)
    is_list_of_tuple = isinstance(before, tuple) and isinstance(after, list) and schema.takes_lists_for_tuples
    return is_list_of_tuple and len(before) == len(after)


def _compare_fields(before: Any, after: Any, schema: SchemaView) -> Iterator[Found]:  # noqa: ANN401
    if type(before) is not type(after):
        yield "", _explain(before, after)
        return
    computed = _find_computed(before)
    for name in list_fields(before):
        one, other = getattr(before, name, None), getattr(after, name, None)
        if name not in computed:
            yield from _place(f".{name}", find_losses(one, other, schema.field(name)))
        elif not _is_same(one, other):
            yield f".{name}", _NOT_READ
    if isinstance(before, BaseModel):
        for name in type(before).__private_attributes__:
            if not _is_same(getattr(before, name, None), getattr(after, name, None)):
                yield f".{name}", _PRIVATE


def _find_computed(value: Any) -> set[str]:  # noqa: ANN401
    """Return the fields of a dataclass that are not read: its own code sets them."""
    return set() if isinstance(value, BaseModel) else {each.name for each in fields(value) if not each.init}


def _compare_mappings(before: Mapping[Any, Any], after: Mapping[Any, Any], schema: SchemaView) -> Iterator[Found]:
    if clashes := [*find_clashes(before)]:
        yield from clashes
        return
    if schema.takes_any_keys and all(isinstance(each, str) for each in after):
        after = {name: after.get(text) for name, text in zip(before, after, strict=False)}
    if before.keys() != after.keys():
        yield "", "has keys that come back as others: use texts as keys"
        return
    for name, each in before.items():
        yield from _place(f".{name}", find_losses(each, after[name], schema.value(str(name))))


def _place(name: str, losses: Iterator[Found]) -> Iterator[Found]:
    yield from ((f"{name}{place}", reason) for place, reason in losses)


def _is_same(before: Any, after: Any) -> bool:  # noqa: ANN401
    """Compare by the values' own type; objects without a comparison are the same if their types are."""
    if isinstance(before, Iterator):  # it has been consumed
        return True
    own_comparison: object = type(before).__eq__
    if own_comparison is object.__eq__:
        return type(before) is type(after)
    try:
        return bool(before == after)
    except Exception:  # noqa: BLE001  a comparison of the user's
        return type(before) is type(after)


def _explain(before: Any, after: Any) -> str:  # noqa: ANN401
    if type(before) is type(after):
        return "comes back as another value: its annotation leaves something out on the way to JSON"
    return (
        f"is a {type(before).__name__} and comes back as a {type(after).__name__}: name what it is in the annotation, "
        "and tell the members of a union apart by a discriminator"
    )
