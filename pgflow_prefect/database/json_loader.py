"""Turns a jsonb value of a row into a value in Python."""

from typing import Any

import psycopg

from pgflow_prefect import raw_json


def load_json(document: str | bytes) -> Any:  # noqa: ANN401  a JSON value
    """Return the value of a JSON document.

    Raises:
        psycopg.DataError: Python can't read it; the message says why, without any part of the document.
    """
    try:
        return raw_json.load_json(document)
    except raw_json.UnreadableJsonError as error:
        raise psycopg.DataError(str(error)) from None
