"""Comparing what a handler would have returned with what somebody else has."""

from collections.abc import Iterator
from itertools import islice

from pydantic import JsonValue

DIFFERENCES_SHOWN = 20
"""Nobody reads past these."""


def find_differences(theirs: JsonValue, ours: JsonValue) -> list[str]:
    """Return where two results differ, as JSON paths such as `$.items[3].price`; empty where they do not.

    Places only: the values of a shadow are stored nowhere. Numbers are compared as numbers: 1 is 1.0, as in jsonb.
    """
    return list(islice(_compare("$", theirs, ours), DIFFERENCES_SHOWN))


def _compare(path: str, theirs: JsonValue, ours: JsonValue) -> Iterator[str]:
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


def _kind(value: JsonValue) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"
