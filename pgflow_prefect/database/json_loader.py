"""How a jsonb value of a row becomes a value in Python."""

import json
from typing import Any

import psycopg


def load_json(document: str | bytes) -> Any:  # noqa: ANN401  a JSON value
    """Return what a JSON document means.

    jsonb holds what Python does not read: numbers of thousands of digits, and a thousand arrays in one another.

    Raises:
        psycopg.DataError: this is such a document; the message says which, and has nothing of it.
    """
    try:
        return json.loads(document)
    except RecursionError:
        raise psycopg.DataError("a JSON value nests arrays and objects too deeply to be read") from None
    except ValueError as error:
        if len(document) < _SHORTEST_UNREADABLE:
            raise psycopg.DataError(f"a JSON value can't be read: {error}") from None
        raise psycopg.DataError("a JSON value has a number of too many digits to be read") from None


_SHORTEST_UNREADABLE = 640
"""Digits that Python reads in any case: `sys.set_int_max_str_digits` takes no fewer."""
