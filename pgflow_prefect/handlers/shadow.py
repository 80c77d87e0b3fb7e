"""Compares a handler's result with the result that the external worker reported."""

import json
from collections.abc import Iterator
from decimal import Decimal
from itertools import islice

from pgflow_prefect.raw_json import RawJson

DIFFERENCES_SHOWN = 20
"""No reader looks at more differences."""


def find_differences(theirs: RawJson, ours: RawJson) -> list[str]:
    """Return the places where two results differ, as JSON paths such as `$.items[3].price`.

    It returns no values, because the values of a shadow are stored nowhere. Numbers compare as in jsonb, with every
    digit: 1 is 1.0, and 1.1 is 1.10.
    """
    return list(islice(_compare("$", _load(theirs), _load(ours)), DIFFERENCES_SHOWN))


def _load(raw: RawJson) -> object:
    """Return a JSON value whose numbers are exact."""
    value: object = json.loads(raw.text, parse_int=Decimal, parse_float=Decimal)
    return value


def _compare(path: str, theirs: object, ours: object) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in sorted(theirs.keys() | ours.keys()):
            if name not in ours:
                yield f"{path}.{name}: missing from the shadow's result"
            elif name not in theirs:
                yield f"{path}.{name}: in the shadow's result only"
            else:
                yield from _compare(f"{path}.{name}", theirs[name], ours[name])
    elif isinstance(theirs, list) and isinstance(ours, list):
        for place, (their, our) in enumerate(zip(theirs, ours, strict=False)):
            yield from _compare(f"{path}[{place}]", their, our)
        if len(theirs) != len(ours):
            yield f"{path}: {len(ours)} elements instead of {len(theirs)}"
    elif isinstance(theirs, bool) is not isinstance(ours, bool) or theirs != ours:
        yield (
            f"{path}: another {_kind(theirs)}"
            if _kind(theirs) == _kind(ours)
            else (f"{path}: {_kind(ours)} instead of {_kind(theirs)}")
        )


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case Decimal():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"
